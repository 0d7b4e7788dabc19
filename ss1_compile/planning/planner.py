"""``plan``: measure every layer, then spend a budget where it matters.

A layer's choices are compared by the error of its output on held-out inputs. To compare *layers*
the squared relative error is multiplied by a measured sensitivity: what the whole model loses when
that layer alone is compressed at a reference reduction, per squared error of its own. The sum over
layers is then minimised within the budget, exactly (a multiple-choice knapsack).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ss1_compile.calibration.statistics import calibrate, rebind, statistics_of
from ss1_compile.compression.compress import compress
from ss1_compile.compression.layers import find_layers
from ss1_compile.compression.stand_ins import stand_ins
from ss1_compile.config import SS1Config
from ss1_compile.errors import CalibrationError, ConfigError, NothingToCompressError
from ss1_compile.evaluation import Evaluation, Output
from ss1_compile.experts import SS1ExpertLinear
from ss1_compile.modules import SS1Linear
from ss1_compile.planning import costs
from ss1_compile.planning.layers import LayerChoice, PlannedLayer
from ss1_compile.planning.measure import (
    Candidate,
    CostOf,
    Measured,
    Measurements,
    dense_weight,
    measure_choices,
    measure_sensitivity,
    shadow,
)
from ss1_compile.planning.plans import Plan
from ss1_compile.planning.target import Cost, Target

CHOICES: tuple[float, ...] = (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8)
_REFERENCE = 3.0
"""The reduction, or the choice nearest to it, at which a layer's sensitivity is measured."""
_STEPS = 6  # of the bisection over budgets: to 1/64 of the range


def plan(
    model: nn.Module,
    calibration: Iterable[Any],
    target: str | float = "50%",
    *,
    metric: Callable[[nn.Module], float] | None = None,
    output: Output | None = None,
    cost: Cost | None = None,
    choices: Sequence[float] = CHOICES,
    config: SS1Config | None = None,
    held_out: Iterable[Any] | None = None,
    progress: bool = True,
) -> Plan:
    """Choose c layer by layer: the best model for a budget, or the cheapest for a quality.

    The model is left as it is; pass ``plan(...).config`` to :func:`ss1_compile.compress` with all
    of the calibration data. Work: one calibration pass, one projection of every layer per choice,
    and one forward of the held-out batches per layer. Memory beside the model: a compressed model
    at the smallest reduction above 1, one at the reference, and the statistics (two ``[K, K]``
    float64 per distinct input).

    Args:
        model: any module that :func:`ss1_compile.compress` takes.
        calibration: batches of inputs, see :func:`ss1_compile.calibrate`.
        target: a budget for the planned layers: ``"50%"`` or 0.5 of their dense cost,
            ``"parameters <= 6M"``, ``"latency <= 60%"``, ``"latency <= 3 ms"`` (the sum over
            layers); or a quality: ``"cosine >= 0.98"`` of the outputs to the dense model's,
            ``"perplexity <= +3%"``, ``"metric >= 0.9"``. Of a quality the cheapest plan that meets
            it is searched for, each candidate compressed and evaluated on the held-out batches.
        metric: ``metric(model)``, a figure of the model that takes the place of the divergence of
            its outputs in measuring sensitivity, and the figure of a target ``"metric ..."``.
        output: ``output(model, batch)``, the tensor ``[..., features]`` that matters, if it is not
            the model's ``logits``, ``last_hidden_state`` or first tensor.
        cost: ``"parameters"`` of the weights or ``"latency"`` on the model's device; ``None`` means
            what the target names, else parameters. Latency counts rows per call as in calibration.
        choices: the reductions to choose among; fractions need ``projection="learned"`` and are
            left out of the default without it. 1 (dense) is always there.
        config: everything but the reductions; ``None`` means ``projection="learned"``. Layers that
            it excludes, or to whose reduction it has an override, are not planned.
        held_out: batches that errors, sensitivity and quality are measured on; ``None`` takes every
            fourth of the calibration batches away for it.
        progress: show progress bars.

    Raises:
        ConfigError: a bad target, choice or metric, or a target that cannot be met.
        CalibrationError: fewer than two batches, or none that reaches a layer.
        NothingToCompressError: there is no layer to plan.
        SS1Error: as :func:`ss1_compile.compress`.
    """
    wanted = Target.parse(target)
    config = SS1Config(projection="learned") if config is None else config
    cost = _cost(cost, wanted)
    if wanted.name == "metric" and metric is None:
        raise ConfigError(f"the target {target!r} needs metric=..., a function of the model")
    choices = _checked(choices, config)
    fit, held = _split(calibration, held_out)
    model = getattr(model, "_orig_mod", model)
    work = shadow(model)
    with stand_ins(work), _statistics_kept(work):
        candidates, left = _candidates(work, config, fit, held, progress)
        if cost == "latency":
            rows = {c.name: max(1, round(c.fit.count / len(fit))) for c in candidates}
            cost_of: CostOf = costs.Latency(rows)
        else:
            cost_of = costs.parameters
        reference = min((c for c in choices if c != 1), key=lambda c: abs(c - _REFERENCE))
        measured = measure_choices(work, candidates, config, choices, reference, cost_of, progress)
        own = None if metric is None else Evaluation(metric, model, held)
        alone = {name: module for name, (module, _) in measured.reference.items()}
        lost = measure_sensitivity(work, candidates, alone, held, output, own, progress)
        layers = tuple(_layer(c, measured, lost.get(c.name, 0.0)) for c in candidates)
        unsolved = Plan(layers, config, cost, str(target), left)
        if wanted.kind == "budget":
            solved = unsolved.solve(target)
        else:
            named = metric if wanted.name == "metric" and metric is not None else wanted.name
            figure = Evaluation(named, model, held, output)
            solved = _search(unsolved, wanted, work, figure)
    return replace(solved, target=str(target))


