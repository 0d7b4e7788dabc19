"""``sensitivity``: what SS1, quantisation and both cost, layer by layer, on real inputs."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ss1_compile.calibration.observer import Forward, Quietly, attention_mask, run_batch
from ss1_compile.calibration.statistics import Statistics, calibrate
from ss1_compile.compression.compress import compress
from ss1_compile.config import SS1Config
from ss1_compile.errors import CalibrationError, ConfigError
from ss1_compile.modules import SS1Linear
from ss1_compile.report import render


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer fed the dense model's inputs, with quantised activations where they are.

    The errors are relative: ``sqrt(E‖Δy‖² / E‖y - E[y]‖²)`` over the rows of all batches, not
    centred where the layer has no bias.

    Attributes:
        name: qualified name.
        shape: ``(N, K)`` of the dense weight.
        reduction: c.
        quantization: as in :class:`ss1_compile.SS1Config`.
        sketch: error of SS1 alone.
        quantized: error of quantisation alone, of the dense weight (SS1 at c = 1).
        both: error of SS1 with z quantised.
    """

    name: str
    shape: tuple[int, int]
    reduction: float
    quantization: str
    sketch: float
    quantized: float
    both: float

    @property
    def added(self) -> float:
        """What quantisation adds to the error of SS1; negative where the two make up."""
        return self.both - self.sketch


@dataclass
class Sensitivity:
    """A row per quantised layer, in model order. ``print(sensitivity)`` shows the table."""

    layers: list[LayerSensitivity] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The rows as plain JSON values."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> Table:
        table = Table(title="relative output error", title_justify="left")
        for name in ("layer", "weight", "c", "quantization", "SS1", "quantised", "both", "added"):
            left = name in ("layer", "quantization")
            table.add_column(name, justify="left" if left else "right", overflow="fold")
        for row in self.layers:
            errors = (f"{e:.4f}" for e in (row.sketch, row.quantized, row.both))
            shape = "×".join(map(str, row.shape))
            c = f"{row.reduction:.3g}"
            table.add_row(row.name, shape, c, row.quantization, *errors, f"{row.added:+.4f}")
        return table

    def __str__(self) -> str:
        return render(self)


