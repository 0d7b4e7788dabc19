"""What a planner must know of each layer: its choices' held-out errors, and what they cost a model.

With ``E = W - Ŵ`` the squared output error ``E‖E x + Δb‖² = tr(E M Eᵀ) + 2 Δbᵀ E m + ‖Δb‖²`` needs
the mean m and the second moment M of held-out inputs only: no forward pass per choice.
"""

from __future__ import annotations

import copy
import glob
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ss1_compile.calibration.observer import Quietly
from ss1_compile.calibration.sequential import swap
from ss1_compile.calibration.statistics import InputStatistics, statistics_of
from ss1_compile.compression.layers import find_layers
from ss1_compile.compression.replacing import by_input, find_replacements
from ss1_compile.config import SS1Config
from ss1_compile.evaluation import Output, divergence, outputs
from ss1_compile.experts import ExpertLinear, SS1ExpertLinear
from ss1_compile.modules import SS1Linear, put_layer

CostOf = Callable[[str, nn.Module, float], float]
"""``cost_of(name, module, part)`` of a dense or compressed layer; ``part`` of its learned sketch is
its own, the rest that of the layers that it shares it with."""


_SWEEPS = 2
"""Of the fits of learned sketches that are only compared."""


@dataclass
class Candidate:
    """A layer that a plan may compress.

    Attributes:
        names: of the module, all of them if it is registered under several.
        module: the dense layer, in the shadow.
        fit: statistics that choices are fitted to.
        held_out: statistics that their errors are measured on.
    """

    names: Sequence[str]
    module: nn.Module
    fit: InputStatistics
    held_out: InputStatistics

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


@dataclass(frozen=True)
class Measured:
    """One choice of one layer: c, the squared relative held-out error, and the cost."""

    reduction: float
    error: float
    cost: float


