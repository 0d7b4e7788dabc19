"""Measure every lowering on this GPU and write the table that :mod:`.lowering` reads.

    python -m ss1_compile.kernels.tune                      # the shapes shipped for the H200
    python -m ss1_compile.kernels.tune --layer 5120x13824   # a model's own K x N, added to them

Large M: median of single launches with a cold L2 (flushed by reading, so that no dirty lines are
written back during the measurement) and the launch hidden behind a sleeping GPU. M <= 64: replays
of a CUDA graph over many copies of the weights, together several times the L2.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ss1_compile.kernels import cuda, lowering
from ss1_compile.kernels.lowering import Layer

Call = Callable[[], object]

LAYERS = (
    (768, 768),
    (768, 2304),
    (768, 3072),
    (3072, 768),
    (1024, 1024),
    (1024, 4096),
    (4096, 1024),
    (4096, 4096),
    (4096, 14336),
    (14336, 4096),
)
REDUCTIONS = (2, 4, 8)
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 8192, 16384, 32768)
LEARNED_GROUP = 128
_SLEEP_CYCLES = 600_000
_COLD_BYTES = 400 << 20


@dataclass
class Operands:
    """Random operands of one layer; ``z`` and ``dense`` in as many copies as keep L2 cold."""

    x: Tensor
    code: Tensor
    z: list[Tensor]
    dense: list[Tensor]
    bias: Tensor | None


def measure(call: Call, repeats: int = 7) -> float:
    """Median microseconds of ``call`` with a cold, clean L2; the CPU's launch time is hidden."""
    flush = _flush_buffer(torch.cuda.current_device())
    call()
    call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    torch.cuda.synchronize()
    for start, end in events:
        flush.sum()
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(float(start.elapsed_time(end)) for start, end in events) * 1e3


def measure_graph(calls: Sequence[Call], replays: int = 4, repeats: int = 5) -> float:
    """Median microseconds per call of a CUDA graph of ``calls``, which should not share weights."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / (replays * len(calls)) * 1e3)
    return statistics.median(times)


_buffers: dict[int, Tensor] = {}


def _flush_buffer(device: int) -> Tensor:
    if device not in _buffers:
        _buffers[device] = torch.ones(_COLD_BYTES // 4, device="cuda")
    return _buffers[device]


def layers(
    shapes: Iterable[tuple[int, int]],
    reductions: Iterable[int],
    dtype: str = "bfloat16",
    biases: Sequence[bool] = (False, True),
) -> list[Layer]:
    """One row (M = 1) of every layer to measure: both kinds, with and without bias."""
    found = []
    for in_features, out_features in shapes:
        for c in reductions:
            for bias in biases:
                learned = Layer(
                    rows=1,
                    in_features=in_features,
                    out_features=out_features,
                    reduced_features=-(-in_features // LEARNED_GROUP) * (LEARNED_GROUP // c),
                    hashes=1,
                    kind="learned",
                    dtype=dtype,
                    bias=bias,
                )
                block_k = _block_k(in_features, c)
                groups = -(-in_features // (c * block_k))
                rotation = replace(
                    learned, kind="rotation", hashes=c, reduced_features=groups * block_k
                )
                found += [rotation, learned]
    return found


def _block_k(in_features: int, reduction: int) -> int:
    from ss1_compile.structure import default_block_k

    # wider supergroups give larger 0/±1 matrices: 0.90 of copy bandwidth at c = 8, B_K = 64 but
    # 0.84 at 128; 0.86 at c = 16, B_K = 32 but 0.58 at 128
    widest = 1 << (512 // reduction).bit_length() - 1
    return min(default_block_k(in_features, reduction), max(8, widest))


def operands(layer: Layer) -> Operands:
    """Fresh random operands on the current GPU."""
    dtype = getattr(torch, layer.dtype)
    k, n, kc = layer.in_features, layer.out_features, layer.reduced_features

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    few = layer.rows <= lowering.FEW_ROWS
    copies = max(4, min(64, _COLD_BYTES // 2 // (n * kc * dtype.itemsize))) if few else 1
    dense_copies = max(3, min(64, _COLD_BYTES // 2 // (n * k * dtype.itemsize))) if few else 1
    if layer.kind == "rotation":
        reduction = round(k / kc)
        block_k = _block_k(k, reduction)
        shape = (layer.hashes, kc // block_k, reduction)
        rotations = torch.randint(0, block_k // 8, shape, device="cuda", dtype=torch.int32) * 8
        code = torch.where(torch.rand(shape, device="cuda") < 0.5, ~rotations, rotations)
    else:
        groups = -(-k // LEARNED_GROUP)
        code = random(layer.hashes, groups, LEARNED_GROUP, kc // groups, scale=0.1)
    return Operands(
        x=random(layer.rows, k),
        code=code,
        z=[random(n, kc, scale=0.02) for _ in range(copies)],
        dense=[random(n, k, scale=0.02) for _ in range(dense_copies)],
        bias=random(n) if layer.bias else None,
    )


def times(layer: Layer) -> dict[str, float]:
    """Microseconds of the dense layer and of every lowering that can run ``layer``."""
    data = operands(layer)

    def dense(weight: Tensor) -> Call:
        return lambda: F.linear(data.x, weight, data.bias)

    def compressed(z: Tensor) -> Call:
        return lambda: cuda.linear(data.x, data.code, z, data.bias)

    few = layer.rows <= lowering.FEW_ROWS
    result = {}
    with torch.inference_mode():
        for name in ("dense", *layer.candidates()):
            calls = (
                [dense(w) for w in data.dense] if name == "dense" else [*map(compressed, data.z)]
            )
            with lowering.override(None if name == "dense" else name):
                time = measure_graph(calls) if few else measure(calls[0])
            result[name] = round(time, 2)
    return result


def ceilings() -> tuple[float, float]:
    """``(copy TB/s counting both ways, bf16 TFLOP/s of an 8192 cube)`` of the current GPU."""
    source = torch.randn(1 << 28, device="cuda").to(torch.bfloat16)
    target = torch.empty_like(source)
    copy = 4 * source.numel() / measure(lambda: target.copy_(source)) / 1e6
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / measure(lambda: a @ b, repeats=15) / 1e6


def _compile(job: tuple[Layer, int]) -> None:
    """Run every lowering once, to fill Triton's cache from several processes."""
    layer, rows = job
    layer = replace(layer, rows=rows)
    data = operands(layer)
    with torch.inference_mode():
        for name in layer.candidates():
            with lowering.override(name):
                cuda.linear(data.x, data.code, data.z[0], data.bias)
    torch.cuda.synchronize()


