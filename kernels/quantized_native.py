"""The CPU implementation of the quantised operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ss1_compile.kernels import native, quantized_portable
from ss1_compile.kernels.layout import is_rotation
from ss1_compile.kernels.quantize import quantize_activations


def sketch(
    x: Tensor, code: Tensor, reduced_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``(q [J, M, K_c], scale float32 [J, M])`` of ``x [M, K]``; see :mod:`.quantized`."""
    wide = code if is_rotation(code) else code.float()
    return quantize_activations(native.sketch(x.float(), wide, reduced_features), dtype)


def linear(
    x: Tensor, code: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None, dynamic: bool
) -> Tensor:
    """``y [..., N]``, contiguous, of ``x [..., K]``; see :mod:`.quantized`."""
    flat = x.reshape(-1, x.shape[-1])
    if dynamic:
        q, q_scale = sketch(flat, code, z.shape[1], z.dtype)
        y = quantized_portable.product(q, q_scale, z, scale, bias, x.dtype)
    else:
        sketched = native.sketch(flat, code, z.shape[1])
        y = quantized_portable.weight_only_product(sketched, z, scale, bias)
    return y.view(*x.shape[:-1], z.shape[0])
