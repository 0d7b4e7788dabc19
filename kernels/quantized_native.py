"""The CPU implementation of the quantised operators: C++ kernels, then plain PyTorch.

Measured on a Xeon with AVX-512 and no VNNI (one thread of a busy machine, least of many calls, µs;
z of 3072 × 192 and 4096 × 512, the matrix product alone): no library that PyTorch has computes
these products. ``onednn::qlinear_pointwise`` takes signed rows in its reference kernel (37 000 and
220 000 for *one* row) and unsigned ones with sums that saturate; ``torch._int_mm`` runs a reference
kernel too (30 000 and 35 000 for 16 rows); FBGEMM's ``quantized::linear_dynamic`` has one scale for
all rows of x and seven bits. ``aten::_weight_int8pack_mm`` has no groups, and in float32 takes
1 300 and 4 500 for one row, where the float layer takes 500 and 1 300. Hence
``csrc/quantized.cpp``, which reads z as it lies: nothing is packed ahead, and no copy of z outlives
a tile.
"""

from __future__ import annotations

import ctypes
import functools
import threading

import torch
from torch import Tensor

from ss1_compile.kernels import native, quantized_portable
from ss1_compile.kernels.layout import is_rotation
from ss1_compile.kernels.quantize import quantize_activations

_first_use = threading.Lock()

# Rows from which weight-only layers widen z, tile by tile, for the library's matrix product.
_FEW_ROWS = 16

# Values of z that are widened at a time: 1 MiB in float32, which stays in the second-level cache.
_WIDENED = 1 << 18

# int16 pairs that are worth another thread: about 20 µs of work against some 5 µs to wake it.
_PRODUCTS_PER_THREAD = 1 << 18

