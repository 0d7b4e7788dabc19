"""Time a module as it is and with SS1 layers, both compiled, in one run.

What ``blocks.py`` and ``models.py`` share. Weights are random: SS1 layers are initialised, not
projected, because only the time matters here.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ss1_compile import SS1Linear, SS1Structure
from ss1_compile.compression.settled import settle
from ss1_compile.kernels.executor import on_cuda
from ss1_compile.learned import LearnedStructure
from ss1_compile.modules import put_layer

DENSE_MODES = ("max-autotune-no-cudagraphs", "default")
"""The faster counts: autotuning chose products for BERT-large that took a tenth longer."""
KINDS = ("rotation", "learned")
WINDOWS = 3
"""What else runs on the host slows launching down for a part of a second."""
Choose = Callable[[str], "int | None"]
"""Qualified name of a linear layer → its reduction c, or None to leave it dense."""


@dataclass(frozen=True)
class Variant:
    """One way to compress a model.

    Attributes:
        label: what is compressed, for the table ("all linears, c = 4").
        choose: the reduction per layer.
        kinds: the sketches to measure.
    """

    label: str
    choose: Choose
    kinds: Sequence[str] = KINDS


@dataclass(frozen=True)
class Case:
    """A model at one input size.

    Attributes:
        model: the name that variants and the results share.
        size: the input in words ("batch 128 x 128").
        build: a fresh model on the GPU, in bfloat16 and eval mode.
        inputs: its arguments.
        variants: what to compare with the dense model.
        blocks: the parts to compile, one graph for equal ones; ``None`` compiles the whole model.
        tokens: per call, for tokens per second of graphs' replays.
        profiled: labels of variants, and ``"dense"``, whose kernels are listed.
    """

    model: str
    size: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    variants: Sequence[Variant]
    blocks: Callable[[nn.Module], Iterable[nn.Module]] | None = None
    tokens: int = 0
    profiled: Sequence[str] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, or Transformers' with a transposed weight."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def sizes(module: nn.Module) -> tuple[int, int]:
    """``(N, K)`` of a linear layer."""
    n, k = module.weight.shape
    return (n, k) if isinstance(module, nn.Linear) else (k, n)


def ss1_layers(modules: Sequence[nn.Module], kind: str, c: int) -> list[SS1Linear]:
    """Randomly initialised SS1 layers in place of linear layers that read the same input.

    As ``compress`` makes them: rotations of the same hash (they follow from the sizes), or one
    learned sketch for all, whose parameters are paid for by all. ``compress`` also chooses the
    size of the groups by its fits; here it is the default.
    """
    made: list[SS1Linear] = []
    together = sum(sizes(module)[0] for module in modules)
    for module in modules:
        n, k = sizes(module)
        structure: SS1Structure | LearnedStructure
        if kind == "rotation":
            structure = SS1Structure.create(k, n, c)
        else:
            structure = replace(LearnedStructure.create(k, together, c), out_features=n)
        weight = module.weight
        biased = module.bias is not None
        layer = SS1Linear(structure, biased, device=weight.device, dtype=weight.dtype)
        if made and kind == "learned":
            layer.sketch = made[0].sketch
        made.append(layer.eval().requires_grad_(weight.requires_grad))
    return made


def by_input(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: tuple[Any, ...]
) -> list[list[str]]:
    """The names of ``layers`` grouped by the tensor that they read, in one call of the model."""
    read: dict[str, Tensor] = {}  # kept for the call, so that no two share an id

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, given: read.update({name: given[0]})

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    groups: dict[int, list[str]] = {}
    for name in layers:
        groups.setdefault(id(read.get(name, name)), []).append(name)
    return list(groups.values())


def swap(model: nn.Module, choose: Choose, kind: str, inputs: tuple[Any, ...]) -> int:
    """Put SS1 layers in place of the linear layers that ``choose`` names; returns how many.

    ``inputs`` are the model's arguments: layers that read the same tensor share a sketch.
    """
    chosen = {
        name: (module, c)
        for name, module in model.named_modules()
        if is_linear(module) and (c := choose(name)) is not None
    }
    if not chosen:
        raise ValueError("no linear layer was chosen")
    for names in by_input(model, {name: module for name, (module, _) in chosen.items()}, inputs):
        alike: dict[tuple[int, bool], list[str]] = {}
        for name in names:
            module, c = chosen[name]
            alike.setdefault((c, module.bias is None), []).append(name)
        for (c, _), sharing in alike.items():
            layers = ss1_layers([chosen[name][0] for name in sharing], kind, c)
            for name, layer in zip(sharing, layers, strict=True):
                put_layer(model, name, layer)
    settle(model)  # or the backend would compress blocks that stay dense as a whole
    return len(chosen)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    return sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})


def median_ms(call: Callable[[], object], seconds: float = 1.0) -> float:
    """Median milliseconds per call between CUDA events, for about ``seconds`` after a warm-up."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(1 + max(7, int(seconds / once)))]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(times)


