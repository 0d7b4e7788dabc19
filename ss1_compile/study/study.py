"""``study``: size, latency and quality of a model over reductions and methods."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ss1_compile.calibration.observer import run_batch
from ss1_compile.calibration.statistics import calibrate
from ss1_compile.compression.compress import compress
from ss1_compile.config import SS1Config
from ss1_compile.errors import ConfigError
from ss1_compile.evaluation import METRICS, Evaluation, Output
from ss1_compile.planning.measure import shadow, stored_numbers
from ss1_compile.planning.planner import plan
from ss1_compile.report import Report

METHODS = ("average", "calibrated", "learned", "plan")


@dataclass(frozen=True)
class Point:
    """One model of a study.

    Attributes:
        method: ``"dense"``, a projection (uniform c), or ``"plan"`` (the learned projection with
            planned reductions at the cost of uniform c).
        reduction: c; 1 for dense.
        linear_bytes: of the linear layers, as the report counts them.
        model_bytes: of all parameters and sketches.
        quality: the metric.
        latency_ms: median time of all held-out batches, eager.
        layers: the rows of the compression report, as plain values.
    """

    method: str
    reduction: float
    linear_bytes: int
    model_bytes: int
    quality: float
    latency_ms: float
    layers: tuple[Mapping[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """``"learned, c = 2"``."""
        return "dense" if self.method == "dense" else f"{self.method}, c = {self.reduction:.3g}"


@dataclass(frozen=True)
class Study:
    """What :func:`study` measured.

    Attributes:
        title: of the model.
        metric: name of the quality.
        more_is_better: of the quality.
        device: where latency was measured.
        points: the dense model first.
    """

    title: str
    metric: str
    more_is_better: bool
    device: str
    points: tuple[Point, ...]

    def front(self, cost: str) -> list[Point]:
        """The points that none beats in both ``cost`` (``"model_bytes"``, ...) and quality."""
        sign = 1 if self.more_is_better else -1
        best: list[Point] = []
        for point in sorted(self.points, key=lambda p: (getattr(p, cost), -sign * p.quality)):
            if not best or sign * point.quality > sign * best[-1].quality:
                best.append(point)
        return best

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_dict` inverts it."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """Invert :meth:`to_dict`.

        Raises:
            ConfigError: not such a document.
        """
        try:
            points = tuple(
                Point(**{**point, "layers": tuple(dict(row) for row in point["layers"])})
                for point in values["points"]
            )
            return cls(**{**values, "points": points})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"this is no study: {error!r}") from error


def study(
    model: nn.Module,
    calibration: Iterable[Any],
    held_out: Iterable[Any],
    *,
    title: str = "",
    reductions: Sequence[float] = (2, 4),
    methods: Sequence[str] = METHODS,
    metric: str | Callable[[nn.Module], float] = "cosine",
    more_is_better: bool = True,
    output: Output | None = None,
    config: SS1Config | None = None,
    rounds: int = 5,
    progress: bool = True,
) -> Study:
    """Compress copies in several ways and measure each. The model is left as it is.

    Args:
        model: dense.
        calibration: batches to fit to; planning holds a part of them out for itself.
        held_out: other batches, for quality and latency.
        title: of the page.
        reductions: the values of c.
        methods: of ``"average"``, ``"calibrated"``, ``"learned"``, ``"plan"``. The average uses
            the statistics for biases and for its error only.
        metric: ``"cosine"``, ``"perplexity"`` or a function of the model.
        more_is_better: of a function.
        output: see :func:`ss1_compile.plan`.
        config: everything but projection and reductions.
        rounds: turns of each model in timing.
        progress: show progress bars.

    Raises:
        ConfigError: an unknown method or metric.
        SS1Error: as :func:`ss1_compile.compress` and :func:`ss1_compile.plan`.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ConfigError(f"methods must be some of {METHODS}, got {list(methods)}")
    batches, unseen = list(calibration), list(held_out)
    base = replace(config or SS1Config(), warn_error=1e9)
    evaluation = Evaluation(metric, model, unseen, output)
    planned = None
    if "plan" in methods:
        learned = replace(base, projection="learned")
        planned = plan(model, batches, "100%", config=learned, output=output, progress=progress)
    calibrate(model, batches, weigh_outputs=base.weigh_outputs, progress=progress)
    made: list[tuple[str, float, nn.Module, Report | None]] = [("dense", 1, model, None)]
    uniform: dict[float, float] = {}
    jobs = [(c, method) for c in reductions for method in sorted(methods, key=METHODS.index)]
    bar = track(
        jobs, "compressing", console=Console(stderr=True), transient=True, disable=not progress
    )
    for c, method in bar:
        if method == "plan":
            assert planned is not None
            if c not in uniform:
                uniform[c] = planned.dense_cost / c
            chosen = planned.solve(min(1.0, uniform[c] / planned.dense_cost)).config
        elif method != "learned" and not float(c).is_integer():
            continue
        else:
            whole = int(c) if float(c).is_integer() else c
            chosen = replace(base, projection=method, reduction=whole)  # type: ignore[arg-type]
        copied = shadow(model)
        report = compress(copied, chosen, progress=False)
        if method == "learned":
            uniform[c] = float(stored_numbers(copied))
        made.append((method, c, copied, report))
    times = time_models({str(i): entry[2] for i, entry in enumerate(made)}, unseen, rounds=rounds)
    linear = next(report.bytes_before for *_, report in made if report is not None)
    points = tuple(
        Point(
            method=method,
            reduction=c,
            linear_bytes=linear if report is None else report.bytes_after,
            model_bytes=_bytes(one),
            quality=evaluation(one),
            latency_ms=times[str(i)]["median_ms"],
            layers=() if report is None else tuple(json.loads(report.to_json())["layers"]),
        )
        for i, (method, c, one, report) in enumerate(made)
    )
    better = METRICS[metric] if isinstance(metric, str) else more_is_better
    device = next(model.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Study(title or type(model).__name__, evaluation.name, better, where, points)


def time_models(
    models: Mapping[str, nn.Module],
    batches: Sequence[Any],
    *,
    rounds: int = 10,
    compiled: bool = False,
) -> dict[str, dict[str, float]]:
    """Milliseconds that each model takes for all of the batches, the models taking turns.

    Args:
        models: name → model, in eval mode.
        batches: on the models' device.
        rounds: timed turns of each, after one to warm up.
        compiled: time ``torch.compile`` of each; SS1 layers through the backend ``"ss1"``.

    Returns:
        name → ``median_ms``, ``least_ms``.
    """
    functions: dict[str, Any] = dict(models)
    if compiled:
        options: dict[str, Any] = {"include": (), "allow_empty": True}
        functions = {
            name: torch.compile(model, backend="ss1", options=options)
            for name, model in models.items()
        }
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            with torch.no_grad():
                start = _now()
                for batch in batches:
                    run_batch(function, batch, None)
                spent = _now() - start
            if turn:
                times[name].append(1000 * spent)
    return {
        name: {"median_ms": statistics.median(spent), "least_ms": min(spent)}
        for name, spent in times.items()
    }


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _bytes(model: nn.Module) -> int:
    tensors: dict[int, Tensor] = {id(t): t for t in model.parameters()}
    tensors |= {id(b): b for name, b in model.named_buffers() if name.endswith("sketch")}
    return sum(t.numel() * t.element_size() for t in tensors.values())
