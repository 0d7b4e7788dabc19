"""Reductions chosen layer by layer for ``quality.py``: of the learned sketch, and of the SVD.

Both spend ``1/c`` of the parameters by the same exact dynamic program over the same reductions and
the same measured sensitivities, ``Σ sensitivity · error²``; the errors are each method's own, on
the quarter of its text that it was not fitted to. That text is the first part of what the model is
then calibrated on: planning needs less. Plans are kept in ``out/quality``.
"""

from __future__ import annotations

import json
from pathlib import Path

import quality_baselines as baselines
from quality_models import Subject
from torch import Tensor

from ss1_compile import Plan, SS1Config, calibrate, plan
from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.planning import knapsack
from ss1_compile.planning.layers import PlannedLayer
from ss1_compile.planning.planner import CHOICES
from ss1_compile.projection.target import Target
from ss1_compile.projection.weighing import weighed_rows

DIRECTORY = Path("out/quality")


def planned(subject: Subject, c: float, seed: int) -> Plan:
    """The plan for the learned sketch, measured once for all c.

    Args:
        subject: the model and its text.
        c: 1/c of the parameters may be kept.
        seed: of the calibration text.
    """
    path = _path(subject, seed, "plan")
    if path.is_file():
        found = Plan.load(path)
    else:
        config = SS1Config(projection="learned", exclude=subject.exclude)
        data = subject.planning(seed)
        found = plan(
            subject.model, data, 1 / c, config=config, output=subject.output, progress=False
        )
        found.save(path)
    return found.solve(1 / c)


def svd_reductions(subject: Subject, c: float, seed: int) -> dict[str, float]:
    """The reduction of every layer for the SVD with weighed outputs, 1 where it stays dense.

    Args:
        subject: the model and its text.
        c: 1/c of the parameters may be kept.
        seed: of the calibration text.
    """
    layers = planned(subject, c, seed).layers
    path = _path(subject, seed, "svd")
    if path.is_file():
        errors: dict[str, list[float]] = json.loads(path.read_text())
    else:
        errors = _errors(subject, layers, seed)
        path.write_text(json.dumps(errors))
    losses, costs = [], []
    for layer in layers:
        n, k = layer.shape
        ranks = [allowed_rank(layer.shape, choice) for choice in CHOICES[1:]]
        losses.append([0.0, *(layer.sensitivity * e**2 for e in errors[layer.name])])
        costs.append([float(n * k), *(float(rank * (n + k)) for rank in ranks)])
    dense = sum(cost[0] for cost in costs)
    picked = knapsack.choose(losses, costs, dense / c)
    return {layer.name: CHOICES[i] for layer, i in zip(layers, picked, strict=True)}


def _errors(
    subject: Subject, layers: tuple[PlannedLayer, ...], seed: int
) -> dict[str, list[float]]:
    """``sqrt(E‖Δy‖² / E‖y - E[y]‖²)`` on held-out rows, by layer and ``CHOICES[1:]``."""
    model = subject.model
    names = [f"{layer.name}.weight" for layer in layers]
    statistics = calibrate(
        model,
        subject.planning(seed),
        names=names,
        held_out=True,
        weigh_outputs=True,
        progress=False,
    )
    found = {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        weight = module.weight
        assert isinstance(weight, Tensor)
        known = statistics[f"{layer.name}.weight"]
        ranks = [allowed_rank(layer.shape, c) for c in CHOICES[1:]]
        found[layer.name] = svd_errors(weight.detach(), known, module.bias is not None, ranks)
    return found


def svd_errors(
    weight: Tensor, statistics: InputStatistics, centred: bool, ranks: list[int]
) -> list[float]:
    """Relative held-out errors of the SVD with weighed outputs, fitted to the other rows.

    Args:
        weight: ``[N, K]``.
        statistics: of its inputs, with gradients and held-out rows.
        centred: whether there is a bias.
        ranks: for each of which there is an error.
    """
    assert statistics.held_out is not None
    assert statistics.gradients is not None
    w = weight.double()
    fit = Target.of(statistics.without_held_out(), centred, w.device)
    unseen = Target.of(statistics.held_out, centred, w.device)
    rows = weighed_rows([w], [statistics.gradients], fit)
    assert fit.moment is not None
    found = baselines.directions(baselines.damped(fit.moment), w if rows is None else rows)
    whole = unseen.whole(w)
    errors = (unseen.lost(w, w - baselines.of_rank(w, *found, rank)) / whole for rank in ranks)
    return [error.sqrt().item() for error in errors]


def allowed_rank(shape: tuple[int, ...], reduction: float) -> int:
    """The most that ``N·K/c`` numbers allow: ``N·K / (c·(N + K))``, rounded down."""
    n, k = shape
    return max(1, int(n * k / (reduction * (n + k))))


def _path(subject: Subject, seed: int, what: str) -> Path:
    """Where a plan is kept for this model and this calibration text."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    tokens = subject.tokens(subject.planning(seed))
    return DIRECTORY / f"{subject.name}-{tokens}-{seed}-{what}.json"
