"""Few rows (M <= 64): stream ``z`` once; the sketch of x is tiny and made once.

    y[m, n] = Σ_k X̃[j(n), m, k] · z[n, k] + b[n]

Bound by reading z. Two ways, both bit-for-bit reproducible:

* ``gemv`` (M = 1, rotation): one launch; every program sketches the piece of x it meets, which
  costs c loads beside the rows of z. 3.9 µs at 4096 -> 4096, c = 8 on one NVIDIA H200.
* ``stream`` (M <= 64): sketch first, then tiles of z against all rows on the tensor cores. K is
  split where N gives too few programs; partial sums go to a workspace and are added in a fixed
  order, never with atomics. On sm_90 the kernels are chained by programmatic dependent launch.
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ss1_compile.kernels.launch import (
    Launch,
    ceil_div,
    power_of_2,
    shared_memory,
    stages_within,
)
from ss1_compile.kernels.triton_elementwise import ACTIVATIONS


@triton.jit
def _gemv_kernel(
    x, code, z, bias, y, N, B_N, K, K_c, G, s_zn,
    C: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, W: tl.constexpr,
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
        )
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
        xt = tl.reshape(xt.to(x.dtype.element_ty).to(tl.float32), (1, W))
        acc += tile.to(tl.float32) * xt
    total = tl.sum(acc, axis=1)
    if bias is not None:
        total += tl.load(bias + rn, mask=live, other=0.0).to(tl.float32)
    tl.store(y + rn, total.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M"])
def _stream_kernel(
    xs, z, bias, residual, y, partial, M, N, B_N, K_c, K_SPLIT, s_xj, s_xm, s_zn, s_rm, s_ym, s_pm,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """BN rows of z, one K split, against all rows of the sketch."""
    tiles = tl.cdiv(B_N, BN)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    j = pid // tiles
    rn = j * B_N + pid % tiles * BN + tl.arange(0, BN)
    live = rn < min((j + 1) * B_N, N)
    rm = tl.arange(0, BM)
    first = split * K_SPLIT
    last = min(K_c, first + K_SPLIT)
    z += rn[:, None].to(tl.int64) * s_zn
    if PDL:
        # warm L2 with the head of this program's z while the sketch still runs
        for step in tl.static_range(PREFETCH):
            line = first + step * W + tl.arange(0, W // 64) * 64
            at = tl.where(live[:, None] & (line < last)[None, :], z + line[None, :], z)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
        if SPLIT > 1:
            tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BN, BM), tl.float32)
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
            xs + j * s_xj + (rm * s_xm)[:, None] + k[None, :],
            mask=(rm < M)[:, None] & inside[None, :],
            other=0.0,
        )
        acc = tl.dot(tile, tl.trans(xt), acc, input_precision="ieee")
    keep = (rm < M)[None, :] & live[:, None]
    if SPLIT == 1:
        if bias is not None:
            acc += tl.load(bias + rn, mask=live, other=0.0).to(tl.float32)[:, None]
        if ACT is not None:
            acc = ACT(acc, y.dtype.element_ty)
        if residual is not None:
            at = rm[None, :] * s_rm + rn[:, None]
            acc += tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(y + rm[None, :] * s_ym + rn[:, None], acc.to(y.dtype.element_ty), mask=keep)
    else:
        at = split * s_pm + rm[None, :] * N + rn[:, None]
        tl.store(partial + at, acc, mask=keep)


@triton.jit(do_not_specialize=["TOTAL"])
def _reduce_kernel(
    partial, bias, residual, y, TOTAL, N, s_rm, s_ym,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Add the K splits in order, then the bias; activation and residual."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < TOTAL
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(partial + split * TOTAL + i, mask=inside, other=0.0)
    if bias is not None:
        acc += tl.load(bias + i % N, mask=inside, other=0.0).to(tl.float32)
    if ACT is not None:
        acc = ACT(acc, y.dtype.element_ty)
    if residual is not None:
        at = i // N * s_rm + i % N
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i // N * s_ym + i % N, acc.to(y.dtype.element_ty), mask=inside)


@lru_cache
def dependent_launch(device: torch.device) -> bool:
    """Whether the device chains kernels by programmatic dependent launch (sm_90 and later)."""
    return device.type == "cuda" and bool(torch.cuda.get_device_capability(device)[0] >= 9)


@lru_cache(maxsize=4096)
def _gemv_plan(
    features: int,
    hashes: int,
    groups: int,
    reduction: int,
    out_features: int,
    reduced: int,
    z_stride: int,
) -> Launch:
    block_n = ceil_div(out_features, hashes)
    # 8 rows of z per program and 512 slots per step: best of six at three shapes
    return Launch(
        _gemv_kernel,
        (hashes * ceil_div(block_n, 8),),
        (out_features, block_n, features, reduced, groups, z_stride),
        {"C": reduction, "BK": reduced // groups, "BN": 8, "W": 512},
        num_warps=4,
    )


def gemv(x: Tensor, code: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    """``y [1, N]`` of one row ``x [1, K]`` for the rotation code ``[J, G, c]``, in one launch."""
    hashes, groups, reduction = code.shape
    out_features, reduced = z.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(1, out_features)
    _gemv_plan(x.shape[1], hashes, groups, reduction, out_features, reduced, z.stride(0))(
        x, code, z, bias, y
    )
    return y


def starts_early(reduced: int) -> bool:
    """Whether the stream kernel should be launched while the sketch still runs.

    Its programs then fill the processors that the sketch leaves, and prefetch z: 5.7 instead of
    7.3 µs at 4096 -> 4096, c = 8. With a long K they end up two to a processor, others idle: 20.3
    instead of 14.6 µs at 14336 -> 4096, c = 4.
    """
    return reduced <= 1024


def default_tile(rows: int, out_features: int, hashes: int, reduced: int) -> tuple[int, int, int]:
    """``(W, split, stages)`` of the 64-row tiles of z.

    K is split only where there are fewer tiles than processors, about 1024 slots to a split:
    measured at 14336 -> 4096, M = 4, c = 2: 22.7 µs unsplit, 19.4 µs in four.
    """
    tiles = hashes * ceil_div(ceil_div(out_features, hashes), 64)
    split = 1
    if tiles < 128:
        while split < 4 and reduced >= 1536 * split:
            split *= 2
    return 128, split, 4 if split > 1 else 5


@lru_cache(maxsize=4096)
def _stream_plans(
    wide: bool,
    rows: int,
    hashes: int,
    reduced: int,
    out_features: int,
    s_xj: int,
    s_xm: int,
    s_zn: int,
    s_rm: int,
    s_ym: int,
    activation: str,
    tile: tuple[int, int, int] | None,
    pdl: bool,
    room: int,
) -> tuple[Launch, Launch | None, int]:
    """Products, the sum of the K splits where there are several, and how many there are.

    ``room`` is for the stages, in bytes of shared memory.
    """
    width, split, stages = tile or default_tile(rows, out_features, hashes, reduced)
    if wide:
        width, stages = 32, 3
    block_m = max(8, power_of_2(rows))
    step = width * (block_m + 64) * (4 if wide else 2)
    stages = stages_within(room, stages, step)
    block_n = ceil_div(out_features, hashes)
    k_split = ceil_div(ceil_div(reduced, split), width) * width
    total = rows * out_features
    chained: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    constants = {
        "BM": block_m,
        "BN": 64,
        "W": width,
        "SPLIT": split,
        "STAGES": stages,
        "PDL": pdl,
        "PREFETCH": 2 if width >= 64 and starts_early(reduced) else 0,
        "ACT": ACTIVATIONS[activation],
    }
    stream_z = Launch(
        _stream_kernel,
        (hashes * ceil_div(block_n, 64), split),
        (rows, out_features, block_n, reduced, k_split, s_xj, s_xm, s_zn, s_rm, s_ym, total),
        constants,
        num_warps=4,
        **chained,
    )
    if split == 1:
        return stream_z, None, split
    reduce = Launch(
        _reduce_kernel,
        (ceil_div(total, 256),),
        (total, out_features, s_rm, s_ym),
        {"SPLIT": split, "BLOCK": 256, "PDL": pdl, "ACT": ACTIVATIONS[activation]},
        num_warps=2,
        **chained,
    )
    return stream_z, reduce, split


def stream(
    sketched: Tensor,
    z: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: tuple[int, int, int] | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """``act(X̃ zᵀ + b) + residual``, ``[M, N]`` of the sketch ``[J, M, K_c]``, M <= 64.

    z ``[N, K_c]`` is read once. ``activation``, ``residual`` and ``out`` as in
    :func:`ss1_compile.kernels.triton_gemm.grouped_matmul`.
    """
    hashes, rows, reduced = sketched.shape
    out_features = z.shape[0]
    if pdl is None:
        pdl = dependent_launch(sketched.device)
    y = sketched.new_empty(rows, out_features) if out is None else out
    stream_z, reduce, split = _stream_plans(
        *(sketched.dtype == torch.float32, rows, hashes, reduced, out_features),
        *(sketched.stride(0), sketched.stride(1), z.stride(0)),
        0 if residual is None else residual.stride(0),
        *(y.stride(0), activation, tile, pdl, shared_memory(sketched.device)),
    )
    if reduce is None:
        stream_z(sketched, z, bias, residual, y, y)
        return y
    partial = sketched.new_empty(split, rows, out_features, dtype=torch.float32)
    stream_z(sketched, z, None, None, y, partial)
    reduce(partial, bias, residual, y)
    return y