_INTEGERS = {  # functions of the library and the number of integers that end their arguments
    "sketch_quantized_float32": ("pippp", 8),
    "sketch_quantized_bfloat16": ("pippp", 8),
    "sketch_quantized_float16": ("pippp", 8),
    "product_int8": ("pppippp", 5),
    "weight_only_int8": ("ppippp", 6),
    "dequantize_int8": ("pipp", 4),
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    return native.load_library("rotation.cpp", "quantized.cpp")


@functools.cache
def _kernel(name: str) -> native.Kernel | None:
    """The function ``ss1_<name>``, or ``None`` where there is no compiler, or none of that type."""
    with _first_use:
        library = _library()
    found = getattr(library, f"ss1_{name}", None)
    if library is None or found is None:
        return None
    kinds, integers = _INTEGERS[name]
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
    found.argtypes = [*(types[kind] for kind in kinds), *[ctypes.c_int64] * integers]
    found.restype = None
    kernel: native.Kernel = found
    return kernel


def _threads(products: int, most: int) -> int:
    return native.threads_for(products, _PRODUCTS_PER_THREAD, most)


def _sketch(
    x: Tensor, code: Tensor, reduced_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """:func:`sketch`, with int8 values also as ``torch.int16``."""
    kernel = None
    if is_rotation(code) and dtype != torch.float8_e4m3fn:
        kernel = _kernel(f"sketch_quantized_{str(x.dtype).removeprefix('torch.')}")
    if kernel is None:
        wide = code if is_rotation(code) else code.float()
        stored = torch.int8 if dtype == torch.int16 else dtype
        sketched = native.sketch(x.float(), wide, reduced_features)
        q, scale = quantize_activations(sketched, stored)
        return q.to(dtype), scale
    rows, in_features = x.shape
    hashes, groups, reduction = code.shape
    x, code = native._unit_last_stride(x), code.contiguous()
    q = x.new_empty(hashes, rows, reduced_features, dtype=dtype)
    scale = x.new_empty(hashes, rows, dtype=torch.float32)
    kernel(
        x.data_ptr(),
        x.stride(0),
        code.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        rows,
        in_features,
        hashes,
        groups,
        reduction,
        reduced_features // groups,
        _threads(4 * rows * in_features * hashes, rows),
        int(dtype == torch.int16),
    )
    return q, scale


def sketch(
    x: Tensor, code: Tensor, reduced_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``(q [J, M, K_c], scale float32 [J, M])`` of ``x [M, K]``; see :mod:`.quantized`."""
    return _sketch(x, code, reduced_features, dtype)


def linear(
    x: Tensor, code: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None, dynamic: bool
) -> Tensor:
    """``y [..., N]``, contiguous, of ``x [..., K]``; see :mod:`.quantized`."""
    flat = x.reshape(-1, x.shape[-1])
    if dynamic:
        y = _dynamic(flat, code, z, scale, bias)
    else:
        y = _weight_only(native.sketch(flat, code, z.shape[1]), z, scale, bias)
    return y.view(*x.shape[:-1], z.shape[0])


def _dynamic(x: Tensor, code: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``y [M, N]`` of ``x [M, K]``."""
    kernel = _kernel("product_int8") if z.dtype == torch.int8 else None
    if kernel is None:
        q, q_scale = _sketch(x, code, z.shape[1], z.dtype)
        return quantized_portable.product(q, q_scale, z, scale, bias, x.dtype)
    q, q_scale = _sketch(x, code, z.shape[1], torch.int16)
    hashes, rows, reduced = q.shape
    z = native._unit_last_stride(z)
    wide = None if bias is None else bias.float().contiguous()
    scale = scale.contiguous()
    y = x.new_empty(rows, z.shape[0], dtype=torch.float32)
    kernel(
        q.data_ptr(),
        q_scale.data_ptr(),
        z.data_ptr(),
        z.stride(0),
        scale.data_ptr(),
        None if wide is None else wide.data_ptr(),
        y.data_ptr(),
        hashes,
        rows,
        reduced,
        z.shape[0],
        _threads(rows * z.numel(), z.shape[0]),
    )
    return y.to(x.dtype)


def _weight_only(sketched: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``y [M, N]`` of ``X̃ [J, M, K_c]``."""
    hashes, rows, reduced = sketched.shape
    kernel = None
    if z.dtype == torch.int8 and rows < _FEW_ROWS:
        kernel = _kernel("weight_only_int8")
    elif z.dtype == torch.int8 and sketched.dtype == torch.float32:
        kernel = _kernel("dequantize_int8")
    if kernel is None:
        return quantized_portable.weight_only_product(sketched, z, scale, bias)
    if rows >= _FEW_ROWS:
        return _widened_product(kernel, sketched, native._unit_last_stride(z), scale, bias)
    x, z, scale = sketched.float().contiguous(), native._unit_last_stride(z), scale.contiguous()
    wide = None if bias is None else bias.float().contiguous()
    y = x.new_empty(rows, z.shape[0])
    kernel(
        x.data_ptr(),
        z.data_ptr(),
        z.stride(0),
        scale.data_ptr(),
        None if wide is None else wide.data_ptr(),
        y.data_ptr(),
        hashes,
        rows,
        reduced,
        z.shape[0],
        scale.shape[1],
        _threads(rows * z.numel(), z.shape[0]),
    )
    return y.to(sketched.dtype)


def _widened_product(
    dequantize: native.Kernel, sketched: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """``y [M, N]`` by the library's float32 product of ``X̃ [J, M, K_c]`` and tiles of z."""
    hashes, rows, reduced = sketched.shape
    scale = scale.contiguous()
    y = sketched.new_empty(rows, z.shape[0])
    tiles = quantized_portable.row_tiles(z, hashes, _WIDENED)
    wide = sketched.new_empty(max((t.stop - t.start for _, t in tiles), default=0), reduced)
    for j, tile in tiles:
        count = tile.stop - tile.start
        dequantize(
            z[tile].data_ptr(),
            z.stride(0),
            scale[tile].data_ptr(),
            wide.data_ptr(),
            count,
            reduced,
            scale.shape[1],
            _threads(count * reduced * 4, count),
        )
        if bias is None:
            torch.mm(sketched[j], wide[:count].t(), out=y[:, tile])
        else:
            torch.addmm(bias[tile], sketched[j], wide[:count].t(), out=y[:, tile])
    return y
