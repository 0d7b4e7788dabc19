"""CUDA implementation of the quantised operators; the choices are measured on an NVIDIA H200.

Like :mod:`.cuda`: no GPU or Triton needed to import it, no host synchronisation, no tuning when a
layer runs. float8 needs sm_89.
"""

from __future__ import annotations

from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from ss1_compile.kernels import cuda, quantized_portable
from ss1_compile.kernels.layout import is_rotation
from ss1_compile.kernels.lowering import FEW_ROWS

_GEMV_VALUES = 1 << 22


@cache
def _triton() -> tuple[ModuleType, ModuleType, ModuleType] | None:
    """The Triton launchers ``(sketch, decode, gemm)``, or None where Triton is missing."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from ss1_compile.kernels import (
        triton_quantized_decode,
        triton_quantized_gemm,
        triton_quantized_sketch,
    )

    return triton_quantized_sketch, triton_quantized_decode, triton_quantized_gemm


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def has_dtype(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether layers with z of ``dtype`` run on ``device``; float8 needs sm_89 where it is CUDA."""
    return dtype != torch.float8_e4m3fn or _capability(device) >= (8, 9)


def _check_float8(dtype: torch.dtype, device: torch.device) -> None:
    if not has_dtype(dtype, device):
        capability = _capability(device)
        raise RuntimeError(
            f"ss1: float8 needs compute capability 8.9 or later, {device} has "
            f"{capability[0]}.{capability[1]}; use int8"
        )


def _sketch(
    x: Tensor, code: Tensor, reduced_features: int, dtype: torch.dtype, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    kernels = _triton()
    result: tuple[Tensor, Tensor]
    if kernels is None or not cuda._usable(x, code, reduced_features):
        return quantized_portable.sketch(x, code, reduced_features, dtype)
    if is_rotation(code):
        result = kernels[0].rotation(x, code.contiguous(), reduced_features, dtype, pdl=pdl)
    else:
        result = kernels[0].learned(x, code, dtype, pdl=pdl)
    return result


def sketch(
    x: Tensor, code: Tensor, reduced_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``(q [J, M, K_c], scale float32 [J, M])`` of ``x [M, K]``; see :mod:`.quantized`."""
    _check_float8(dtype, x.device)
    with torch.cuda.device_of(x):
        return _sketch(x, code, reduced_features, dtype)


def choose(rows: int, code: Tensor, z: Tensor, dynamic: bool) -> str:
    """The lowering of a layer: ``gemv``, ``stream``, ``widened`` or ``triton``.

    ``gemv`` is bound by sketching x in every program and pays for small z only (one row, c = 8, in
    µs against ``stream``: 4096 -> 4096 4.2 and 5.3, 4096 -> 14336 10.8 and 7.3).
    ``widened`` (weight-only, many rows) makes a transient copy of z in x's dtype, one memory-bound
    pass, and runs the layer of :mod:`.cuda`.
    """
    if rows <= FEW_ROWS:
        single = rows == 1 and is_rotation(code) and not dynamic
        return "gemv" if single and z.numel() <= _GEMV_VALUES else "stream"
    if not dynamic:
        return "widened"
    kernels = _triton()
    assert kernels is not None
    tma = _capability(z.device) >= (9, 0)
    return "triton" if tma and kernels[2].supported(z, code.shape[0]) else "stream"


def linear(
    x: Tensor, code: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None, dynamic: bool
) -> Tensor:
    """``y [..., N]``, contiguous, of ``x [..., K]``; see :mod:`.quantized`."""
    _check_float8(z.dtype, z.device)
    kernels = _triton()
    with torch.cuda.device_of(x):
        if kernels is None or not cuda._usable(x, code, z.shape[1]):
            return quantized_portable.linear(x, code, z, scale, bias, dynamic)
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] == 0:
            return x.new_empty(*x.shape[:-1], z.shape[0])
        if z.stride(1) != 1:
            z = z.contiguous()
        chosen = choose(flat.shape[0], code, z, dynamic)
        y = run(chosen, flat, code, z, scale.contiguous(), bias, dynamic)
    return y.view(*x.shape[:-1], z.shape[0])


def run(
    chosen: str,
    x: Tensor,
    code: Tensor,
    z: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dynamic: bool,
) -> Tensor:
    """``y [M, N]`` of ``x [M, K]``, M >= 1, by the lowering ``chosen``; see :func:`choose`."""
    kernels = _triton()
    assert kernels is not None
    _, decode, gemm = kernels
    reduced = z.shape[1]
    y: Tensor
    if chosen == "gemv":
        y = decode.gemv(x, code.contiguous(), z, scale, bias)
        return y
    if chosen == "widened":
        return cuda.linear(x, code, gemm.widen(z, scale, x.dtype), bias)
    chained = decode.dependent_launch(x.device)
    pdl = chained and (chosen == "triton" or (chosen == "stream" and decode.starts_early(reduced)))
    q_scale: Tensor | None = None
    if dynamic:
        sketched, q_scale = _sketch(x, code, reduced, z.dtype, pdl)
    else:
        sketched = cuda._sketch(x, code, reduced, pdl)
    if chosen == "stream":
        y = decode.stream(sketched, q_scale, z, scale, bias, x.dtype)
        return y
    assert q_scale is not None
    if chosen == "triton":
        y = gemm.grouped_matmul(sketched, q_scale, z, scale, bias, x.dtype, pdl=pdl)
    else:  # measured, not chosen: float8, one column block
        y = torch._scaled_mm(
            sketched[0],
            z.t(),
            scale_a=q_scale[0].unsqueeze(1),
            scale_b=scale.t(),
            bias=bias,
            out_dtype=x.dtype,
        )
    return y
