"""CUDA implementation of the operator: the sketch, then a grouped GEMM, each chosen per shape.

Importing this module needs neither a GPU nor Triton. Nothing synchronises with the host, allocates
beyond the caching allocator or tunes when a layer runs, so CUDA graphs can capture it.
"""

from __future__ import annotations

from functools import cache, lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ss1_compile.kernels import lowering, portable
from ss1_compile.kernels.launch import device_of
from ss1_compile.kernels.layout import block_n, is_rotation

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@cache
def _triton() -> tuple[ModuleType, ModuleType, ModuleType, ModuleType] | None:
    """The Triton launchers ``(sketch, blocks, gemm, decode)``, or None where Triton is missing."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from ss1_compile.kernels import triton_blocks, triton_decode, triton_gemm, triton_sketch

    return triton_sketch, triton_blocks, triton_gemm, triton_decode


@lru_cache
def _device_name(device: torch.device) -> str:
    """The name under which :mod:`.lowering` knows the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@lru_cache
def has_tma(device: torch.device) -> bool:
    """Without TMA the Triton GEMM spills (on sm_80, to a stack of 232 bytes)."""
    return device.type != "cuda" or bool(torch.cuda.get_device_capability(device)[0] >= 9)


def _aligned(code: Tensor, reduced_features: int) -> bool:
    """Whether the rotation kernels apply: ``B_K`` a power of two of whole vectors."""
    block_k = reduced_features // code.shape[1]
    return bool(block_k >= 8 and block_k & (block_k - 1) == 0)


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether Triton is there and has kernels for the dtype."""
    return dtype in _DTYPES and _triton() is not None


def _usable(x: Tensor, code: Tensor, reduced_features: int) -> bool:
    """Whether the sketch kernels take ``x`` and ``code``; else the portable path is right."""
    fits = not is_rotation(code) or _aligned(code, reduced_features)
    return fits and has_kernels(x.dtype)


def _sketch(x: Tensor, code: Tensor, reduced_features: int, pdl: bool = False) -> Tensor:
    kernels = _triton()
    assert kernels is not None
    if not is_rotation(code):
        result: Tensor = kernels[1].sketch(x, code, pdl=pdl)
    else:
        result = kernels[0].sketch(x, code.contiguous(), reduced_features, pdl=pdl)
    return result


def sketch(x: Tensor, code: Tensor, reduced_features: int) -> Tensor:
    """``X̃ [J, M, K_c]`` of ``x [M, K]``, contiguous, in x's dtype. See :mod:`.layout`."""
    if not _usable(x, code, reduced_features):
        return portable.sketch(x, code, reduced_features)
    with device_of(x):
        return _sketch(x, code, reduced_features)


def unsketch(g: Tensor, code: Tensor, in_features: int) -> Tensor:
    """The adjoint of :func:`sketch`: ``[M, K]`` of ``g [J, M, K_c]``."""
    kernels = _triton()
    if kernels is None or not _usable(g, code, g.shape[2]):
        return portable.unsketch(g, code, in_features)
    with device_of(g):
        result: Tensor
        if is_rotation(code):
            result = kernels[0].unsketch(g, code.contiguous(), in_features)
        else:
            result = kernels[1].unsketch(g, code, in_features)
        return result


_layer = lru_cache(maxsize=4096)(lowering.Layer)
"""One object for equal layers: making and comparing them costs more than a look-up."""


def describe(
    rows: int, in_features: int, code: Tensor, z: Tensor, bias: Tensor | None
) -> lowering.Layer:
    """The key under which :mod:`.lowering` chooses, for ``x [rows, in_features]`` of z's dtype."""
    out_features, reduced = z.shape
    hashes = code.shape[0]
    tma = _suits_tma(z, block_n(out_features, hashes))
    kind = "rotation" if is_rotation(code) else "learned"
    sizes = (rows, in_features, out_features, reduced, hashes)
    return _layer(*sizes, kind, _DTYPES[z.dtype], bias is not None, tma)


