"""The methods of ``quality.py``: each compresses a copy of a model to 1/c of its parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import quality_baselines as baselines
import quality_planned
from quality_models import Batch, Subject
from torch import Tensor, nn

from ss1_compile import SS1Config, SS1Warning, compress
from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.calibration.sequential import SequentialCalibration, swap
from ss1_compile.compression.layers import Layer, find_layers
from ss1_compile.projection.target import Target
from ss1_compile.projection.weighing import weighed_rows

ASYMMETRIES = (0.0, 0.5, 1.0)
DAMPING = 1e-3


def ours(
    options: Mapping[str, Any], model: nn.Module, subject: Subject, c: float, seed: int
) -> int:
    """``compress`` with its defaults but ``options``; the number of parameters left."""
    options = {"sequential": True, **options}
    sequential = options.pop("sequential") and options.get("projection") != "average"
    config = SS1Config(reduction=c, exclude=subject.exclude, seed=seed, **options)
    data = None if options.get("projection") == "average" else subject.calibration(seed)
    _compress(model, config, data, sequential)
    for name in subject.layers(model):
        if isinstance(model.get_submodule(name), nn.Linear):
            raise RuntimeError(f"{name} was not compressed")
    return held(model, subject)


def ours_planned(model: nn.Module, subject: Subject, c: float, seed: int) -> int:
    """``compress`` with the configuration of ``plan``; the number of parameters left.

    ``compress`` chooses group sizes by the inputs of the compressed prefix, and slots come in
    eights: that can make up to 3 % more parameters than planned. So 1 % is kept in reserve, and
    where it does not suffice the budget is lowered accordingly.
    """
    budget = held(model, subject) / c
    asked = 0.99 / c
    while True:
        plan = quality_planned.planned(subject, c, seed).solve(asked)
        trial = copy.deepcopy(model)
        _compress(trial, plan.config, subject.calibration(seed), True)
        left = held(trial, subject)
        if left <= budget:
            break
        asked *= 0.999 * budget / left
    for name in subject.layers(model):
        model.set_submodule(name, trial.get_submodule(name))
    return left


def _compress(
    model: nn.Module, config: SS1Config, data: list[Batch] | None, sequential: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SS1Warning)
        compress(model, config, data, sequential=sequential, progress=False)


def held(model: nn.Module, subject: Subject) -> int:
    """The numbers in the layers' weights, what they share counted once."""
    parameters = {
        id(p): p.numel()
        for name in subject.layers(model)
        for key, p in model.get_submodule(name).named_parameters()
        if key != "bias"
    }
    return sum(parameters.values())


def baseline(
    method: baselines.Method | None, model: nn.Module, subject: Subject, c: float, seed: int
) -> int:
    """Replace every layer by the dense matrix of ``method``; the parameters that it needs.

    ``None`` stands for the SVD with weighed outputs.
    """
    return _replaced(method, model, subject, {}, c, seed)


def svd_planned(model: nn.Module, subject: Subject, c: float, seed: int) -> int:
    """The SVD with weighed outputs, its ranks chosen layer by layer."""
    return _replaced(
        None, model, subject, quality_planned.svd_reductions(subject, c, seed), c, seed
    )


def _replaced(
    method: baselines.Method | None,
    model: nn.Module,
    subject: Subject,
    reductions: Mapping[str, float],
    c: float,
    seed: int,
) -> int:
    """:func:`baseline`, with other reductions than c for some layers; 1 leaves a layer dense."""
    layers = [
        layer
        for layer in find_layers(model, SS1Config(reduction=1, exclude=subject.exclude), {})
        if layer.structure is not None
    ]
    data = subject.calibration(seed)
    left = held(model, subject)
    with SequentialCalibration(
        model, layers, data, paired=True, held_out=True, weigh_outputs=method is None
    ) as walk:
        for group in walk.groups(progress=False):
            for layer, statistics in group:
                assert statistics is not None
                own = reductions.get(layer.name, c)
                if own == 1:  # stays dense, and is refitted as compress does it
                    layer.replacement = _approximated(_itself, layer, statistics, own)
                    continue
                layer.replacement = _approximated(method, layer, statistics, own)
                made = int(layer.weight.numel() / own)
                if method is None:
                    made = quality_planned.allowed_rank(layer.shape, own) * sum(layer.shape)
                left += made - layer.weight.numel()
    for layer in layers:
        swap(model, layer)
    return left