def _cost(cost: Cost | None, target: Target) -> Cost:
    named = target.name if target.name in ("parameters", "latency") else None
    if cost not in (None, "parameters", "latency"):
        raise ConfigError(f"cost must be 'parameters' or 'latency', got {cost!r}")
    if cost is not None and named is not None and cost != named:
        raise ConfigError(f"the target is about {named} and cost={cost!r}; leave cost out")
    return cost or ("latency" if named == "latency" else "parameters")


def _checked(choices: Sequence[float], config: SS1Config) -> list[float]:
    if choices is CHOICES and config.projection != "learned":
        choices = [c for c in choices if float(c).is_integer()]
    for c in choices:
        replace(config, reduction=c)  # raises for a bad one
    distinct = sorted({*choices, 1})
    if len(distinct) < 2:
        raise ConfigError(f"choices must have a reduction above 1, got {list(choices)}")
    return distinct


def _split(
    calibration: Iterable[Any], held_out: Iterable[Any] | None
) -> tuple[list[Any], list[Any]]:
    if isinstance(calibration, Tensor | Mapping | str):
        raise CalibrationError(
            "calibration must be an iterable of batches (planning runs the model, so statistics "
            f"alone do not do), got one {type(calibration).__name__}; wrap it in a list"
        )
    batches = list(calibration)
    if held_out is None:
        fit = [batch for i, batch in enumerate(batches) if i % 4 != 3]
        held = [batch for i, batch in enumerate(batches) if i % 4 == 3]
        if 2 <= len(batches) < 4:
            fit, held = batches[:-1], batches[-1:]
    else:
        fit, held = batches, list(held_out)
    if not fit or not held:
        raise CalibrationError(
            f"planning fits to some batches and measures on others; got {len(batches)} and "
            f"{len(held)} held out: pass at least two, or smaller ones"
        )
    return fit, held


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Bind the earlier statistics again on leaving: those of a part of the data are the plan's."""
    before = [(p, statistics_of(p)) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, statistics in before:
            rebind(parameter, statistics)


def _form(module: SS1Linear | SS1ExpertLinear) -> str:
    words = [f"c = {module.structure.reduction:.4g}"]
    if isinstance(module, SS1Linear) and module.quantization is not None:
        words.append(module.quantization)
    return ", ".join(words)


def _candidates(
    model: nn.Module, config: SS1Config, fit: list[Any], held: list[Any], progress: bool
) -> tuple[list[Candidate], dict[str, str]]:
    left = {
        name: f"compressed already ({_form(module)}); plan the dense model"
        for name, module in model.named_modules()
        if isinstance(module, SS1Linear | SS1ExpertLinear)
    }
    chosen = []
    for layer in find_layers(model, replace(config, reduction=1), {}):
        if layer.structure is None:
            left[layer.name] = layer.reason or "it is no layer that compress handles"
        elif layer.structure.reduction != 1:
            left[layer.name] = f"c = {layer.structure.reduction:.4g} by overrides"
        else:
            chosen.append(layer)
    if not chosen:
        raise NothingToCompressError(
            f"no linear layer to plan; {'; '.join(f'{n}: {r}' for n, r in list(left.items())[:5])}"
        )
    names = [layer.weight_name for layer in chosen]
    held_out = calibrate(model, held, names=names, progress=progress)
    weigh = config.weigh_outputs and config.is_learned(True)
    statistics = calibrate(model, fit, names=names, weigh_outputs=weigh, progress=progress)
    candidates = []
    for layer in chosen:
        name = layer.weight_name
        if name in statistics and name in held_out:
            found = Candidate(layer.names, layer.module, statistics[name], held_out[name])
            candidates.append(found)
        else:
            left[layer.name] = "the calibration data never reached it"
    return candidates, left


def _layer(candidate: Candidate, measured: Measurements, lost: float) -> PlannedLayer:
    """Its choices, each loss ``sensitivity · error²``."""
    name = candidate.name
    _, error = measured.reference.get(name, (None, 0.0))
    sensitivity = lost / error**2 if error > 0 else 0.0

    def priced(found: Sequence[Measured]) -> tuple[LayerChoice, ...]:
        return tuple(
            LayerChoice(m.reduction, m.error, sensitivity * m.error**2, m.cost) for m in found
        )

    rows, columns = dense_weight(candidate.module).shape[-2:]
    return PlannedLayer(
        name,
        (int(rows), int(columns)),
        priced(measured.apart[name]),
        sensitivity=sensitivity,
        group=measured.groups.get(name),
        shared=priced(measured.shared[name]),
    )


def _search(plan: Plan, target: Target, model: nn.Module, evaluation: Evaluation) -> Plan:
    """The cheapest plan that meets the quality, by bisection over the budget."""
    dense = evaluation(model)
    figures = [_figure(evaluation, "dense", 1.0, dense)]
    if not target.met_by(dense, dense):
        raise ConfigError(
            f"the dense model itself has {evaluation.name} {dense:.4g}, which is no "
            f"{plan.target}; ask for less"
        )
    low, high = plan.least_cost / plan.dense_cost, 1.0
    best: Plan | None = None
    for step in range(_STEPS + 1):
        fraction = low if step == 0 else (low + high) / 2
        tried = plan.solve(min(1.0, fraction * (1 + 1e-9)))
        copied = shadow(model)
        compress(copied, replace(tried.config, allow_empty=True, warn_error=1e9), progress=False)
        value = evaluation(copied)
        figures.append(_figure(evaluation, "plan", tried.fraction, value))
        if target.met_by(value, dense):
            best, high = replace(tried, figures=(figures[0], figures[-1])), fraction
            if step == 0:
                break
        else:
            low = fraction
    if best is None:
        raise ConfigError(
            f"no plan of less than {high:.0%} of the cost reaches {plan.target} (dense "
            f"{dense:.4g}, at {figures[-1]['fraction']:.0%} {figures[-1]['value']:.4g}); ask for "
            f"less, offer smaller reductions (choices=...), or heal afterwards"
        )
    return best


def _figure(evaluation: Evaluation, what: str, fraction: float, value: float) -> dict[str, Any]:
    return {
        "metric": evaluation.name,
        "reduction": what,
        "fraction": fraction,
        "value": value,
    }
