"""Layers that stay dense, fitted like the others to what is wanted of the inputs they get.

``W + α W G H⁻¹ + β E[s xᵀ] H⁻¹`` (:mod:`ss1_compile.projection.target`): no structure is in the
way, so a dense layer behind a compressed prefix makes up for more of its errors than any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.compression.layers import Layer
from ss1_compile.config import SS1Config
from ss1_compile.experts import ExpertLinear
from ss1_compile.projection.fitting import DAMPING
from ss1_compile.projection.target import Target


def refitted_layers(
    layers: Iterable[Layer], config: SS1Config, stand_ins: Sequence[nn.Module]
) -> list[Layer]:
    """Those that ``config`` wants refitted and that are modules of the model's own."""
    inside = {id(module) for member in stand_ins for module in member.modules()}
    return [
        layer
        for layer in layers
        if layer.by_choice
        and not isinstance(layer.module, ExpertLinear)
        and id(layer.module) not in inside
        and any(config.refits(name) for name in layer.names)
    ]


def refit(layer: Layer, statistics: InputStatistics | None, config: SS1Config) -> None:
    """Fill in ``replacement`` and ``reason``, if the inputs of the layer have drifted.

    α and β are those with the least error on held-out rows, one after the other; without such rows
    both are the asymmetry (½ if that is open).

    Args:
        layer: a dense one.
        statistics: of its inputs.
        config: says how.

    Raises:
        ProjectionError: the statistics are singular after damping.
    """
    if statistics is None:
        return
    damping = DAMPING if config.damping == "auto" else config.damping
    with torch.no_grad(), torch.autocast(layer.weight.device.type, enabled=False):
        w, centred = layer.matrices.detach().double(), layer.bias is not None
        target = Target.of(statistics, centred, w.device)
        steps = _steps(w, target, damping, layer.name)
        if steps[0] is None:
            return
        parts = _parts(w, statistics, centred, damping, config.asymmetry, layer.name)
        error = torch.zeros_like(w)
        for part, step in zip(parts, steps, strict=True):
            error -= 0 if step is None else part * step
        module = copy.deepcopy(layer.module)
        weight = (w - error).to(layer.weight.dtype)
        weight = weight.t().contiguous() if layer.is_transposed else weight
        module.weight = nn.Parameter(weight, layer.weight.requires_grad)
        shift = target.shift(w, error)
        if layer.bias is not None and shift is not None:
            shift += 0 if target.shortfall is None else target.shortfall.mean
            bias = (layer.bias.double() + shift).to(layer.bias.dtype)
            module.bias = nn.Parameter(bias, layer.bias.requires_grad)
    layer.replacement = module
    layer.reason = f"{layer.reason}, and refitted"
    layer.row = replace(layer.row_as_it_is(), reason=layer.reason)


def _parts(
    w: Tensor,
    statistics: InputStatistics,
    centred: bool,
    damping: float,
    asymmetry: float | Literal["auto"],
    name: str,
) -> list[float]:
    """α and β."""
    parts = [0.5, 0.5] if asymmetry == "auto" else [asymmetry, asymmetry]
    if statistics.held_out is None:
        return parts
    unseen = Target.of(statistics.held_out, centred, w.device)
    target = Target.of(statistics.without_held_out(), centred, w.device)
    error = torch.zeros_like(w)
    for i, step in enumerate(_steps(w, target, damping, name)):
        if step is None:
            continue
        slope, curvature = unseen.along(w, error, step)
        if i == 1 and unseen.shortfall is not None:
            slope = slope + 2 * (unseen.shortfall.cross_moment * step).sum()
        if i == 1 or asymmetry == "auto":
            best = float(slope / (2 * curvature)) if curvature > 0 else 0.0
            parts[i] = min(1.0, max(0.0, best))
        error -= parts[i] * step
    return parts


def _steps(
    w: Tensor, target: Target, damping: float, name: str
) -> tuple[Tensor | None, Tensor | None]:
    """``W G H⁻¹`` and ``E[s xᵀ] H⁻¹``."""
    correction = target.correction(damping, name)
    return None if correction is None else w @ correction, target.owed(damping, name)
