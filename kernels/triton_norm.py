"""Norm fused into the sketch: ``X̃`` of ``LayerNorm(x + residual)`` or ``RMSNorm(x + residual)``.

    n[m, k] = (s[m, k] - mean_m) · rstd_m · w[k] + b[k],   s = x + residual,   X̃ = sketch(n)

Without fusion x is read, n written, n read and X̃ written. Three ways:

* ``one_kernel`` of :mod:`.triton_norm_rotation`: statistics and sketch of whole rows.
* ``statistics_first``: one kernel reads the rows, writes mean and 1/deviation (and s), the sketch's
  own kernel normalises what it loads.
* ``rows_first``: n is written by a kernel of whole rows, then sketched.

Microseconds on one NVIDIA H200, bf16, LayerNorm, c = 4; the last column is Inductor's norm with the
sketch kernel. In brackets with a residual to add, where s is written too. A learned ``one_kernel``
never won and was dropped:

=====================  ==========  ================  ==========  ===========
M x K, kind            one_kernel  statistics_first  rows_first  not fused
=====================  ==========  ================  ==========  ===========
16384 x 1024 rotation   44 (51)     41 (55)           39 (55)     46 (52)
16384 x 1024 learned    39 (92)     46 (62)           32 (49)     42 (48)
8192 x 4096 rotation    85 (166)    65 (96)           74 (105)    87 (106)
8192 x 4096 learned    109 (220)    85 (118)          63 (95)     77 (96)
64 x 4096 rotation      7 (7)       10 (10)           10 (9)      16
64 x 4096 learned      16 (24)      12 (12)           11 (10)     15
=====================  ==========  ================  ==========  ===========
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ss1_compile.kernels import triton_blocks, triton_norm_rotation, triton_sketch
from ss1_compile.kernels.launch import Launch, ceil_div, power_of_2
from ss1_compile.kernels.layout import is_rotation
from ss1_compile.kernels.triton_norm_rotation import affine, load_sum

_SHORT_ROW = 2048
MAX_FEATURES = 65536
"""Longest row of the statistics kernel: 128 values a thread."""


@triton.jit(do_not_specialize=["M"])
def _statistics_kernel(
    x, residual, weight, bias, summed, normed, statistics, M, K, s_xm, s_rm, eps,
    BM: tl.constexpr, WIDTH: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """BM rows: s and n where wanted, or mean and 1/deviation ``[2, M]`` where n is not."""
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k = tl.arange(0, WIDTH)
    mask = (rm < M)[:, None] & (k < K)[None, :]
    at = (rm * K)[:, None] + k[None, :]
    v = load_sum(
        x, residual, (rm * s_xm)[:, None] + k[None, :], (rm * s_rm)[:, None] + k[None, :], mask
    )
    if summed is not None:
        tl.store(summed + at, v.to(x.dtype.element_ty), mask=mask)
    if not RMS:
        mean = tl.sum(v, axis=1) / K
        v = tl.where(mask, v - mean[:, None], 0.0)
        if normed is None:
            tl.store(statistics + rm, mean, mask=rm < M)
    rstd = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) / K + eps)
    if normed is not None:
        v = affine(v * rstd[:, None], k[None, :], (k < K)[None, :], weight, bias)
        tl.store(normed + at, v.to(x.dtype.element_ty), mask=mask)
    else:
        tl.store(statistics + M + rm, rstd, mask=rm < M)


@triton.jit
def _columns(columns, aux):
    """What the prologue needs of its columns: ``(w, b)`` in float32, 1 and 0 where not given."""
    w = tl.full(columns.shape, 1.0, tl.float32)
    b = tl.full(columns.shape, 0.0, tl.float32)
    if aux[2] is not None:
        w = tl.load(aux[2] + columns, mask=columns < aux[5], other=0.0).to(tl.float32)
    if aux[3] is not None:
        b = tl.load(aux[3] + columns, mask=columns < aux[5], other=0.0).to(tl.float32)
    return w, b


@triton.jit
def _normalise(v, rows, columns, mask, aux, ready):
    """The prologue; ``aux`` is ``(mean or None, mean and 1/deviation, weight, bias, M, K)``."""
    v = v.to(tl.float32)
    live = rows < aux[4]
    if aux[0] is not None:
        v = v - tl.load(aux[0] + rows, mask=live, other=0.0)
    v = v * tl.load(aux[1] + aux[4] + rows, mask=live, other=0.0)
    return v * ready[0] + ready[1]


@lru_cache(maxsize=4096)
def _statistics_plan(
    rows: int, features: int, s_xm: int, s_rm: int, eps: float, rms: bool
) -> Launch:
    width = power_of_2(features)
    tile = min(16, max(1, 4096 // width))
    return Launch(
        _statistics_kernel,
        (ceil_div(rows, tile),),
        (rows, features, s_xm, s_rm, eps),
        {"BM": tile, "WIDTH": width, "RMS": rms},
        num_warps=min(16, max(4, width // 1024)),
    )


def rows_first(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    code: Tensor,
    reduced_features: int,
    eps: float,
    rms: bool,
    keep_norm: bool,
    *,
    write_norm: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches, for every dtype and kind of sketch; see :func:`norm_sketch`."""
    rows, features = x.shape
    write_norm = write_norm or keep_norm
    summed = None if residual is None else x.new_empty(rows, features)
    normed = x.new_empty(rows, features) if write_norm else None
    statistics = None if write_norm else x.new_empty(2, rows, dtype=torch.float32)
    stride = 0 if residual is None else residual.stride(0)
    _statistics_plan(rows, features, x.stride(0), stride, float(eps), rms)(
        x, residual, weight, bias, summed, normed, statistics
    )
    source = x if normed is None else normed
    prologue, aux = None, None
    if statistics is not None:
        source = x if summed is None else summed
        prologue = (_columns, _normalise)
        aux = (None if rms else statistics, statistics, weight, bias, rows, features)
    if is_rotation(code):
        out = triton_sketch.sketch(source, code, reduced_features, prologue=prologue, aux=aux)
    else:
        out = triton_blocks.sketch(source, code, prologue=prologue, aux=aux)
    kept = normed if keep_norm and normed is not None else x.new_empty(0)
    return out, x.new_empty(0) if summed is None else summed, kept


