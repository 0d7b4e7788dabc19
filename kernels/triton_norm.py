"""Norm fused into the sketch: ``X̃`` of ``LayerNorm(x + residual)`` or ``RMSNorm(x + residual)``.

    n[m, k] = (s[m, k] - mean_m) · rstd_m · w[k] + b[k],   s = x + residual,   X̃ = sketch(n)

Without fusion x is read, n written, n read and X̃ written. Three ways:

* ``one_kernel`` (16-bit types): a program takes whole rows, finds their statistics and sketches
  them from cache. Few rows share out the supergroups over several programs, each of which finds
  the statistics again.
* ``statistics_first``: one kernel reads the rows, writes mean and 1/deviation (and s), the sketch's
  own kernel normalises what it loads.
* ``rows_first``: n is written by a kernel of whole rows, then sketched.

Microseconds on one NVIDIA H200, bf16, LayerNorm, c = 4; the last column is Inductor's norm with the
sketch kernel. In brackets with a residual to add, where s is written too:

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

from ss1_compile.kernels import triton_blocks, triton_sketch
from ss1_compile.kernels.launch import Launch, ceil_div, power_of_2
from ss1_compile.kernels.layout import is_rotation

_TENSOR_CORE_DTYPES = (torch.float16, torch.bfloat16)
_MAX_VECTORS = 128
_FEW_ROWS = 64
_SHORT_ROW = 2048
MAX_FEATURES = 65536
"""Longest row of the statistics kernel: 128 values a thread."""


@triton.jit
def _load_sum(x, residual, at_x, at_r, mask):
    """``x + residual`` rounded to x's dtype, in float32."""
    v = tl.load(x + at_x, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + at_r, mask=mask, other=0.0).to(tl.float32)
        v = v.to(x.dtype.element_ty).to(tl.float32)
    return v


