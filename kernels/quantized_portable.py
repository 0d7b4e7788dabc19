"""The quantised operators in plain PyTorch, for any device; where no specialised kernel exists.

Exact like the kernels: int8 products are summed as float32 in pieces of at most 1024 slots, where
every partial sum is an integer below 2²⁴, and the pieces in int32. So one matrix product of the
device's library serves both int8 and float8, and no copy of z outlives a tile of its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ss1_compile.kernels import portable
from ss1_compile.kernels.layout import block_n, is_rotation
from ss1_compile.kernels.quantize import dequantize, quantize_activations

# 127² · 1024 < 2²⁴
_EXACT_SLOTS = 1024
# Values of z that are widened at a time: 4 MiB in float32.
_TILE = 1 << 20


def sketch(
    x: Tensor, code: Tensor, reduced_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``(q [J, M, K_c], scale float32 [J, M])`` of ``x [M, K]``, summed in float32."""
    wide = code if is_rotation(code) else code.float()
    return quantize_activations(portable.sketch(x.float(), wide, reduced_features), dtype)


def row_tiles(z: Tensor, hashes: int, values: int = _TILE) -> list[tuple[int, slice]]:
    """``(j, rows)``: pieces of the column blocks, of at most so many ``values`` of z."""
    out_features, reduced = z.shape
    width, tile = block_n(out_features, hashes), max(1, values // max(1, reduced))
    return [
        (j, slice(start, min(start + tile, end)))
        for j in range(hashes)
        for end in [min((j + 1) * width, out_features)]
        for start in range(j * width, end, tile)
    ]


def product(
    q: Tensor,
    q_scale: Tensor,
    z: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``y [M, N]`` of quantised rows ``q [J, M, K_c]``, ``q_scale [J, M]``, and ``z [N, K_c]``."""
    hashes, rows, reduced = q.shape
    y = q.new_empty(rows, z.shape[0], dtype=dtype)
    integer = z.dtype == torch.int8
    wide = q.float()
    for j, tile in row_tiles(z, hashes):
        widened = z[tile].float()
        if integer and reduced > _EXACT_SLOTS:
            pieces = zip(
                wide[j].split(_EXACT_SLOTS, 1), widened.split(_EXACT_SLOTS, 1), strict=True
            )
            total = torch.stack([(a @ b.t()).to(torch.int32) for a, b in pieces]).sum(0)
            total = total.float()
        else:
            total = wide[j] @ widened.t()
        # both scales first would overflow or underflow where the result does not
        total = total * q_scale[j].unsqueeze(1) * scale[tile].t()
        y[:, tile] = (total if bias is None else total + bias[tile].float()).to(dtype)
    return y


def weight_only_product(sketched: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``y [M, N]`` of ``X̃ [J, M, K_c]`` and quantised z, a tile of its rows widened at a time."""
    hashes, rows, _ = sketched.shape
    y = sketched.new_empty(rows, z.shape[0])
    for j, tile in row_tiles(z, hashes):
        widened = dequantize(z[tile], scale[tile], sketched.dtype)
        if bias is None:
            torch.mm(sketched[j], widened.t(), out=y[:, tile])
        else:
            torch.addmm(bias[tile], sketched[j], widened.t(), out=y[:, tile])
    return y


def linear(
    x: Tensor, code: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None, dynamic: bool
) -> Tensor:
    """``y [..., N]`` of ``x [..., K]``; see :mod:`.quantized`."""
    flat = x.reshape(-1, x.shape[-1])
    if dynamic:
        q, q_scale = sketch(flat, code, z.shape[1], z.dtype)
        y = product(q, q_scale, z, scale, bias, x.dtype)
    else:
        sketched = portable.sketch(flat, code, z.shape[1])
        y = weight_only_product(sketched, z, scale, bias)
    return y.view(*x.shape[:-1], z.shape[0])