def tune(wanted: Sequence[Layer], rows: Sequence[int], jobs: int) -> dict[str, object]:
    """The table as a JSON-ready dictionary."""
    import triton

    work = [(layer, m) for layer in wanted for m in rows]
    if jobs > 1:
        # kernels do not depend on M beyond these
        kinds = [(layer, m) for layer in wanted for m in (1, 4, 16, 64, 4096)]
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            pool.map(_compile, kinds, chunksize=4)
    copy, matmul = ceilings()
    table: dict[str, dict[str, dict[str, float]]] = {}
    for done, (layer, m) in enumerate(work, 1):
        table.setdefault(layer.key, {})[str(m)] = times(replace(layer, rows=m))
        if done % 100 == 0 or done == len(work):
            print(f"{done}/{len(work)} measured", flush=True)
    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "origin": f"torch {torch.__version__}, Triton {triton.__version__}, "
        f"{datetime.now(UTC):%Y-%m-%d}",
        "copy_tb_s": round(copy, 3),
        "matmul_tflop_s": round(matmul, 1),
        "rows": table,
    }


def write(table: dict[str, object], path: Path) -> None:
    """One line of JSON per layer and M, so that a re-measurement gives a readable diff."""
    head = {key: value for key, value in table.items() if key != "rows"}
    rows = table["rows"]
    assert isinstance(rows, dict)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    bodies = []
    for key, by_rows in rows.items():
        inner = ",\n".join(f"      {json.dumps(m)}: {json.dumps(us)}" for m, us in by_rows.items())
        bodies.append(f"    {json.dumps(key)}: {{\n{inner}\n    }}")
    body = ",\n".join(bodies)
    path.write_text("{\n" + "\n".join(lines) + '\n  "rows": {\n' + body + "\n  }\n}\n")


def _shape(text: str) -> tuple[int, int]:
    in_features, out_features = text.lower().split("x")
    return int(in_features), int(out_features)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ss1_compile.kernels.tune``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layer", type=_shape, action="append", default=[], metavar="KxN")
    parser.add_argument("--only", action="store_true", help="measure only the given --layer")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--jobs", type=int, default=4, help="processes that compile kernels")
    parser.add_argument("--out", type=Path, help="default: the package's table of this GPU")
    options = parser.parse_args(argv)
    shapes = [*(() if options.only else LAYERS), *options.layer]
    wanted = layers(shapes, REDUCTIONS, options.dtype)
    table = tune(wanted, ROWS, options.jobs)
    name = lowering.file_name(torch.cuda.get_device_name())
    path = options.out or Path(__file__).parent / "tables" / name
    write(table, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
