"""Few rows (M <= 64) against quantised ``z``: it is streamed once, as one byte a value.

    y[m, n] = s_x[j, m] · Σ_groups s_z[n, group] · Σ_k X̃[j, m, k] · z[n, k] + b[n],   j = j(n)

The siblings of :mod:`.triton_decode`, with the same two ways: ``gemv`` (M = 1, rotation, X̃ made by
every program) and ``stream`` (X̃ made before, floating or quantised like z; ``s_x`` is 1 where it is
floating). int8 and e4m3 values are exact in float16 and bfloat16, so weight-only products round
only X̃ and the sum; int8 rows are summed in int32. ``stream`` takes any M, 64 rows at a time, where
nothing faster applies.
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ss1_compile.kernels.launch import shared_memory, stages_within
from ss1_compile.kernels.triton_decode import dependent_launch, starts_early


@triton.jit
def _gemv_kernel(
    x, code, z, scale, bias, y, N, B_N, K, K_c, G, s_zn,
    C: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """BN rows of z against the sketch of one row of x, W slots at a time."""
    B8: tl.constexpr = BK // 8
    tiles = tl.cdiv(B_N, BN)
    pid = tl.program_id(0)
    j = pid // tiles
    rn = j * B_N + pid % tiles * BN + tl.arange(0, BN)
    live = rn < min((j + 1) * B_N, N)
    z += rn[:, None].to(tl.int64) * s_zn
    e = tl.arange(0, 8)
    acc = tl.zeros((BN, W), tl.float32)
    for k0 in tl.range(0, K_c, W):
        k = k0 + tl.arange(0, W)
        tile = tl.load(
            z + k[None, :],
            mask=live[:, None] & (k < K_c)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        if GROUPS > 1:
            at = (rn * GROUPS)[:, None] + (k // (K_c // GROUPS))[None, :]
            tile *= tl.load(scale + at, mask=live[:, None] & (k < K_c)[None, :], other=0.0)
        # whole vectors of 8 slots share one rotation
        v = k0 // 8 + tl.arange(0, W // 8)
        g = v // B8
        u = v & (B8 - 1)
        xt = tl.zeros((W // 8, 8), tl.float32)
        for part in tl.static_range(C):
            h = tl.load(code + (j * G + g) * C + part, mask=g < G, other=0)
            sign = tl.where(h < 0, -1.0, 1.0)
            h8 = (h ^ (h >> 31)) // 8
            col = (((g * C + part) * B8 + ((u - h8) & (B8 - 1))) * 8)[:, None] + e[None, :]
            piece = tl.load(x + col, mask=(g < G)[:, None] & (col < K), other=0.0)
            xt += piece.to(tl.float32) * sign[:, None]
        # rounded like a stored X̃, so that both ways agree
        acc += tile * tl.reshape(xt.to(x.dtype.element_ty).to(tl.float32), (1, W))
    total = tl.sum(acc, axis=1)
    if GROUPS == 1:
        total *= tl.load(scale + rn, mask=live, other=0.0)
    if bias is not None:
        total += tl.load(bias + rn, mask=live, other=0.0).to(tl.float32)
    tl.store(y + rn, total.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M"])
def _stream_kernel(
    xs, xs_scale, z, scale, bias, y, partial, M, N, B_N, K_c, K_SPLIT,
    s_xj, s_xm, s_zn, s_pm, s_sj,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, SPLIT: tl.constexpr,
    GROUPS: tl.constexpr, WHOLE_STEPS: tl.constexpr, DYNAMIC: tl.constexpr,
    INTEGER: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """BN rows of z, one K split, against BM rows of the sketch."""
    tiles = tl.cdiv(B_N, BN)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    j = pid // tiles
    rn = j * B_N + pid % tiles * BN + tl.arange(0, BN)
    live = rn < min((j + 1) * B_N, N)
    row0 = tl.program_id(2).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    rows = rm < M - row0
    first = split * K_SPLIT
    last = min(K_c, first + K_SPLIT)
    z += rn[:, None].to(tl.int64) * s_zn
    if PDL:
        # warm L2 with the head of this program's z while the sketch still runs
        for step in tl.static_range(PREFETCH):
            line = first + step * W + tl.arange(0, W // 128) * 128
            ahead = tl.where(live[:, None] & (line < last)[None, :], z + line[None, :], z)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ahead],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
        if SPLIT > 1:
            tl.extra.cuda.gdc_launch_dependents()
    xs += j * s_xj + row0 * s_xm
    SUM: tl.constexpr = tl.int32 if DYNAMIC and INTEGER else tl.float32
    acc = tl.zeros((BN, BM), SUM)
    for k0 in tl.range(first, last, W, num_stages=STAGES):
        k = k0 + tl.arange(0, W)
        inside = k < K_c
        tile = tl.load(
            z + k[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        xt = tl.load(
            xs + (rm * s_xm)[:, None] + k[None, :],
            mask=rows[:, None] & inside[None, :],
            other=0.0,
        )
        if DYNAMIC:
            acc = tl.dot(tile, tl.trans(xt), acc, out_dtype=SUM)
        elif GROUPS == 1:
            wide = tile.to(xs.dtype.element_ty)
            acc = tl.dot(wide, tl.trans(xt), acc, input_precision="ieee")
        elif WHOLE_STEPS:
            wide = tile.to(xs.dtype.element_ty)
            part = tl.dot(wide, tl.trans(xt), input_precision="ieee")
            at = rn * GROUPS + k0 // (K_c // GROUPS)
            acc += part * tl.load(scale + at, mask=live, other=0.0)[:, None]
        else:
            at = (rn * GROUPS)[:, None] + (k // (K_c // GROUPS))[None, :]
            s = tl.load(scale + at, mask=live[:, None] & inside[None, :], other=0.0)
            wide = (tile.to(tl.float32) * s).to(xs.dtype.element_ty)
            acc = tl.dot(wide, tl.trans(xt), acc, input_precision="ieee")
    keep = rows[None, :] & live[:, None]
    at = (row0 + rm)[None, :] * N + rn[:, None]
    if SPLIT == 1:
        total = acc.to(tl.float32)
        if DYNAMIC:
            sx = tl.load(xs_scale + j * s_sj + row0 + rm, mask=rows, other=0.0)
            total *= sx[None, :]
        if GROUPS == 1:
            total *= tl.load(scale + rn, mask=live, other=0.0)[:, None]
        if bias is not None:
            total += tl.load(bias + rn, mask=live, other=0.0).to(tl.float32)[:, None]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=keep)
    else:
        tl.store(partial + split * s_pm + at, acc, mask=keep)


@triton.jit(do_not_specialize=["TOTAL"])
def _reduce_kernel(
    partial, xs_scale, scale, bias, y, TOTAL, N, B_N, s_sj,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, DYNAMIC: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Add the K splits in order, then scales and bias."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < TOTAL
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK,), partial.dtype.element_ty)
    for split in tl.static_range(SPLIT):
        acc += tl.load(partial + split * TOTAL + i, mask=inside, other=0)
    total = acc.to(tl.float32)
    n = i % N
    if DYNAMIC:
        total *= tl.load(xs_scale + n // B_N * s_sj + i // N, mask=inside, other=0.0)
    if GROUPS == 1:
        total *= tl.load(scale + n, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=inside)


def gemv(x: Tensor, code: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``y [1, N]`` of one row ``x [1, K]`` for the rotation code ``[J, G, c]``, in one launch.

    ``z [N, K_c]`` is int8 or float8, ``scale`` float32 ``[N, groups]``.
    """
    hashes, groups, reduction = code.shape
    out_features, reduced = z.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(1, out_features)
    block_n = -(-out_features // hashes)
    _gemv_kernel[(hashes * triton.cdiv(block_n, 8),)](
        *(x, code, z, scale, bias, y, out_features, block_n, x.shape[1], reduced, groups),
        z.stride(0),
        C=reduction,
        BK=reduced // groups,
        BN=8,
        W=512,
        GROUPS=scale.shape[1],
        num_warps=4,
    )
    return y


def default_tile(out_features: int, hashes: int, reduced: int) -> tuple[int, int, int]:
    """``(W, split, stages)`` of the 64-row tiles of z: as for 16-bit z, with twice the slots."""
    tiles = hashes * triton.cdiv(-(-out_features // hashes), 64)
    split = 1
    if tiles < 128:
        while split < 4 and reduced >= 1536 * split:
            split *= 2
    return 128, split, 5


def _step(width: int, reduced: int, groups: int) -> tuple[int, bool]:
    """The step along K_c, and whether none crosses a group (else a scale is staged per value)."""
    if groups == 1:
        return width, True
    size = reduced // groups
    step = width
    while step > 32 and size % step:
        step //= 2
    return (step, True) if size % step == 0 else (width, False)


def stream(
    sketched: Tensor,
    sketched_scale: Tensor | None,
    z: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    tile: tuple[int, int, int] | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """``y [M, N]`` of ``dtype`` from the sketch ``[J, M, K_c]`` and quantised ``z [N, K_c]``.

    Args:
        sketched: of ``dtype`` (weight-only), or quantised like z.
        sketched_scale: float32 ``[J, M]``, contiguous, where the sketch is quantised; else None.
        z: int8 or float8, unit column stride.
        scale: float32 ``[N, groups]``, contiguous; groups = 1 where the sketch is quantised.
        bias: ``[N]`` of ``dtype`` or None.
        dtype: float16, bfloat16 or float32.
        tile: overrides :func:`default_tile`.
        pdl: launch as dependent of the previous kernel, which must be the sketch (sm_90).
    """
    hashes, rows, reduced = sketched.shape
    out_features, groups = z.shape[0], scale.shape[1]
    block_n = -(-out_features // hashes)
    dynamic, integer = sketched_scale is not None, z.dtype == torch.int8
    width, split, stages = tile or default_tile(out_features, hashes, reduced)
    if sketched.dtype == torch.float32:
        width, stages = min(width, 32), 3
    width, whole = _step(width, reduced, groups)
    if rows > 64:
        split = 1
    y = sketched.new_empty(rows, out_features, dtype=dtype)
    partial = y
    if split > 1:
        sums = torch.int32 if dynamic and integer else torch.float32
        partial = sketched.new_empty(split, rows, out_features, dtype=sums)
    if pdl is None:
        pdl = dependent_launch(sketched.device)
    chained: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    k_split = triton.cdiv(triton.cdiv(reduced, split), width) * width
    hash_stride = 0 if sketched_scale is None else sketched_scale.stride(0)
    # 16 rows at least for 8-bit products, whose narrowest instruction Triton pads badly
    block_m = max(16 if dynamic else 8, min(64, triton.next_power_of_2(rows)))
    step = width * (64 * (1 if whole else 5) + block_m * sketched.element_size())
    stages = stages_within(shared_memory(sketched.device), stages, step)
    _stream_kernel[(hashes * triton.cdiv(block_n, 64), split, triton.cdiv(rows, block_m))](
        *(sketched, sketched_scale, z, scale, bias if split == 1 else None, y, partial),
        *(rows, out_features, block_n, reduced, k_split),
        *(sketched.stride(0), sketched.stride(1), z.stride(0), rows * out_features),
        hash_stride,
        BM=block_m,
        BN=64,
        W=width,
        SPLIT=split,
        GROUPS=groups,
        WHOLE_STEPS=whole,
        DYNAMIC=dynamic,
        INTEGER=integer,
        STAGES=stages,
        PDL=pdl,
        PREFETCH=2 if width >= 128 and starts_early(reduced) else 0,
        num_warps=4,
        **chained,
    )
    if split > 1:
        total = rows * out_features
        _reduce_kernel[(triton.cdiv(total, 256),)](
            *(partial, sketched_scale, scale, bias, y, total, out_features, block_n, hash_stride),
            SPLIT=split,
            GROUPS=groups,
            DYNAMIC=dynamic,
            BLOCK=256,
            PDL=pdl,
            num_warps=2,
            **chained,
        )
    return y