def _itself(weight: Tensor, moment: Tensor, reduction: float) -> Tensor:
    """No approximation at all."""
    return weight


def _approximated(
    method: baselines.Method | None, layer: Layer, statistics: InputStatistics, c: float
) -> nn.Linear:
    """The layer with ``method``'s matrix, asymmetry and part of the shortfall by held-out rows."""
    w, device = layer.weight.detach().double(), layer.weight.device
    target = partial(Target.of, centred=layer.bias is not None, device=device)
    whole = target(statistics)
    rows = w  # what errors are measured on
    if method is None:
        assert statistics.gradients is not None
        found = weighed_rows([w], [statistics.gradients], whole)
        rows = w if found is None else found
    rank = quality_planned.allowed_rank(tuple(w.shape), c)

    known: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    def approximated(x: Tensor, of: Target, asymmetry: float, part: float) -> Tensor:
        assert of.moment is not None
        correction = of.correction(DAMPING, layer.name) if asymmetry else None
        owed = of.owed(DAMPING, layer.name) if part else None
        moment = baselines.damped(of.moment, DAMPING)

        def wanted(x: Tensor) -> Tensor:
            return x if correction is None else x + asymmetry * (x @ correction)

        goal = wanted(x) if owed is None else wanted(x) + part * owed
        if method is not None:
            return method(goal, moment, c)
        key = id(of), asymmetry
        if key not in known:
            known[key] = baselines.directions(moment, wanted(rows))
        return baselines.of_rank(goal, *known[key], rank)

    asymmetry = part = 0.0
    if statistics.drift is not None and statistics.held_out is not None:
        fit, unseen = target(statistics.without_held_out()), target(statistics.held_out)
        lost = {a: unseen.lost(rows, rows - approximated(rows, fit, a, 0)) for a in ASYMMETRIES}
        asymmetry = min(lost, key=lambda a: lost[a].item())
        if unseen.shortfall is not None and fit.shortfall is not None:
            lacking = {a: _lost(unseen, w, approximated(w, fit, asymmetry, a)) for a in ASYMMETRIES}
            part = min(lacking, key=lambda a: lacking[a])
    approximation = approximated(w, whole, asymmetry, part)
    linear = nn.Linear(*reversed(w.shape), layer.bias is not None, device, layer.weight.dtype)
    linear.weight = nn.Parameter(approximation.to(layer.weight.dtype))
    if layer.bias is not None:
        shift = whole.shift(w, w - approximation)
        assert shift is not None
        if whole.shortfall is not None:
            shift = shift + whole.shortfall.mean
        linear.bias = nn.Parameter((layer.bias.double() + shift).to(layer.bias.dtype))
    return linear


def _lost(of: Target, w: Tensor, approximation: Tensor) -> float:
    """``E‖W x_dense + s - Ŵ x‖²`` but for a constant, s the shortfall."""
    assert of.shortfall is not None
    e = w - approximation
    return (of.lost(w, e) + 2 * (of.shortfall.cross_moment * e).sum()).item()


Compression = Callable[[nn.Module, Subject, float, int], int]

METHODS: dict[str, Compression] = {
    "average (SS1's own)": partial(ours, {"projection": "average"}),
    "magnitude pruning": partial(baseline, baselines.magnitude),
    "SVD": partial(baseline, baselines.svd),
    "activation-aware SVD": partial(baseline, baselines.aware_svd),
    "activation-aware SVD, outputs weighed": partial(baseline, None),
    "Monarch": partial(baseline, baselines.monarch),
    "rotation sketch": partial(ours, {"projection": "calibrated"}),
    "learned sketch": partial(ours, {"projection": "learned"}),
    "learned sketch, planned": ours_planned,
    "activation-aware SVD, outputs weighed, planned": svd_planned,
    "learned sketch, outputs alike": partial(
        ours, {"projection": "learned", "weigh_outputs": False}
    ),
    "learned sketch, one-shot": partial(ours, {"projection": "learned", "sequential": False}),
    "learned sketch, asymmetry 0": partial(ours, {"projection": "learned", "asymmetry": 0}),
}