@contextmanager
def as_launched() -> Iterator[None]:
    """Lets Transformers' models take the way they take when launched while a stream is capturing.

    They make a mask then, and compile again for it; and look whether positions are of several
    packed texts, which waits for the GPU. Here they never are.
    """
    with ExitStack() as stack:
        try:
            from transformers import masking_utils
            from transformers.utils import import_utils
        except ImportError:
            pass
        else:
            for module, name, result in (
                (import_utils, "is_cuda_stream_capturing", False),
                (masking_utils, "find_packed_sequence_indices", None),
            ):
                stack.enter_context(mock.patch.object(module, name, return_value=result))
        yield


def graph_ms(call: Callable[[], object], seconds: float = 1.0) -> float:
    """As :func:`median_ms`, of replays of one CUDA graph: without the time of launching."""
    graph = torch.cuda.CUDAGraph()
    with as_launched(), torch.cuda.graph(graph):
        kept = call()
    found = median_ms(graph.replay, seconds)
    del kept
    return found


def compile_parts(case: Case, model: nn.Module, **options: Any) -> nn.Module:
    """Compile the case's blocks in place, or the whole model."""
    torch._dynamo.reset()
    if case.blocks is None:
        model.compile(dynamic=False, **options)
    else:
        for block in case.blocks(model):
            block.compile(dynamic=False, **options)
    return model


def run(
    case: Case, model: nn.Module, seconds: float, profile: bool = False, **options: Any
) -> dict[str, Any]:
    """Milliseconds, first call, peak and weight bytes of one model.

    ``ms`` is the time of launched calls, ``graph_ms`` of replays of one CUDA graph of the call. Of
    launched calls the best of several medians counts, dense or not.
    With ``profile`` also ``kernels``, see :func:`kernel_times`.
    """
    weights = tensor_bytes(model)
    inputs = case.inputs()
    compile_parts(case, model, **options)
    with torch.no_grad():
        begin = time.perf_counter()
        model(*inputs)
        torch.cuda.synchronize()
        first_call = time.perf_counter() - begin
        torch.cuda.reset_peak_memory_stats()
        model(*inputs)
        torch.cuda.synchronize()
        row = {
            "ms": round(min(median_ms(lambda: model(*inputs), seconds) for _ in range(WINDOWS)), 4),
            "first_call_s": round(first_call, 1),
            "peak_mb": round(torch.cuda.max_memory_allocated() / 2**20),
            "weights_mb": round(weights / 2**20, 1),
        }
        row["graph_ms"] = round(graph_ms(lambda: model(*inputs), seconds), 4)
        if case.tokens:
            row["tokens_per_s"] = round(case.tokens / row["graph_ms"] * 1e3)
        if profile:
            row["kernels"] = kernel_times(lambda: model(*inputs))
    return row


def measure(case: Case, seconds: float = 0.5) -> list[dict[str, Any]]:
    """The dense row of a case, then a row per variant and kind."""
    on_cuda.advance(wait=True)  # no row is timed while the operators still launch from Python
    head = {"model": case.model, "size": case.size, **case.extra}
    dense = fastest_dense(case, seconds)
    rows = [{**head, "variant": "dense", "kind": None, **dense}]
    for variant in case.variants:
        for kind in variant.kinds:
            torch.cuda.empty_cache()
            model = case.build()
            swapped = swap(model, variant.choose, kind, case.inputs())
            profile = variant.label in case.profiled
            found = run(case, model, seconds, profile, backend="ss1")
            row = {**head, "variant": variant.label, "kind": kind, "layers": swapped, **found}
            row["speedup"] = round(dense["ms"] / found["ms"], 3)
            row["graph_speedup"] = round(dense["graph_ms"] / found["graph_ms"], 3)
            rows.append(row)
            del model
    torch.cuda.empty_cache()
    return rows


def fastest_dense(case: Case, seconds: float) -> dict[str, Any]:
    """The dense row of the mode whose graph is faster, with the least times of both modes.

    A graph was slower than launched calls where the GPU slowed down in between.
    """
    model = case.build()
    rows = [run(case, model, seconds, "dense" in case.profiled, mode=mode) for mode in DENSE_MODES]
    best = min(rows, key=lambda row: float(row["graph_ms"]))
    launched = min(row["ms"] for row in rows)
    return {**best, "ms": launched, "graph_ms": min(best["graph_ms"], launched)}


def kernel_times(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Microseconds per kernel of one call, in order of launch: where the time of a block goes."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_time:
            totals.setdefault(event.name, []).append(event.device_time)
    return [
        {"kernel": name[:120], "calls": len(times) / 5, "us": round(sum(times) / 5, 2)}
        for name, times in totals.items()
    ]