class _Sums:
    """Running sums over the rows of one layer's outputs, float64 on their device."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.squared = 0.0
        self.lost = dict.fromkeys(("sketch", "quantized", "both"), 0.0)

    def add(self, y: Tensor, others: Mapping[str, Tensor]) -> None:
        exact = y.reshape(-1, y.shape[-1]).double()
        self.count += exact.shape[0]
        self.total = exact.sum(0) if self.total is None else self.total + exact.sum(0)
        self.squared += exact.square().sum().item()
        for kind, other in others.items():
            self.lost[kind] += (other.reshape(exact.shape).double() - exact).square().sum().item()

    def errors(self, centred: bool) -> dict[str, float]:
        energy = self.squared
        if centred and self.total is not None:
            energy -= self.total.square().sum().item() / self.count
        if energy <= 0:
            return {kind: math.nan if lost else 0.0 for kind, lost in self.lost.items()}
        return {kind: math.sqrt(lost / energy) for kind, lost in self.lost.items()}


def sensitivity(
    model: nn.Module,
    calibration: Iterable[Any] | Statistics,
    config: SS1Config | None = None,
    *,
    inputs: Iterable[Any] | None = None,
    forward: Forward | None = None,
    **options: Any,
) -> Sensitivity:
    """Measure SS1 alone, quantisation alone and both, for every layer that would be quantised.

    Every layer is fed the inputs that it has in the dense model, so that its errors are its own.
    Memory: the model twice over, and of each layer the dense weight and three compressed forms.

    Args:
        model: dense; not changed.
        calibration: as in :func:`ss1_compile.compress`, to project with (and to round with
            ``rounding="calibrated"``).
        config: what would be compressed and how; or pass the fields as keywords. ``max_error``
            plays no part.
        inputs: batches to measure on; ``None`` means those of ``calibration``. Rows that an
            ``"attention_mask"`` leaves out are not counted.
        forward: ``forward(model, batch)`` in place of calling the model.
        **options: fields of :class:`SS1Config`, in place of ``config``.

    Raises:
        ConfigError: bad options, or nothing is quantised.
        CalibrationError: there are no batches to measure on, or they reach no such layer.
        SS1Error: as :func:`ss1_compile.compress`.
    """
    if config is not None and options:
        raise ConfigError(f"pass either config or options, not both ({', '.join(options)})")
    config = config or SS1Config.from_dict(options)
    if not config.quantizations:
        raise ConfigError(
            "sensitivity compares quantised layers with unquantised ones; choose a quantization"
        )
    batches = None if inputs is None else list(inputs)
    if not isinstance(calibration, Statistics):
        given = list(calibration)
        batches = given if batches is None else batches
        calibration = calibrate(copy.deepcopy(model), given, forward=forward, progress=False)
    if not batches:
        raise CalibrationError("there are no batches to measure on; pass inputs=...")
    reference, exact = _layers(model, _lossless(_plain(config)), calibration)
    variants = {
        "sketch": _layers(model, _plain(config), calibration)[1],
        "quantized": _layers(model, _lossless(config), calibration)[1],
        "both": _layers(model, config, calibration)[1],
    }
    names = [
        name
        for name, layer in variants["both"].items()
        if layer.scale is not None and all(name in found for found in (exact, *variants.values()))
    ]
    sums = {name: _Sums() for name in names}
    mask: Tensor | None = None

    def measure(name: str) -> Callable[..., None]:
        layers = {kind: found[name] for kind, found in variants.items()}

        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            x: Tensor = args[0]
            if mask is not None and x.dim() > 2 and x.shape[:2] == mask.shape:
                x, y = x[mask], y[mask]
            sums[name].add(y, {kind: layer(x) for kind, layer in layers.items()})

        return hook

    handles = [exact[name].register_forward_hook(measure(name)) for name in names]
    try:
        with Quietly(reference):
            for batch in batches:
                mask = attention_mask(batch)
                run_batch(reference, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    rows = [_row(name, variants["both"][name], sums[name]) for name in names if sums[name].count]
    if not rows:
        raise CalibrationError("the batches reach no layer that would be quantised")
    return Sensitivity(rows)


def _row(name: str, layer: SS1Linear, sums: _Sums) -> LayerSensitivity:
    assert layer.quantization is not None
    return LayerSensitivity(
        name=name,
        shape=(layer.out_features, layer.in_features),
        reduction=layer.reduction,
        quantization=layer.quantization,
        **sums.errors(layer.bias is not None),
    )


def _layers(
    model: nn.Module, config: SS1Config, statistics: Statistics
) -> tuple[nn.Module, dict[str, SS1Linear]]:
    """A compressed copy and its SS1 layers, in eval mode."""
    made = copy.deepcopy(model)
    config = replace(config, max_error=None, warn_error=sys.float_info.max, allow_empty=True)
    with torch.no_grad():
        compress(made, config, statistics, progress=False)
    made.eval()
    return made, {n: m for n, m in made.named_modules() if isinstance(m, SS1Linear)}


def _plain(config: SS1Config) -> SS1Config:
    """The same compression without quantisation."""
    overrides: dict[str, Any] = {
        pattern: override.get("reduction", config.reduction)
        if isinstance(override, Mapping)
        else override
        for pattern, override in config.overrides.items()
    }
    return replace(
        config,
        overrides=overrides,
        quantization=None,
        quantization_group_size=None,
        rounding="nearest",
    )


def _lossless(config: SS1Config) -> SS1Config:
    """The same layers at c = 1, where SS1 loses nothing."""
    overrides: dict[str, Any] = {}
    for pattern, override in config.overrides.items():
        if isinstance(override, Mapping):
            dense = override.get("reduction", config.reduction) is None
            overrides[pattern] = None if dense else {**override, "reduction": 1}
        else:
            overrides[pattern] = None if override is None else 1
    return replace(config, reduction=1, overrides=overrides)
