"""Symmetric quantisation of rows: ``v ≈ scale · q`` with int8 or float8 (e4m3) ``q``.

For a row, or a group of neighbouring values in it, ``scale = max|v| / q_max`` (127 or 448) and
``q = round(v / scale)``, to nearest with ties to even. int8 never takes -128, so that ``-q`` always
exists. The rules at the edges, the same for weights and, in every kernel, for activations:

* a row whose scale would be below the smallest normal float32, above all one of zeros, has scale 1
  and so q = 0;
* int8 saturates at ±127 and float8 at ±448;
* a row with a NaN or an infinity cannot be represented. :func:`quantize_rows`, for weights, raises;
  the activation kernels give it q = 0 and scale NaN, so that the layer's output row is NaN.

float8 products are exact in float32, int8 products are summed exactly in int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ss1_compile.errors import QuantizationError

Q_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest magnitude of each quantised dtype."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def row_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales float32 for the largest magnitudes ``amax``; NaN where ``amax`` is not finite."""
    scale = amax.float() / Q_MAX[dtype]
    scale = torch.where(scale < SMALLEST_SCALE, 1.0, scale)
    return torch.where(scale < torch.inf, scale, torch.nan)


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values``, already divided by their scale, as int8 or float8; a NaN becomes 0."""
    limit = Q_MAX[dtype]
    clamped = values.clamp(-limit, limit).nan_to_num(nan=0.0)
    return (clamped.round() if dtype == torch.int8 else clamped).to(dtype)


def quantize_activations(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(q [..., K_c], scale float32 [...])`` of ``rows [..., K_c]``, one scale per row.

    A row with a NaN or an infinity gets ``q = 0`` and ``scale = NaN``.
    """
    values = rows.float()
    amax = values.abs().amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
    scale = row_scale(amax, dtype)
    return round_to(values / scale.unsqueeze(-1), dtype), scale


def quantize_rows(
    z: Tensor, groups: int = 1, dtype: torch.dtype = torch.int8, *, name: str = "z"
) -> tuple[Tensor, Tensor]:
    """Quantise ``z [N, K_c]`` with one scale per row and group of ``K_c / groups`` slots.

    Args:
        z: ``[N, K_c]``, any floating dtype, finite.
        groups: divides ``K_c``.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
        name: of the layer, for messages.

    Returns:
        ``(q [N, K_c]`` of ``dtype``, ``scale float32 [N, groups])``; ``|z - scale·q|`` is at most
        half a step, ``scale / 2``, for int8.

    Raises:
        QuantizationError: z is not a finite floating matrix, ``groups`` does not divide ``K_c``, or
            the dtype is neither.
    """
    check_groups(z, groups, dtype, name)
    values = z.detach().float().reshape(z.shape[0], groups, z.shape[1] // groups)
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        at = (~torch.isfinite(z)).nonzero()
        where = f"[{at[0, 0]}, {at[0, 1]}] is {z[at[0, 0], at[0, 1]].item()}" if len(at) else ""
        raise QuantizationError(
            f"{name}: z{where or ' leaves the range of float32'}; repair the checkpoint or exclude "
            f"the layer from quantisation"
        )
    amax = values.abs().amax(-1) if values.numel() else values.new_zeros(z.shape[0], groups)
    scale = row_scale(amax, dtype)
    return round_to(values / scale.unsqueeze(-1), dtype).reshape(z.shape), scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``scale · q`` in ``dtype``: ``[N, K_c]`` from ``q [N, K_c]`` and ``scale [N, groups]``."""
    groups = scale.shape[1]
    grouped = q.float().reshape(q.shape[0], groups, q.shape[1] // groups)
    return (grouped * scale.unsqueeze(-1)).reshape(q.shape).to(dtype)


def check_groups(z: Tensor, groups: int, dtype: torch.dtype, name: str) -> None:
    """Raise :class:`QuantizationError` unless z can be cut into ``groups`` and become ``dtype``."""
    if dtype not in Q_MAX:
        raise QuantizationError(
            f"{name}: cannot quantise to {dtype}; choose torch.int8 or torch.float8_e4m3fn"
        )
    if z.dim() != 2 or not z.is_floating_point():
        raise QuantizationError(
            f"{name}: z must be floating [N, K_c], got {z.dtype} {list(z.shape)}"
        )
    if groups < 1 or z.shape[1] % groups:
        raise QuantizationError(
            f"{name}: {groups} groups do not divide K_c = {z.shape[1]}; choose a divisor, or 1 for "
            f"one scale per row"
        )
