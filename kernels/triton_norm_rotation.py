"""Norm and rotation sketch in one kernel: one of the ways of :mod:`.triton_norm`.

A program takes whole rows, finds their statistics and sketches them from cache. Few rows share out
the supergroups over several programs, each of which finds the statistics again.
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ss1_compile.kernels.launch import Launch, ceil_div, power_of_2
from ss1_compile.kernels.layout import is_rotation

_MAX_VECTORS = 128
FEW_ROWS = 64


@triton.jit
def load_sum(x, residual, at_x, at_r, mask):
    """``x + residual`` rounded to x's dtype, in float32."""
    v = tl.load(x + at_x, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + at_r, mask=mask, other=0.0).to(tl.float32)
        v = v.to(x.dtype.element_ty).to(tl.float32)
    return v


@triton.jit
def affine(v, columns, mask, weight, bias):
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
        v = load_sum(x, residual, at_x, at_r, mask)
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
        v = load_sum(x, residual, at_x + first, at_r + first, mask)
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
            v = load_sum(x, residual, at_x + first, at_r + first, mask)
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
            v = load_sum(
                x, residual,
                (rm * s_xm)[:, None] + k[None, :], (rm * s_rm)[:, None] + k[None, :], mask,
            )  # fmt: skip
            at = rm.to(tl.int64)[:, None] * K + k[None, :]
            if summed is not None:
                tl.store(summed + at, v.to(x.dtype.element_ty), mask=mask)
            if normed is not None:
                v = (v - mean[:, None]) * rstd[:, None]
                v = affine(v, k[None, :], inside[None, :], weight, bias)
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
        v = load_sum(
            x, residual,
            (rm * s_xm)[:, None] + column[None, :], (rm * s_rm)[:, None] + column[None, :], mask,
        )  # fmt: skip
        v = (v - mean[:, None]) * rstd[:, None]
        v = affine(v, column[None, :], inside[None, :], weight, bias)
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
def _plan(
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
    hashes, groups, size = code_shape
    block_k = reduced_features // groups
    tile_m, warps, stages = tile or ((2, 4, 1) if rows <= FEW_ROWS else (4, 2, 1))
    vectors = power_of_2(size) * block_k // 8
    batch = 1
    # rows of 512 bytes where there are as many supergroups; 16 is a product's narrowest side
    while batch < power_of_2(groups) and batch * vectors * 8 < 256:
        batch *= 2
    while batch * vectors < 16:
        batch *= 2
    widest = 64 if batch * vectors >= 128 else 128
    block_out = min(power_of_2(hashes), max(1, widest // (batch * block_k // 8)))
    while block_out * batch * block_k < 128:
        block_out *= 2
    width, chunks = _width(features, tile_m, warps)
    tiles = ceil_div(rows, tile_m)
    slices, each = _slices(tiles, ceil_div(groups, batch))
    return Launch(
        _norm_rotation_kernel,
        (tiles * slices,),
        (
            *(rows, features, groups, hashes, slices, each),
            *(s_xm, s_rm, reduced_features, rows * reduced_features, eps),
        ),
        {
            "C": size,
            "IB": power_of_2(size),
            "OB": block_out,
            "GB": batch,
            "BK": block_k,
            "RAGGED": features != groups * size * block_k,
            "OUTER": ceil_div(hashes, block_out),
            "BM": tile_m,
            "WIDTH": width,
            "CHUNKS": chunks,
            "STAGES": stages,
            "RMS": rms,
        },
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
    """As :func:`.triton_norm.norm_sketch`, for what :func:`suits` of 16-bit types."""
    rows, features = x.shape
    out = x.new_empty(code.shape[0], rows, reduced_features)
    summed = None if residual is None else x.new_empty(rows, features)
    normed = x.new_empty(rows, features) if keep_norm else None
    plan = _plan(
        *(rows, features, tuple(code.shape), reduced_features, x.stride(0)),
        0 if residual is None else residual.stride(0),
        *(float(eps), rms, tile),
    )
    plan(x, residual, weight, bias, code, out, summed, normed)
    # an operator's outputs must not alias each other: an empty tensor of its own for each
    summed = x.new_empty(0) if summed is None else summed
    return out, summed, x.new_empty(0) if normed is None else normed


def suits(x: Tensor, code: Tensor, reduced_features: int) -> bool:
    """Whether ``code`` is a rotation of which a supergroup fits one product of tensor cores."""
    if x.dtype not in (torch.float16, torch.bfloat16) or not is_rotation(code):
        return False
    block_k = reduced_features // code.shape[1]
    return bool(power_of_2(code.shape[2]) * block_k // 8 <= _MAX_VECTORS)
