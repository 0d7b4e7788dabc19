"""Sketch and quantise in one kernel: x is read, int8 or float8 rows and their scales are written.

    q[j, m, :] = round(X̃[j, m, :] / scale[j, m]),   scale[j, m] = max|X̃[j, m, :]| / q_max

The scale of a row needs the whole row first. Three ways:

* ``_gather_kernel`` (rotation): a program holds whole rows of X̃ in registers, gathered c times
  from x as in :mod:`.triton_sketch`; rows too long for that are computed twice.
* ``_permute_kernel`` (rotation, 16-bit x): the 0/±1 matrix product of :mod:`.triton_sketch`, run
  over all supergroups twice: for the maximum, then for the values. The second reading of x comes
  from the L2 cache. Its cost does not grow with c.
* :mod:`.triton_quantize_rows`: quantises rows that another kernel has written in x's dtype. A
  learned sketch writes so few of them that this beats computing it twice (one NVIDIA H200,
  16384 x 4096, c = 4: 75 µs twice).

The first two sum and quantise in float32; the third quantises X̃ rounded to x's dtype. The rules
for rows of zeros and for non-finite rows are those of :mod:`.quantize`.
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ss1_compile.kernels import triton_blocks, triton_sketch
from ss1_compile.kernels.quantize import Q_MAX
from ss1_compile.kernels.triton_decode import dependent_launch
from ss1_compile.kernels.triton_quantize_rows import (
    inverse_scale,
    larger,
    narrow,
    outputs,
    quantize_rows,
    row_scale,
    starts_early,
)

_TENSOR_CORE_DTYPES = (torch.float16, torch.bfloat16)
# Elements of a program's rows in registers: 64 floats a thread with eight warps.
_MOST_SLOTS = 16384
_MAX_VECTORS = 256


@triton.jit
def _gathered(
    x, code, j, v, rm, rows, K, G, s_xm,
    C: tl.constexpr, B8: tl.constexpr, RAGGED: tl.constexpr, BM: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Vectors v of the sketch with hash j, ``[V, BM, 8]`` float32."""
    g = v // B8
    u = v & (B8 - 1)
    acc = tl.zeros((V, BM, 8), tl.float32)
    for part in tl.static_range(C):
        h = tl.load(code + (j * G + g) * C + part, mask=g < G, other=0)
        sign = tl.where(h < 0, -1.0, 1.0)
        h8 = (h ^ (h >> 31)) // 8
        col = ((g * C + part) * B8 + ((u - h8) & (B8 - 1))) * 8
        col = col[:, None, None] + tl.arange(0, 8)[None, None, :]
        mask = rows & (g < G)[:, None, None]
        if RAGGED:
            mask = mask & (col < K)
        piece = tl.load(x + rm * s_xm + col, mask=mask, other=0.0)
        acc += piece.to(tl.float32) * sign[:, None, None]
    return acc