def statistics_first(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    code: Tensor,
    reduced_features: int,
    eps: float,
    rms: bool,
    keep_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rows_first` without writing n, unless it is to be kept."""
    return rows_first(
        *(x, residual, weight, bias, code, reduced_features, eps, rms, keep_norm),
        write_norm=False,
    )


def norm_sketch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    code: Tensor,
    reduced_features: int,
    eps: float,
    rms: bool,
    keep_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(X̃ [J, M, K_c], s [M, K] or [0], n [M, K] or [0])``, M >= 1, K <= ``MAX_FEATURES``.

    Args:
        x: float16, bfloat16 or float32 ``[M, K]``, any row stride; other column strides are copied.
        residual: like x, or None; then no s is written.
        weight: ``[K]`` or None.
        bias: ``[K]`` or None.
        code: rotation code int32 ``[J, G, c]`` with B_K a power of two from 8, or learned blocks
            ``[J, G, gsize, r]`` of x's dtype.
        reduced_features: ``K_c``.
        eps: added to the variance.
        rms: RMSNorm, without subtracting the mean.
        keep_norm: whether n is written.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    few = x.shape[0] <= triton_norm_rotation.FEW_ROWS
    short = x.shape[1] <= _SHORT_ROW
    # the table above; a prologue costs most where values are not loaded exactly once
    way: Callable[..., tuple[Tensor, Tensor, Tensor]] = rows_first
    if triton_norm_rotation.suits(x, code, reduced_features):
        if few or (short and residual is not None and not keep_norm):
            way = triton_norm_rotation.one_kernel
        elif not short:
            way = statistics_first
    return way(x, residual, weight, bias, code.contiguous(), reduced_features, eps, rms, keep_norm)
