"""Rows that another kernel has written become int8 or float8 rows and their scales, in Triton.

    q[j, m, :] = round(X̃[j, m, :] / scale[j, m]),   scale[j, m] = max|X̃[j, m, :]| / q_max

Rows of up to 8192 slots are read once, several to a program: a program a row is bound by launching
programs (12 µs for 3 MB on one NVIDIA H200). The rules at the edges are those of :mod:`.quantize`;
the functions that keep them are shared with :mod:`.triton_quantized_sketch`.
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ss1_compile.kernels.lowering import FEW_ROWS
from ss1_compile.kernels.quantize import Q_MAX, SMALLEST_SCALE

_WIDEST = 8192
_VALUES = 4096
_SMALLEST = tl.constexpr(SMALLEST_SCALE)
_ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def larger(a, b):
    """The larger one; NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_scale(amax, QMAX: tl.constexpr):
    """The scale for the largest magnitude of a row."""
    scale = amax * (1.0 / QMAX)
    scale = tl.where(scale < _SMALLEST, 1.0, scale)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def inverse_scale(scale):
    """What :func:`narrow` multiplies with; 0 for a row that is not finite."""
    return tl.where(scale == scale, 1.0 / scale, 0.0)


@triton.jit
def narrow(v, inverse, INTEGER: tl.constexpr, TO: tl.constexpr):
    """Divide v by its scale, into the quantised type; 0 where the inverse scale is.

    Nothing to clamp: the largest value of a row becomes q_max but for rounding. Every instruction
    here is one per value of the sketch.
    """
    if INTEGER:
        # 1.5·2²³ + r is rounded to an integer, ties to even, which its last byte holds
        bits = (v * inverse + _ROUNDING).to(tl.int32, bitcast=True)
        return tl.where(inverse > 0.0, bits, 0).to(tl.int8)
    return tl.where(inverse > 0.0, v * inverse, 0.0).to(TO)


@triton.jit(do_not_specialize=["TOTAL"])
def _rows_kernel(
    rows, q, scale, TOTAL, K_c,
    R: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, QMAX: tl.constexpr,
    INTEGER: tl.constexpr, CHAINED: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """R rows of ``[TOTAL, K_c]`` a program, in CHUNKS pieces; more than one are read twice."""
    if CHAINED:
        # launched while the sketch drains; the rows are complete after the wait
        tl.extra.cuda.gdc_wait()
    if PDL and EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0).to(tl.int64) * R
    mine = tl.arange(0, R)
    inside = mine < TOTAL - first
    rows += first * K_c
    q += first * K_c
    k = tl.arange(0, BLOCK)
    best = tl.zeros((R, BLOCK), tl.float32)
    v = best
    for chunk in range(CHUNKS):
        slot = chunk * BLOCK + k
        mask = inside[:, None] & (slot < K_c)[None, :]
        v = tl.load(rows + mine[:, None] * K_c + slot[None, :], mask=mask, other=0.0)
        v = v.to(tl.float32)
        best = larger(best, tl.abs(v))
    s = row_scale(tl.reduce(best, 1, larger), QMAX)
    tl.store(scale + first + mine, s, mask=inside)
    inverse = inverse_scale(s)[:, None]
    for chunk in range(CHUNKS):
        slot = chunk * BLOCK + k
        mask = inside[:, None] & (slot < K_c)[None, :]
        at = mine[:, None] * K_c + slot[None, :]
        if CHUNKS > 1:
            v = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)
        r = narrow(v, inverse, INTEGER, q.dtype.element_ty)
        tl.store(q + at, r, mask=mask)
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()


def starts_early(rows: int) -> bool:
    """Whether a dependent kernel may be launched when a sketch begins, and not when it ends.

    The decode kernels use the time to fetch z. The product of many rows has two programs a
    multiprocessor; launched while these still hold the sketch, it seems to get them with room for
    one, and to keep them so: 8192 x 14336 -> 4096, rotation, c = 2, took 589 µs, 504 without
    dependent launch (one NVIDIA H200).
    """
    return rows <= FEW_ROWS


def outputs(x: Tensor, hashes: int, reduced: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for ``q [J, M, K_c]`` and ``scale float32 [J, M]``, on the device of ``x [M, …]``."""
    shape = (hashes, x.shape[0])
    q = x.new_empty((*shape, reduced), dtype=dtype)
    return q, x.new_empty(shape, dtype=torch.float32)


def quantize_rows(
    rows: Tensor, dtype: torch.dtype, *, pdl: bool = False, chained: bool = False
) -> tuple[Tensor, Tensor]:
    """``(q, scale)`` of contiguous ``rows [J, M, K_c]``.

    Args:
        rows: float16, bfloat16 or float32.
        dtype: int8 or float8_e4m3fn.
        pdl: let a kernel launched with programmatic dependent launch begin before the end (sm_90).
        chained: launch as dependent of the previous kernel, which must have written ``rows``.
    """
    hashes, count, reduced = rows.shape
    q, scale = outputs(rows[0], hashes, reduced, dtype)
    if q.numel():
        block = min(_WIDEST, triton.next_power_of_2(reduced))
        total = hashes * count
        several = max(1, _VALUES // block) if total >= 4096 else 1
        dependent: dict[str, Any] = {"launch_pdl": True} if chained else {}
        _rows_kernel[(triton.cdiv(total, several),)](
            *(rows, q, scale, total, reduced),
            R=several,
            BLOCK=block,
            CHUNKS=triton.cdiv(reduced, block),
            QMAX=Q_MAX[dtype],
            INTEGER=dtype == torch.int8,
            CHAINED=chained,
            PDL=pdl,
            EARLY=starts_early(count),
            num_warps=8 if block > _VALUES else 4,
            **dependent,
        )
    return q, scale