@triton.jit
def _affine(v, columns, mask, weight, bias):
    """``v · w + b`` by column."""
    if weight is not None:
        v = v * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        v = v + tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def _row_statistics(
    x, residual, rm, rows, K, s_xm, s_rm, eps,
    BM: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """Mean and 1/deviation ``[BM]`` of the rows, two-pass: the second reading is from cache."""
    k = tl.arange(0, WIDTH)
    at_x = (rm * s_xm)[:, None] + k[None, :]
    at_r = (rm * s_rm)[:, None] + k[None, :]
    if CHUNKS == 1:
        mask = rows[:, None] & (k < K)[None, :]
        v = _load_sum(x, residual, at_x, at_r, mask)
        mean = tl.zeros((BM,), tl.float32)
        if not RMS:
            mean = tl.sum(v, axis=1) / K
            v = tl.where(mask, v - mean[:, None], 0.0)
        variance = tl.sum(v * v, axis=1) / K
        return mean, 1.0 / tl.sqrt(variance + eps)
    total = tl.zeros((BM, WIDTH), tl.float32)
    for chunk in range(CHUNKS):
        first = chunk * WIDTH
        mask = rows[:, None] & (k < K - first)[None, :]
        v = _load_sum(x, residual, at_x + first, at_r + first, mask)
        total += v * v if RMS else v
    mean = tl.sum(total, axis=1) / K
    variance = mean
    if RMS:
        mean = tl.zeros((BM,), tl.float32)
    else:
        squares = tl.zeros((BM, WIDTH), tl.float32)
        for chunk in range(CHUNKS):
            first = chunk * WIDTH
            mask = rows[:, None] & (k < K - first)[None, :]
            v = _load_sum(x, residual, at_x + first, at_r + first, mask)
            d = tl.where(mask, v - mean[:, None], 0.0)
            squares += d * d
        variance = tl.sum(squares, axis=1) / K
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def _write_rows(
    x, residual, weight, bias, summed, normed, mean, rstd, rm, rows, K, s_xm, s_rm,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write ``s`` and ``n`` where they are wanted; ``summed`` and ``normed`` have row stride K."""
    if summed is not None or normed is not None:
        for chunk in range(CHUNKS):
            k = chunk * WIDTH + tl.arange(0, WIDTH)
            inside = k < K
            mask = rows[:, None] & inside[None, :]
            v = _load_sum(
                x, residual,
                (rm * s_xm)[:, None] + k[None, :], (rm * s_rm)[:, None] + k[None, :], mask,
            )  # fmt: skip
            at = rm.to(tl.int64)[:, None] * K + k[None, :]
            if summed is not None:
                tl.store(summed + at, v.to(x.dtype.element_ty), mask=mask)
            if normed is not None:
                v = (v - mean[:, None]) * rstd[:, None]
                v = _affine(v, k[None, :], inside[None, :], weight, bias)
                tl.store(normed + at, v.to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "G", "NO", "SLICES", "PER_SLICE"])
def _norm_rotation_kernel(
    x, residual, weight, bias, code, out, summed, normed,
    M, K, G, NO, SLICES, PER_SLICE, s_xm, s_rm, s_om, s_op, eps,
    C: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr, GB: tl.constexpr, BK: tl.constexpr,
    BM: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
    RAGGED: tl.constexpr, RMS: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """BM rows, PER_SLICE times GB supergroups: see ``_permute_kernel`` for the 0/±1 matrix."""
    B8: tl.constexpr = BK // 8
    U: tl.constexpr = GB * IB * B8
    V: tl.constexpr = OB * GB * B8
    pid = tl.program_id(0)
    part = pid % SLICES
    row0 = (pid // SLICES).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    rows = rm < M - row0
    x += row0 * s_xm
    out += row0 * s_om
    if residual is not None:
        residual += row0 * s_rm
    mean, rstd = _row_statistics(x, residual, rm, rows, K, s_xm, s_rm, eps, BM, WIDTH, CHUNKS, RMS)
    if summed is not None:
        summed += row0 * K
    if normed is not None:
        normed += row0 * K
    _write_rows(
        x, residual, weight, bias, summed, normed, mean, rstd, rm, rows & (part == 0), K,
        s_xm, s_rm, WIDTH, CHUNKS,
    )  # fmt: skip

    iu = tl.arange(0, U)
    iv = tl.arange(0, V)
    ci = tl.arange(0, U * 8)
    co = tl.arange(0, V * 8)
    for step in tl.range(part * PER_SLICE, (part + 1) * PER_SLICE, num_stages=STAGES):
        g0 = step * GB
        plane = ci // BK % IB
        group = g0 + ci // (IB * BK)
        inside = (group < G) & (plane < C)
        column = group * (C * BK) + plane * BK + (ci & (BK - 1))
        if RAGGED:
            inside = inside & (column < K)
        column = tl.max_contiguous(tl.multiple_of(column, 8), 8)
        mask = rows[:, None] & inside[None, :]
        v = _load_sum(
            x, residual,
            (rm * s_xm)[:, None] + column[None, :], (rm * s_rm)[:, None] + column[None, :], mask,
        )  # fmt: skip
        v = (v - mean[:, None]) * rstd[:, None]
        v = _affine(v, column[None, :], inside[None, :], weight, bias)
        v = tl.where(mask, v, 0.0).to(x.dtype.element_ty)
        a = tl.reshape(tl.permute(tl.reshape(v, (BM, U, 8)), (0, 2, 1)), (BM * 8, U))
        for block in tl.static_range(OUTER):
            o0 = block * OB
            gi = g0 + iu // (IB * B8)
            i = iu // B8 % IB
            go = g0 + iv // B8 % GB
            o = o0 + iv // (GB * B8)
            used = ((gi < G) & (i < C))[:, None] & (o < NO)[None, :] & (gi[:, None] == go[None, :])
            h = tl.load(code + o[None, :] * (G * C) + (gi * C + i)[:, None], mask=used, other=0)
            h8 = (h ^ (h >> 31)) // 8
            hit = used & (((iv[None, :] - h8) & (B8 - 1)) == (iu & (B8 - 1))[:, None])
            matrix = tl.where(hit, tl.where(h < 0, -1.0, 1.0), 0.0).to(x.dtype.element_ty)
            y = tl.dot(a, matrix).to(out.dtype.element_ty)
            y = tl.reshape(tl.permute(tl.reshape(y, (BM, 8, V)), (0, 2, 1)), (BM, V * 8))
            go = g0 + co // BK % GB
            o = o0 + co // (GB * BK)
            at = go * BK + o.to(tl.int64) * s_op + (co & (BK - 1))
            at = tl.max_contiguous(tl.multiple_of(at, 8), 8)
            tl.store(
                out + (rm * s_om)[:, None] + at[None, :],
                y,
                mask=rows[:, None] & ((go < G) & (o < NO))[None, :],
            )


@triton.jit(do_not_specialize=["M", "G", "NO", "SLICES", "PER_SLICE"])
def _norm_blocks_kernel(
    x, residual, weight, bias, blocks, out, summed, normed,
    M, K, G, NO, SLICES, PER_SLICE, s_xm, s_rm, s_om, s_op, eps,
    P: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr,
    BM: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
    RAGGED: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """BM rows, PER_SLICE groups of a learned sketch."""
    pid = tl.program_id(0)
    part = pid % SLICES
    row0 = (pid // SLICES).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    rows = rm < M - row0
    x += row0 * s_xm
    out += row0 * s_om
    if residual is not None:
        residual += row0 * s_rm
    mean, rstd = _row_statistics(x, residual, rm, rows, K, s_xm, s_rm, eps, BM, WIDTH, CHUNKS, RMS)
    if summed is not None:
        summed += row0 * K
    if normed is not None:
        normed += row0 * K
    _write_rows(
        x, residual, weight, bias, summed, normed, mean, rstd, rm, rows & (part == 0), K,
        s_xm, s_rm, WIDTH, CHUNKS,
    )  # fmt: skip

    rp = tl.arange(0, BP)
    rq = tl.arange(0, BQ)
    for g in tl.range(part * PER_SLICE, (part + 1) * PER_SLICE, num_stages=STAGES):
        column = g * P + rp
        inside = (rp < P) & (g < G)
        if RAGGED:
            inside = inside & (column < K)
        mask = rows[:, None] & inside[None, :]
        v = _load_sum(
            x, residual,
            (rm * s_xm)[:, None] + column[None, :], (rm * s_rm)[:, None] + column[None, :], mask,
        )  # fmt: skip
        v = (v - mean[:, None]) * rstd[:, None]
        v = _affine(v, column[None, :], inside[None, :], weight, bias)
        v = tl.where(mask, v, 0.0).to(x.dtype.element_ty)
        for o in range(NO):
            s = tl.load(
                blocks + (o * G + g) * (P * Q) + rp[:, None] * Q + rq[None, :],
                mask=(rp < P)[:, None] & (rq < Q)[None, :] & (g < G),
                other=0.0,
            )
            y = tl.dot(v, s).to(out.dtype.element_ty)
            tl.store(
                out + tl.cast(o, tl.int64) * s_op + (rm * s_om)[:, None] + (g * Q + rq)[None, :],
                y,
                mask=rows[:, None] & (rq < Q)[None, :] & (g < G),
            )


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
    v = _load_sum(
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
        v = _affine(v * rstd[:, None], k[None, :], (k < K)[None, :], weight, bias)
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


def _width(features: int, rows: int, warps: int) -> tuple[int, int]:
    """Columns at a time and how many times, with at most 64 values a thread."""
    width = min(power_of_2(features), max(128, 64 * 32 * warps // rows))
    return width, ceil_div(features, width)


def _slices(tiles: int, steps: int) -> tuple[int, int]:
    """Over how many programs to share out a row tile's ``steps``, and how many each does."""
    wanted = max(1, min(steps, 264 // tiles))
    each = ceil_div(steps, wanted)
    return ceil_div(steps, each), each


@lru_cache(maxsize=4096)
def _one_kernel_plan(
    rotation: bool,
    rows: int,
    features: int,
    code_shape: tuple[int, ...],
    reduced_features: int,
    s_xm: int,
    s_rm: int,
    eps: float,
    rms: bool,
    tile: tuple[int, int, int] | None,
) -> Launch:
    hashes, groups, size = code_shape[:3]
    block_k = reduced_features // groups
    batch = 1
    if rotation:
        tile_m, warps, stages = tile or ((2, 4, 1) if rows <= _FEW_ROWS else (4, 2, 1))
        vectors = power_of_2(size) * block_k // 8
        # rows of 512 bytes where there are as many supergroups; 16 is a product's narrowest side
        while batch < power_of_2(groups) and batch * vectors * 8 < 256:
            batch *= 2
        while batch * vectors < 16:
            batch *= 2
        widest = 64 if batch * vectors >= 128 else 128
        block_out = min(power_of_2(hashes), max(1, widest // (batch * block_k // 8)))
        while block_out * batch * block_k < 128:
            block_out *= 2
        kernel = _norm_rotation_kernel
        own = {
            "C": size,
            "IB": power_of_2(size),
            "OB": block_out,
            "GB": batch,
            "BK": block_k,
            "RAGGED": features != groups * size * block_k,
            "OUTER": ceil_div(hashes, block_out),
        }
    else:
        tile_m, warps, stages = tile or (16 if rows <= _FEW_ROWS else 64, 4, 1)
        rank = code_shape[3]
        kernel = _norm_blocks_kernel
        own = {
            "P": size,
            "Q": rank,
            "BP": max(16, power_of_2(size)),
            "BQ": max(16, power_of_2(rank)),
            "RAGGED": features != groups * size,
        }
    width, chunks = _width(features, tile_m, warps)
    tiles = ceil_div(rows, tile_m)
    slices, each = _slices(tiles, ceil_div(groups, batch))
    common = {"BM": tile_m, "WIDTH": width, "CHUNKS": chunks, "STAGES": stages, "RMS": rms}
    strides = (s_xm, s_rm, reduced_features, rows * reduced_features)
    return Launch(
        kernel,
        (tiles * slices,),
        (rows, features, groups, hashes, slices, each, *strides, eps),
        {**own, **common},
        num_warps=warps,
    )


def one_kernel(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    code: Tensor,
    reduced_features: int,
    eps: float,
    rms: bool,
    keep_norm: bool,
    tile: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics, norm and sketch in one launch, for 16-bit types; see :func:`norm_sketch`."""
    rows, features = x.shape
    out = x.new_empty(code.shape[0], rows, reduced_features)
    summed = None if residual is None else x.new_empty(rows, features)
    normed = x.new_empty(rows, features) if keep_norm else None
    plan = _one_kernel_plan(
        *(is_rotation(code), rows, features, tuple(code.shape), reduced_features, x.stride(0)),
        0 if residual is None else residual.stride(0),
        *(float(eps), rms, tile),
    )
    plan(x, residual, weight, bias, code, out, summed, normed)
    # an operator's outputs must not alias each other: an empty tensor of its own for each
    summed = x.new_empty(0) if summed is None else summed
    return out, summed, x.new_empty(0) if normed is None else normed


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


def _suits_one_kernel(x: Tensor, code: Tensor, reduced_features: int) -> bool:
    """Whether a supergroup fits one product of the tensor cores."""
    if x.dtype not in _TENSOR_CORE_DTYPES:
        return False
    if not is_rotation(code):
        return code.shape[2] <= 256 and code.shape[3] <= 128
    block_k = reduced_features // code.shape[1]
    vectors = power_of_2(code.shape[2]) * block_k // 8
    return bool(vectors <= _MAX_VECTORS)


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
    few = x.shape[0] <= _FEW_ROWS
    short = x.shape[1] <= _SHORT_ROW
    # the table above; a prologue costs most where values are not loaded exactly once
    way: Callable[..., tuple[Tensor, Tensor, Tensor]] = rows_first
    if is_rotation(code) and _suits_one_kernel(x, code, reduced_features):
        if few or (short and residual is not None and not keep_norm):
            way = one_kernel
        elif not short:
            way = statistics_first
    return way(x, residual, weight, bias, code.contiguous(), reduced_features, eps, rms, keep_norm)
