"""The CPU implementation of the operators: a C++ sketch, then the BLAS of PyTorch.

For few rows the product is C++, too (``csrc/linear.cpp``).

The sketch is bound by memory, and no composition of PyTorch operators comes near that bound: for
2048 × 3072 inputs and c = J = 4 a gather takes 93 ms, Inductor's code for it 35 ms, and the C++
loop of ``csrc/rotation.cpp`` 5 ms, where the dense layer 3072 → 768 takes 43 ms in all.

It is compiled on first use with the toolchain that ``torch.compile`` uses on the CPU, and cached on
disk where Inductor caches its own kernels. Without a compiler, or with ``SS1_COMPILE_NATIVE=0`` in
the environment, :mod:`ss1_compile.kernels.portable` gives the same results, more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import resources

import torch
from torch import Tensor

from ss1_compile.kernels import portable
from ss1_compile.kernels.layout import is_rotation

logger = logging.getLogger(__name__)

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

# Inductor switches GCC's loop vectoriser off, since it writes vector code itself. Products with ±1
# are exact, so contraction to FMA changes no result.
_FLAGS = () if sys.platform == "win32" else ("-ftree-loop-vectorize", "-ffp-contract=fast")

# Additions that are worth another thread: about 20 µs of work against some 5 µs to wake it.
_ADDITIONS_PER_THREAD = 1 << 16

# Products of few rows that are worth another thread, likewise.
_PRODUCTS_PER_THREAD = 1 << 17

# Up to so many rows, by the bytes of a value, one C++ function does the whole layer. Sketch and
# library's product, then that, with one thread, c = 4, µs (the machine was busy, the calls took
# turns): float32 768 → 768, 1 row 303 and 180, 8 rows 557 and 426; 768 → 3072, 8 rows 1126 and
# 1092, 16 rows 1232 and 1812; bfloat16 1 row 361 and 201, 16 rows 865 and 664, 1629 and 1492.
_FEW_ROWS = {2: 16, 4: 8, 8: 8}

# Rows sketched at a time by `linear`, into one buffer. Whole inputs pay for fresh pages of memory
# (2048 × 768 → 3072, c = 4: 24.6 ms against 20.8), and tiles of 128 rows for small matrix products
# (26.3 ms); 256, 512 and 1024 rows differ by less than a tenth.
_TILE_ROWS = 1024

_first_use = threading.Lock()

Kernel = Callable[..., None]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C++ kernels of the floating layers; ``None`` if they cannot be compiled."""
    return load_library("rotation.cpp", "linear.cpp")


def load_library(*names: str) -> ctypes.CDLL | None:
    """Compile (or find in the cache) and load files of ``csrc``, as one, in this order.

    ``None`` if that cannot be done, or is not wanted.
    """
    if os.environ.get("SS1_COMPILE_NATIVE", "1") == "0":
        logger.debug("SS1_COMPILE_NATIVE=0: the portable CPU kernels are used")
        return None
    folder = resources.files(__package__).joinpath("csrc")
    source = "\n".join(folder.joinpath(name).read_text("utf-8") for name in names)
    try:
        # Imported here: it takes seconds, and nothing else in this package needs it.
        from torch._inductor.codecache import CppCodeCache

        library: ctypes.CDLL = CppCodeCache.load(source, "cpu", extra_flags=_FLAGS)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().partition("\n")[0]
        logger.debug("no C++ kernels (%s): the portable CPU kernels are used", reason)
        return None
    return library


@functools.cache
def _kernel(op: str, dtype: torch.dtype) -> Kernel | None:
    """The function ``ss1_<op>_<dtype>`` of the library, or ``None`` if it has none."""
    with _first_use:
        library = _library()
    if library is None or dtype not in _NAMES:
        return None
    kernel = getattr(library, f"ss1_{op}_{_NAMES[dtype]}", None)
    if kernel is None:  # a compiler without _Float16
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    kernel.argtypes = [pointer, integer, pointer, pointer, *[integer] * 9]
    if op == "linear":
        strided = [pointer, integer]
        kernel.argtypes = [*strided, pointer, pointer, *strided, pointer, pointer, *[integer] * 8]
    kernel.restype = None
    result: Kernel = kernel
    return result