@triton.jit(do_not_specialize=["M", "J"])
def _gather_kernel(
    x, code, q, scale, M, J, K, G, K_c, s_xm, s_qj,
    C: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr,
    RAGGED: tl.constexpr, SPLIT_HASHES: tl.constexpr, QMAX: tl.constexpr, INTEGER: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BM rows of all hashes, or of one with SPLIT_HASHES; CHUNKS pieces of V vectors a row."""
    if PDL and EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    B8: tl.constexpr = BK // 8
    pid = tl.program_id(0)
    first = 0
    last = J
    if SPLIT_HASHES:
        first = pid % J
        last = first + 1
        pid = pid // J
    row0 = pid.to(tl.int64) * BM
    rm = tl.arange(0, BM)[None, :, None]
    rows = rm < M - row0
    x += row0 * s_xm
    q += row0 * K_c
    e = tl.arange(0, 8)[None, None, :]
    scale_rows = tl.arange(0, BM)
    for j in range(first, last):
        amax = tl.zeros((BM,), tl.float32)
        if CHUNKS == 1:
            v = tl.arange(0, V)
            acc = _gathered(x, code, j, v, rm, rows, K, G, s_xm, C, B8, RAGGED, BM, V)
            amax = tl.reduce(tl.reduce(tl.abs(acc), 2, larger), 0, larger)
        else:
            for chunk in range(CHUNKS):
                v = chunk * V + tl.arange(0, V)
                acc = _gathered(x, code, j, v, rm, rows, K, G, s_xm, C, B8, RAGGED, BM, V)
                amax = larger(amax, tl.reduce(tl.reduce(tl.abs(acc), 2, larger), 0, larger))
        s = row_scale(amax, QMAX)
        tl.store(scale + j * M + row0 + scale_rows, s, mask=scale_rows < M - row0)
        inverse = inverse_scale(s)[None, :, None]
        plane = q + tl.cast(j, tl.int64) * s_qj
        for chunk in range(CHUNKS):
            v = chunk * V + tl.arange(0, V)
            if CHUNKS > 1:
                acc = _gathered(x, code, j, v, rm, rows, K, G, s_xm, C, B8, RAGGED, BM, V)
            r = narrow(acc, inverse, INTEGER, q.dtype.element_ty)
            slot = v[:, None, None] * 8 + e
            tl.store(plane + rm * K_c + slot, r, mask=rows & (slot < K_c))
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _matrix_kernel(
    code, matrices, J, G,
    C: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, B8: tl.constexpr, TRIGGER: tl.constexpr,
):  # fmt: skip
    """The 0/±1 matrix ``[CP·B8, JP·B8]`` of one supergroup and JP hashes; see triton_sketch."""
    if TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    U: tl.constexpr = CP * B8
    V: tl.constexpr = JP * B8
    g = tl.program_id(0)
    iu = tl.arange(0, U)
    iv = tl.arange(0, V)
    part = iu // B8
    j = tl.program_id(1) * JP + iv // B8
    used = (part < C)[:, None] & (j < J)[None, :]
    h = tl.load(code + (j[None, :] * G + g) * C + part[:, None], mask=used, other=0)
    h8 = (h ^ (h >> 31)) // 8
    hit = used & (((iv[None, :] - h8) & (B8 - 1)) == (iu & (B8 - 1))[:, None])
    matrix = tl.where(hit, tl.where(h < 0, -1.0, 1.0), 0.0)
    matrices += (tl.program_id(1) * G + g) * (U * V)
    tl.store(matrices + iu[:, None] * V + iv[None, :], matrix.to(matrices.dtype.element_ty))


@triton.jit(do_not_specialize=["M", "J"])
def _permute_kernel(
    x, matrices, q, scale, M, J, K, G, K_c, s_xm, s_qj,
    C: tl.constexpr, CP: tl.constexpr, JP: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
    STAGES: tl.constexpr, RAGGED: tl.constexpr, QMAX: tl.constexpr, INTEGER: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """BM rows of JP hashes, supergroup by supergroup, twice."""
    if CHAINED:
        # the matrices are complete after the wait
        tl.extra.cuda.gdc_wait()
    if PDL and EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    B8: tl.constexpr = BK // 8
    U: tl.constexpr = CP * B8
    V: tl.constexpr = JP * B8
    blocks_j = tl.cdiv(J, JP)
    pid = tl.program_id(0)
    j0 = pid % blocks_j * JP
    row0 = (pid // blocks_j).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    rows = rm < M - row0
    x += row0 * s_xm
    q += row0 * K_c
    matrices += pid % blocks_j * G * (U * V)
    matrices += tl.arange(0, U)[:, None] * V + tl.arange(0, V)[None, :]
    ci = tl.arange(0, U * 8)
    co = tl.arange(0, V * 8)
    jo = j0 + co // BK
    # maxima stay in the product's layout until the end: a reduction per supergroup costs more than
    # all the rest (16384 x 4096, c = 8: 845 µs)
    best = tl.zeros((BM * 8, V), tl.float32)
    inverse = tl.zeros((BM * 8, V), tl.float32)
    for phase in tl.static_range(2):
        for g in tl.range(0, G, num_stages=STAGES):
            icol = g * (C * BK) + ci
            mask = rows[:, None] & (ci < C * BK)[None, :]
            if RAGGED:
                mask = mask & (icol < K)[None, :]
            icol = tl.max_contiguous(tl.multiple_of(icol, 8), 8)
            v = tl.load(x + rm[:, None] * s_xm + icol[None, :], mask=mask, other=0.0)
            a = tl.reshape(tl.permute(tl.reshape(v, (BM, U, 8)), (0, 2, 1)), (BM * 8, U))
            y = tl.dot(a, tl.load(matrices + g * (U * V)))
            if phase == 0:
                best = larger(best, tl.abs(y))
            else:
                r = narrow(y, inverse, INTEGER, q.dtype.element_ty)
                r = tl.reshape(tl.permute(tl.reshape(r, (BM, 8, V)), (0, 2, 1)), (BM, V * 8))
                ocol = jo.to(tl.int64) * s_qj + g * BK + (co & (BK - 1))
                ocol = tl.max_contiguous(tl.multiple_of(ocol, 8), 8)
                at = q + rm[:, None] * K_c + ocol[None, :]
                tl.store(at, r, mask=rows[:, None] & (jo < J)[None, :])
        if phase == 0:
            lanes = tl.reshape(best, (BM, 8, JP, B8))
            amax = tl.reduce(tl.reduce(lanes, 3, larger), 1, larger)
            s = row_scale(amax, QMAX)
            rj = j0 + tl.arange(0, JP)
            row = rj[None, :] * M + row0 + rm[:, None]
            tl.store(scale + row, s, mask=rows[:, None] & (rj < J)[None, :])
            spread = tl.broadcast_to(inverse_scale(s)[:, None, :, None], (BM, 8, JP, B8))
            inverse = tl.reshape(spread, (BM * 8, V))
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()


def default_variant(x: Tensor, code: Tensor, reduced: int) -> str:
    """``"gather"`` or ``"permute"`` for ``x [M, K]`` and the rotation code ``[J, G, c]``.

    On one NVIDIA H200, int8, in µs: 16384 x 4096, c = 2: 64 and 92, c = 4: 82 and 84, c = 8: 141
    and 91; 16384 x 1024, c = 4: 27 and 32; 8192 x 14336, c = 2: 119 and 184, c = 4: 165 and 150.
    Rows of gather are filled up to a power of two: 32768 x 768, c = 2: 35 and 36, c = 4: 44 and 40.
    """
    block_k = reduced // code.shape[1]
    vectors = triton.next_power_of_2(code.shape[2]) * block_k // 8
    if x.dtype not in _TENSOR_CORE_DTYPES or x.shape[0] <= 64 or not 16 <= vectors <= _MAX_VECTORS:
        return "gather"
    reduction = code.shape[2]
    filled = triton.next_power_of_2(reduced) > 1.1 * reduced
    wide = reduction > 4 or (reduction > 2 and (x.shape[1] > 4096 or filled))
    return "permute" if wide else "gather"


def rotation(
    x: Tensor,
    code: Tensor,
    reduced_features: int,
    dtype: torch.dtype,
    *,
    variant: str | None = None,
    tile: tuple[int, int, int] | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(q [J, M, K_c], scale [J, M])`` of ``x [M, K]`` for the rotation code int32 ``[J, G, c]``.

    Args:
        x: float16, bfloat16 or float32, any row stride; a column stride other than 1 is copied.
        code: packed signs and rotations, contiguous; ``B_K`` a power of two of at least 8.
        reduced_features: ``K_c = G·B_K``.
        dtype: int8 or float8_e4m3fn.
        variant: ``"gather"``, ``"permute"`` or ``"two"``; None chooses.
        tile: ``(slots a program or rows a program, warps, stages)`` of gather or permute.
        pdl: let a kernel launched with programmatic dependent launch begin before the end (sm_90).
    """
    hashes, groups, reduction = code.shape
    block_k = reduced_features // groups
    if x.stride(1) != 1:
        x = x.contiguous()
    variant = variant or default_variant(x, code, reduced_features)
    if variant == "two":
        sketched = triton_sketch.sketch(x, code, reduced_features)
        return quantize_rows(sketched, dtype, pdl=pdl)
    q, scale = outputs(x, hashes, reduced_features, dtype)
    rows = x.shape[0]
    if rows == 0:
        return q, scale
    pow2 = triton.next_power_of_2
    operands = (
        *(x, code, q, scale, rows, hashes, x.shape[1], groups, reduced_features),
        *(x.stride(0), q.stride(0)),
    )
    common = {
        "C": reduction,
        "BK": block_k,
        "RAGGED": x.shape[1] != reduction * reduced_features,
        "QMAX": Q_MAX[dtype],
        "INTEGER": dtype == torch.int8,
        "PDL": pdl,
        "EARLY": starts_early(rows),
    }
    if variant == "permute":
        # 16 is the smallest side of a tensor-core product
        planes_in = max(pow2(reduction), 16 * 8 // block_k)
        planes_out = max(min(pow2(hashes), 64 * 8 // block_k), 16 * 8 // block_k, 1)
        blocks = triton.cdiv(hashes, planes_out)
        sides = planes_in * planes_out * (block_k // 8) ** 2
        chained = dependent_launch(x.device)
        matrices = x.new_empty(blocks * groups * sides)
        _matrix_kernel[(groups, blocks)](
            *(code, matrices, hashes, groups),
            C=reduction,
            CP=planes_in,
            JP=planes_out,
            B8=block_k // 8,
            TRIGGER=chained,
            num_warps=4,
        )
        tile_rows, warps, stages = tile or (8, 4, 3)
        _permute_kernel[(triton.cdiv(rows, tile_rows) * blocks,)](
            *(x, matrices, *operands[2:]),
            CP=planes_in,
            JP=planes_out,
            BM=tile_rows,
            STAGES=stages,
            CHAINED=chained,
            num_warps=warps,
            **common,
            **({"launch_pdl": True} if chained else {}),
        )
        return q, scale
    few = rows <= 64
    vectors = min(pow2(reduced_features // 8), _MOST_SLOTS // 8)
    slots, warps, _ = tile or (4096, 4, 0)
    tile_rows = 1 if few else max(1, min(8, slots // (vectors * 8)))
    # No more threads than vectors of 16 bytes: narrower loads, and a reduction across more warps.
    warps = max(1, min(8 if vectors * 8 * tile_rows > 4096 else warps, vectors * tile_rows // 32))
    _gather_kernel[(triton.cdiv(rows, tile_rows) * (hashes if few else 1),)](
        *operands,
        V=vectors,
        CHUNKS=triton.cdiv(reduced_features // 8, vectors),
        BM=tile_rows,
        SPLIT_HASHES=few,
        num_warps=warps,
        **common,
    )
    return q, scale


def learned(
    x: Tensor, blocks: Tensor, dtype: torch.dtype, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """``(q [J, M, G·r], scale [J, M])`` of ``x [M, K]`` for blocks ``[J, G, gsize, r]``."""
    chained = dependent_launch(x.device)
    sketched = triton_blocks.sketch(x, blocks, pdl=chained)
    return quantize_rows(sketched, dtype, pdl=pdl, chained=chained)