def _suits_tma(z: Tensor, width: int) -> bool:
    return (
        has_tma(z.device)
        and z.dtype != torch.float32
        and z.shape[1] % 8 == 0
        and z.stride(0) % 8 == 0
        and z.data_ptr() % 16 == 0
        and width >= 32
    )


def describe_product(sketched: Tensor, z: Tensor, bias: Tensor | None) -> lowering.Layer:
    """The key for :func:`.lowering.choose_product`: ``X̃ [J, M, K_c]`` and ``z [N, K_c]``."""
    hashes, rows, reduced = sketched.shape
    out_features = z.shape[0]
    tma = _suits_tma(z, block_n(out_features, hashes)) and sketched.data_ptr() % 16 == 0
    kind = "learned" if hashes == 1 else "rotation"
    sizes = (rows, reduced, out_features, reduced, hashes)
    return _layer(*sizes, kind, _DTYPES[z.dtype], bias is not None, tma)


def expected(
    rows: int, in_features: int, code: Tensor, z: Tensor, bias: Tensor | None
) -> lowering.Choice | None:
    """What will run for ``x [rows, in_features]`` and what it should cost; None off the kernels."""
    if not z.is_cuda or not _usable(z, code, z.shape[1]):
        return None
    return lowering.expected(describe(rows, in_features, code, z, bias), _device_name(z.device))


def library_matmul(
    sketched: Tensor, z: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """``y[:, block j] = X̃[j] @ z_jᵀ + b`` through the library, straight into y's columns.

    ``[J, M, K_c] × [N, K_c] → [M, N]``. J = 1 is one ``linear``; else one ``bmm`` over the whole
    blocks and an ``mm`` for a shorter last one. The bias of J > 1 is a second pass over y.
    ``out`` may be a slice of columns.
    """
    hashes, rows, reduced = sketched.shape
    out_features = z.shape[0]
    if hashes == 1 and out is None:
        return F.linear(sketched[0], z, bias)
    width = block_n(out_features, hashes)
    whole = out_features // width
    columns = whole * width
    y = sketched.new_empty(rows, out_features) if out is None else out
    blocks = z[:columns].view(whole, width, reduced).transpose(1, 2)
    torch.bmm(sketched[:whole], blocks, out=y[:, :columns].view(rows, whole, width).transpose(0, 1))
    if columns < out_features:
        torch.mm(sketched[whole], z[columns:].t(), out=y[:, columns:])
    return y if bias is None else y.add_(bias)


def linear(x: Tensor, code: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y [..., N]``, contiguous, of ``x [..., K]``: ``y[:, block j] = X̃[j] @ z_jᵀ + b``.

    Args:
        x: float16, bfloat16 or float32 (others take the portable path), any strides.
        code: the sketch, int32 ``[J, G, c]`` or learned blocks ``[J, G, gsize, r]``.
        z: ``[N, K_c]`` of x's dtype.
        bias: ``[N]`` of x's dtype, or None.
    """
    kernels = _triton()
    if kernels is None or not _usable(x, code, z.shape[1]):
        return portable.linear(x, code, z, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], z.shape[0])
    if z.stride(1) != 1:
        z = z.contiguous()
    _, _, gemm, decode = kernels
    with device_of(x):
        layer = describe(flat.shape[0], flat.shape[1], code, z, bias)
        chosen = lowering.choose(layer, _device_name(x.device))
        y: Tensor
        if chosen == "gemv":
            y = decode.gemv(flat, code.contiguous(), z, bias)
        elif chosen == "stream":
            early = decode.dependent_launch(x.device) and decode.starts_early(z.shape[1])
            y = decode.stream(_sketch(flat, code, z.shape[1], early), z, bias)
        elif chosen == "triton":
            pdl = decode.dependent_launch(x.device)
            y = gemm.grouped_matmul(_sketch(flat, code, z.shape[1], pdl), z, bias, pdl=pdl)
        else:
            y = library_matmul(_sketch(flat, code, z.shape[1]), z, bias)
    return y if flat is x else y.view(*x.shape[:-1], z.shape[0])