def threads_for(work: int, per_thread: int, most: int) -> int:
    """How many threads to share ``work`` among: one until it is worth two, ``most`` at most."""
    if work < 2 * per_thread:
        return 1
    return max(1, min(torch.get_num_threads(), work // per_thread, most))


def _run(kernel: Kernel, wide: Tensor, code: Tensor, sketched: Tensor) -> None:
    """Call a kernel on ``wide [M, K]`` and ``sketched [J, M, K_c]``, both with unit last stride."""
    rows, in_features = wide.shape
    num_hashes, groups, reduction = code.shape
    additions = rows * in_features * num_hashes
    kernel(
        wide.data_ptr(),
        wide.stride(0),
        code.data_ptr(),
        sketched.data_ptr(),
        sketched.stride(0),
        sketched.stride(1),
        rows,
        in_features,
        num_hashes,
        groups,
        reduction,
        sketched.shape[2] // groups,
        threads_for(additions, _ADDITIONS_PER_THREAD, rows),
    )


def _unit_last_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def sketch(x: Tensor, code: Tensor, reduced_features: int) -> Tensor:
    """``X̃ [J, M, K_c]`` of ``x [M, K]``; see :func:`ss1_compile.kernels.portable.sketch`."""
    kernel = _kernel("sketch", x.dtype) if is_rotation(code) else None
    if kernel is None:
        return portable.sketch(x, code, reduced_features)
    out = x.new_empty(code.shape[0], x.shape[0], reduced_features)
    _run(kernel, _unit_last_stride(x), code.contiguous(), out)
    return out


def unsketch(g: Tensor, code: Tensor, in_features: int) -> Tensor:
    """``[M, K]`` from ``g [J, M, K_c]``; see :func:`ss1_compile.kernels.portable.unsketch`."""
    kernel = _kernel("unsketch", g.dtype) if is_rotation(code) else None
    if kernel is None:
        return portable.unsketch(g, code, in_features)
    out = g.new_empty(g.shape[1], in_features)
    _run(kernel, out, code.contiguous(), _unit_last_stride(g))
    return out


def _few_rows(kernel: Kernel, x: Tensor, code: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`linear` in one call, for operands whose last strides are 1."""
    rows, in_features = x.shape
    hashes, groups, size = code.shape[:3]
    columns, reduced = z.shape
    y = x.new_empty(rows, columns)
    kernel(
        x.data_ptr(),
        x.stride(0),
        code.data_ptr() if is_rotation(code) else None,
        None if is_rotation(code) else code.data_ptr(),
        z.data_ptr(),
        z.stride(0),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        rows,
        in_features,
        columns,
        hashes,
        groups,
        size,
        reduced // groups,
        threads_for(rows * columns * reduced, _PRODUCTS_PER_THREAD, columns),
    )
    return y


def linear(x: Tensor, code: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    """``y [..., N]`` of ``x [..., K]``: sketch a tile of rows, then one batched product of it."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    packed = z.stride(1) == 1 and (bias is None or bias.stride(0) == 1)
    if packed and 0 < rows <= _FEW_ROWS.get(x.itemsize, 0):
        whole = _kernel("linear", x.dtype)
        if whole is not None:
            y = _few_rows(whole, _unit_last_stride(flat), code.contiguous(), z, bias)
            return y if x.dim() == 2 else y.view(*x.shape[:-1], z.shape[0])
    kernel = _kernel("sketch", x.dtype) if is_rotation(code) else None
    if kernel is None:
        return portable.linear(x, code, z, bias)
    flat, code = _unit_last_stride(flat), code.contiguous()
    y = x.new_empty(rows, z.shape[0])
    if rows <= _TILE_ROWS:
        sketched = x.new_empty(code.shape[0], rows, z.shape[1])
        _run(kernel, flat, code, sketched)
        portable.grouped_matmul(sketched, z, bias, y)
    else:
        buffer = x.new_empty(code.shape[0], _TILE_ROWS, z.shape[1])
        for x_tile, y_tile in zip(flat.split(_TILE_ROWS), y.split(_TILE_ROWS), strict=True):
            sketched = buffer[:, : x_tile.shape[0]]
            _run(kernel, x_tile, code, sketched)
            portable.grouped_matmul(sketched, z, bias, y_tile)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], z.shape[0])