def shadow(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor with ``model``.

    Replacing layers in it leaves ``model`` alone and costs no memory but the new layers'.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    copied: nn.Module = copy.deepcopy(model, shared)
    return copied


def dense_weight(module: nn.Module) -> Tensor:
    """``[N, K]`` or ``[E, N, K]`` of a layer that compress handles, before compression."""
    if isinstance(module, ExpertLinear):
        return module.matrices.detach()
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().t()


def held_out_error(dense: nn.Module, compressed: nn.Module, statistics: InputStatistics) -> float:
    """``sqrt(E‖Δy‖² / E‖y - E[y]‖²)``, not centred without a bias, of two layers.

    Args:
        dense: with weight ``[N, K]``, ``[K, N]`` (Conv1D) or ``[E, N, K]`` (experts).
        compressed: what :func:`ss1_compile.compress` put in its place.
        statistics: of the inputs.
    """
    device = dense_weight(dense).device
    mean, moment = statistics.mean.to(device), statistics.second_moment.to(device)
    biased = dense.bias is not None
    centred = statistics.covariance().to(device) if biased else moment
    w = dense_weight(dense).double()
    e = w - compressed_weight(compressed).double()
    lost = ((e @ moment) * e).sum()
    if biased:
        assert isinstance(dense.bias, Tensor)
        assert isinstance(compressed.bias, Tensor)
        shift = (dense.bias - compressed.bias).detach().double()
        lost += 2 * (shift @ (e @ mean)) + shift @ shift
    whole = float(((w @ centred) * w).sum())
    return math.sqrt(max(0.0, float(lost)) / whole) if whole > 0 else 0.0


def compressed_weight(module: nn.Module) -> Tensor:
    """The dense ``[N, K]`` or ``[E, N, K]`` that a compressed layer stands for."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def compressed_copy(
    model: nn.Module, names: Sequence[str], config: SS1Config, reduction: float
) -> nn.Module:
    """A shadow of ``model`` with the layers called ``names`` at one reduction, where possible."""
    whole = float(reduction).is_integer()
    uniform = replace(
        config,
        reduction=int(reduction) if whole else reduction,
        include=tuple(glob.escape(name) for name in names),
        exclude=(),
        overrides={},
        max_error=None,
        warn_error=1e9,
        allow_empty=True,
        strict=False,
    )
    copied = shadow(model)
    layers = [layer for layer in find_layers(copied, uniform, {}) if layer.structure is not None]
    for group in by_input(((x, statistics_of(x.weight)) for x in layers), uniform):
        find_replacements(group, uniform, sweeps=_SWEEPS)
    for layer in layers:
        swap(copied, layer)
    return copied


def sketch_parts(model: nn.Module) -> dict[int, float]:
    """``id(layer)`` → its part of the learned sketch that it shares with others, by its rows."""
    rows: dict[int, int] = {}
    layers = [m for m in model.modules() if isinstance(m, SS1Linear)]
    for layer in layers:
        key = id(layer.sketch)
        rows[key] = rows.get(key, 0) + layer.out_features
    return {id(layer): layer.out_features / rows[id(layer.sketch)] for layer in layers}


def stored_numbers(model: nn.Module) -> int:
    """Numbers of the weights of all SS1 layers: z, and learned sketches once each."""
    layers = [m for m in model.modules() if isinstance(m, SS1Linear | SS1ExpertLinear)]
    held: dict[int, Tensor] = {id(layer.z): layer.z for layer in layers}
    held |= {id(m.sketch): m.sketch for m in layers if m.sketch.is_floating_point()}
    return sum(tensor.numel() for tensor in held.values())


@dataclass
class Measurements:
    """What :func:`measure_choices` found, by name of the layer.

    Attributes:
        apart: the choices, each layer with a sketch of its own; the first is dense.
        shared: the choices where all layers of a group have the same c and share a sketch.
        groups: name → number of the group of layers that can.
        reference: at the reference reduction, the compressed layer and its error.
    """

    apart: dict[str, list[Measured]]
    shared: dict[str, list[Measured]]
    groups: dict[str, int]
    reference: dict[str, tuple[nn.Module, float]]


def measure_choices(
    model: nn.Module,
    candidates: Sequence[Candidate],
    config: SS1Config,
    choices: Sequence[float],
    reference: float,
    cost_of: CostOf,
    progress: bool,
) -> Measurements:
    """Every choice of every layer, and the layers as compressed at ``reference``.

    Choices that a layer cannot have (no room in the structure) or that cost no less than leaving it
    dense are left out.
    """
    names = [candidate.name for candidate in candidates]
    dense = {c.name: Measured(1, 0.0, cost_of(c.name, c.module, 1.0)) for c in candidates}
    found = Measurements({name: [dense[name]] for name in names}, {n: [] for n in names}, {}, {})
    for reduction in _track([c for c in choices if c != 1], "measuring reductions", progress):
        copied = compressed_copy(model, names, config, reduction)
        parts = sketch_parts(copied)
        sharers: dict[str, nn.Module] = {}
        for candidate in candidates:
            name, module = candidate.name, copied.get_submodule(candidate.name)
            if type(module) is type(candidate.module):
                continue
            part = parts.get(id(module), 1.0)
            error = held_out_error(candidate.module, module, candidate.held_out)
            made = Measured(reduction, error, cost_of(name, module, part))
            if part < 1:
                sharers[name] = module
            if made.cost < dense[name].cost:
                (found.shared if part < 1 else found.apart)[name].append(made)
                if reduction == reference:
                    found.reference[name] = module, error
        found.groups |= _numbered(sharers)
        if not sharers:
            continue
        alone = replace(config, share_sketches=False)
        copied = compressed_copy(model, list(sharers), alone, reduction)
        for candidate in candidates:
            if candidate.name in sharers:
                module = copied.get_submodule(candidate.name)
                error = held_out_error(candidate.module, module, candidate.held_out)
                made = Measured(reduction, error, cost_of(candidate.name, module, 1.0))
                if made.cost < dense[candidate.name].cost:
                    found.apart[candidate.name].append(made)
    return found


def _numbered(sharers: Mapping[str, nn.Module]) -> dict[str, int]:
    """Name → number of the sketch, in the order of the layers."""
    numbers: dict[int, int] = {}
    return {
        name: numbers.setdefault(id(module.sketch), len(numbers))
        for name, module in sharers.items()
    }


def measure_sensitivity(
    model: nn.Module,
    candidates: Sequence[Candidate],
    replacements: Mapping[str, nn.Module],
    batches: Sequence[Any],
    output: Output | None,
    metric: Callable[[nn.Module], float] | None,
    progress: bool,
) -> dict[str, float]:
    """What the whole model loses if one layer alone is replaced, for each of ``replacements``.

    Without ``metric`` the mean divergence of the outputs (:func:`ss1_compile.evaluation.divergence`
    per row); with it the change of the figure, in either direction.
    """
    found = [candidate for candidate in candidates if candidate.name in replacements]
    lost = dict.fromkeys((candidate.name for candidate in found), 0.0)

    def replaced(candidate: Candidate, module: nn.Module) -> None:
        for name in candidate.names:
            put_layer(model, name, module)

    if metric is not None:
        dense = metric(model)
        for candidate in _track(found, "measuring sensitivity", progress):
            replaced(candidate, replacements[candidate.name])
            lost[candidate.name] = abs(metric(model) - dense)
            replaced(candidate, candidate.module)
        return lost
    rows = 0
    with Quietly(model):
        for batch in _track(batches, "measuring sensitivity", progress):
            reference, logits = outputs(model, batch, output)
            rows += len(reference)
            for candidate in found:
                replaced(candidate, replacements[candidate.name].eval())
                changed, _ = outputs(model, batch, output)
                lost[candidate.name] += divergence(reference, changed, logits)
                replaced(candidate, candidate.module)
    return {name: value / rows for name, value in lost.items()}


def _track(items: Sequence[Any], title: str, progress: bool) -> Any:
    return track(items, title, console=Console(stderr=True), transient=True, disable=not progress)
