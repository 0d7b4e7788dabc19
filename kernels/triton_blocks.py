"""Learned sketch and its transpose in Triton: a block-diagonal product on the tensor cores.

    X̃[j, m, g·r : (g+1)·r]           = x[m, g·gsize : (g+1)·gsize] @ S[j, g]            (sketch)
    x'[m, g·gsize : (g+1)·gsize]     = Σ_j g[j, m, g·r : (g+1)·r] @ S[j, g]ᵀ           (unsketch)

One kernel does both. A program walks consecutive groups of one row tile, so that loads are
pipelined across groups. Fraction of copy bandwidth on one NVIDIA H200 at 16384 x 4096, groups of
128, r = 64/32/16: 0.90/0.91/0.94. ``gsize`` and ``r`` are compile-time constants: with r = 24
passed as an integer, masks are not known to be whole vectors (0.60 instead of 0.80).
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

# bytes beside the stages: rows of a prologue on their way to the product, and the result's
_STAGED_RESULT = 16 << 10


@triton.jit(do_not_specialize=["M", "G", "NO", "STEPS"])
def _block_kernel(
    x,
    blocks,
    out,
    aux,
    M,
    K_in,
    K_out,
    G,
    NO,
    STEPS,
    s_im,
    s_ip,
    s_om,
    s_op,
    bs_o,
    bs_i,
    NI: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TRIGGER: tl.constexpr,
    MASK_IN: tl.constexpr,
    MASK_OUT: tl.constexpr,
    PREPARE: tl.constexpr,
    PROLOGUE: tl.constexpr,
):
    """BM rows x BQ outputs of STEPS groups: the sum over NI planes and CHUNKS pieces of P."""
    if TRIGGER:
        # the next kernel may be launched now; it waits for this one before it reads X̃
        tl.extra.cuda.gdc_launch_dependents()
    tiles_g = tl.cdiv(G, STEPS)
    tiles_q = tl.cdiv(Q, BQ)
    pid = tl.program_id(0)
    rq = pid % tiles_q * BQ + tl.arange(0, BQ)
    g0 = pid // tiles_q % tiles_g * STEPS
    row0 = (pid // (tiles_q * tiles_g)).to(tl.int64) * BM
    rm = tl.arange(0, BM)[:, None]
    rows = rm < M - row0
    x += row0 * s_im
    out += row0 * s_om
    INNER: tl.constexpr = NI * CHUNKS
    for o in range(NO):
        acc = tl.zeros((BM, BQ), tl.float32)
        for it in tl.range(0, STEPS * INNER, num_stages=STAGES):
            g = g0 + it // INNER
            i = it % INNER // CHUNKS
            rp = it % CHUNKS * BP + tl.arange(0, BP)
            col = g * P + rp
            mask = rows & (rp < P)[None, :] & (g < G)
            if MASK_IN:
                mask = mask & (col < K_in)[None, :]
            v = tl.load(
                x + tl.cast(i, tl.int64) * s_ip + rm * s_im + col[None, :], mask=mask, other=0.0
            )
            if PROLOGUE is not None:
                ready = None
                if PREPARE is not None:
                    ready = PREPARE(col[None, :], aux)
                v = PROLOGUE(v, row0 + rm, col[None, :], mask, aux, ready)
                v = tl.where(mask, v, 0.0).to(x.dtype.element_ty)
            at = rq[None, :] * P + rp[:, None] if TRANSPOSED else rp[:, None] * Q + rq[None, :]
            s = tl.load(
                blocks + o * bs_o + i * bs_i + g * (P * Q) + at,
                mask=(rp < P)[:, None] & (rq < Q)[None, :] & (g < G),
                other=0.0,
            )
            acc = tl.dot(v, s, acc, input_precision="ieee")
            # a static branch where every step is a whole group: the store then pipelines
            if INNER == 1 or it % INNER == INNER - 1:
                ocol = g * Q + rq
                keep = rows & (rq < Q)[None, :] & (g < G)
                if MASK_OUT:
                    keep = keep & (ocol < K_out)[None, :]
                tl.store(
                    out + tl.cast(o, tl.int64) * s_op + rm * s_om + ocol[None, :],
                    acc.to(out.dtype.element_ty),
                    mask=keep,
                )
                acc = tl.zeros((BM, BQ), tl.float32)


@lru_cache(maxsize=4096)
def _plan(
    dtype: torch.dtype,
    rows: int,
    groups: int,
    sizes: tuple[int, int, int, int],
    counts: tuple[int, int],
    strides: tuple[int, ...],
    masks: tuple[bool, bool],
    transposed: bool,
    prologue: Any,
    pdl: bool,
    room: int,
) -> Launch:
    """``sizes``: P, Q, K_in, K_out; ``counts``: output and input planes; ``room`` in bytes."""
    p, q, columns_in, columns_out = sizes
    prepare, prologue = prologue if isinstance(prologue, tuple) else (None, prologue)
    wide = dtype == torch.float32
    # 16 is the smallest side of a tensor-core product; 128 keeps four stages in 227 KiB
    block_p = min(64 if wide else 128, max(16, power_of_2(p)))
    block_q = min(64 if wide else 128, max(16, power_of_2(q)))
    tile = 64
    tiles = ceil_div(rows, tile) * ceil_div(q, block_q)
    # measured best of 25 in both directions at r = 8 … 64; with few groups, cutting them leaves
    # uneven programs (0.66 instead of 0.78 of copy bandwidth at K = 768)
    most = 8 if transposed or groups <= 8 else 4
    steps = max(1, min(most, tiles * groups // 512, groups))
    stage = (tile * block_p + block_p * block_q) * dtype.itemsize
    stages = stages_within(room - _STAGED_RESULT, 4 if transposed else 3, stage)
    constants = {
        "NI": counts[1],
        "P": p,
        "Q": q,
        "BM": tile,
        "BP": block_p,
        "BQ": block_q,
        "CHUNKS": ceil_div(p, block_p),
        "STAGES": stages,
        "TRANSPOSED": transposed,
        "TRIGGER": pdl,
        "MASK_IN": masks[0],
        "MASK_OUT": masks[1],
        "PREPARE": prepare,
        "PROLOGUE": prologue,
    }
    return Launch(
        _block_kernel,
        (tiles * ceil_div(groups, steps),),
        (rows, columns_in, columns_out, groups, counts[0], steps, *strides),
        constants,
        num_warps=4,
    )


def sketch(
    x: Tensor,
    blocks: Tensor,
    *,
    prologue: Any = None,
    aux: Any = None,
    pdl: bool = False,
) -> Tensor:
    """``X̃ [J, M, G·r]`` of ``x [M, K]`` for learned blocks ``[J, G, gsize, r]`` of x's dtype.

    ``K`` may be ragged (``K <= G·gsize``); ``prologue``, ``aux`` and ``pdl`` as in
    :func:`ss1_compile.kernels.triton_sketch.sketch`.
    """
    hashes, groups, size, rank = blocks.shape
    rows, features = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    reduced = groups * rank
    out = x.new_empty(hashes, rows, reduced)
    if rows:
        plan = _plan(
            *(x.dtype, rows, groups),
            (size, rank, features, reduced),
            (hashes, 1),
            (x.stride(0), 0, reduced, rows * reduced, groups * size * rank, 0),
            (features != groups * size, False),
            *(False, prologue, pdl, shared_memory(x.device)),
        )
        plan(x, blocks.contiguous(), out, aux)
    return out


def unsketch(g: Tensor, blocks: Tensor, in_features: int) -> Tensor:
    """The transpose: ``[M, K]`` of ``g [J, M, G·r]``."""
    hashes, groups, size, rank = blocks.shape
    rows, reduced = g.shape[1:]
    if g.stride(2) != 1:
        g = g.contiguous()
    out = g.new_empty(rows, in_features)
    if rows:
        plan = _plan(
            *(g.dtype, rows, groups),
            (rank, size, reduced, in_features),
            (1, hashes),
            (g.stride(1), g.stride(0), in_features, 0, 0, groups * size * rank),
            (False, in_features != groups * size),
            *(True, None, False, shared_memory(g.device)),
        )
        plan(g, blocks.contiguous(), out, None)
    return out
