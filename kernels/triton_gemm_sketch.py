"""A product, its activation and the next layer's learned sketch in one kernel.

    X̃' [M, G·r]:  X̃'[:, g·r : (g+1)·r] = h[:, g·gsize : (g+1)·gsize] @ S'[g]
    h = act(X̃ zᵀ + b), or act(X̃ z_gateᵀ + b_gate) · (X̃ zᵀ + b)

h is never written: a tile of it goes from the accumulators of one product into those of another, as
the probabilities of an attention kernel do, and only its c times narrower sketch is stored. Of a
feed-forward block of 16384 rows, 1024 → 4096 → 1024, c = 4, bf16, one NVIDIA H200: 106 µs with
gelu, where product, activation and sketch take 212 apart (71 + 141).
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ss1_compile.kernels import triton_gemm
from ss1_compile.kernels.launch import Block, Launch, ceil_div, power_of_2
from ss1_compile.kernels.triton_elementwise import ACTIVATIONS


@triton.jit
def _product(
    x_desc, z_desc, gate_desc, row0, n0, K_c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Float32 ``[BM, BN]``: columns ``n0 …`` of ``X̃ zᵀ`` and of the gate's product, or zeros."""
    h = tl.zeros((BM, BN), tl.float32)
    gate = tl.zeros((BM, BN), tl.float32)
    for k in range(tl.cdiv(K_c, BK)):
        a = x_desc.load([row0, k * BK])
        h = tl.dot(a, z_desc.load([n0, k * BK]).T, h)
        if gate_desc is not None:
            gate = tl.dot(a, gate_desc.load([n0, k * BK]).T, gate)
    return h, gate


@triton.jit
def _biased(v, bias, columns, mask):
    """``v + b``, where there is a bias."""
    if bias is not None:
        v += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    return v


@triton.jit(do_not_specialize=["M"])
def _gemm_sketch_kernel(
    x_desc,
    z_desc,
    gate_desc,
    bias,
    gate_bias,
    blocks,
    out,
    M,
    N,
    K_c,
    G,
    s_om,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACT: tl.constexpr,
):
    """One program: BM rows of one group, in pieces of BN columns."""
    tiles_m = tl.cdiv(M, BM)
    tile = tl.program_id(0)
    # GROUP_M row tiles at a time share a group's rows of z in L2
    band = tile // (GROUP_M * G)
    width = min(tiles_m - band * GROUP_M, GROUP_M)
    row0 = (band * GROUP_M + tile % (GROUP_M * G) % width) * BM
    g = tile % (GROUP_M * G) // width
    rn = tl.arange(0, BN)
    rr = tl.arange(0, BR)
    PIECES: tl.constexpr = (SIZE + BN - 1) // BN
    sketched = tl.zeros((BM, BR), tl.float32)
    for piece in tl.static_range(PIECES):
        column = piece * BN + rn
        inside = column < SIZE
        n0 = g * SIZE + piece * BN
        h, gate = _product(x_desc, z_desc, gate_desc, row0, n0, K_c, BM, BN, BK)
        known = inside & (n0 + rn < N)
        h = _biased(h, bias, n0 + rn, known)
        if gate_desc is not None:
            gate = _biased(gate, gate_bias, n0 + rn, known)
            if ACT is not None:
                gate = ACT(gate, out.dtype.element_ty)
            h *= gate
        elif ACT is not None:
            h = ACT(h, out.dtype.element_ty)
        # columns of the next group, and beyond N, meet rows of zeros
        s = tl.load(
            blocks + g * (SIZE * RANK) + column[:, None] * RANK + rr[None, :],
            mask=inside[:, None] & (rr < RANK)[None, :],
            other=0.0,
        )
        sketched = tl.dot(h.to(s.dtype), s, sketched)
    rm = row0 + tl.arange(0, BM)
    tl.store(
        out + rm[:, None].to(tl.int64) * s_om + g * RANK + rr[None, :],
        sketched.to(out.dtype.element_ty),
        mask=(rm < M)[:, None] & (rr < RANK)[None, :],
    )


def supported(sketched: Tensor, z: Tensor, blocks: Tensor) -> bool:
    """Whether the kernel takes the operands: J = 1 on both sides, and what TMA asks of X̃ and z."""
    return (
        sketched.shape[0] == 1
        and blocks.shape[0] == 1
        and blocks.dtype == sketched.dtype
        and blocks.shape[3] <= 128
        and triton_gemm.supported(sketched, z)
    )


def default_tile(
    rows: int, groups: tuple[int, int, int], reduced: int, gated: bool
) -> tuple[int, int, int, int, int | None]:
    """``(BM, BN, warps, stages, registers)``, measured at thirteen shapes from 1 to 32768 rows.

    Four warps leave two or three programs to a processor: one computes activations while the
    others' products run. Where K_c is long, eight warps with at most 128 registers (16384, 512 →
    4096: 163 instead of 168 µs). A gated product multiplies 256 columns with every piece of X̃ that
    it loads, as the library does: 8192, 992 → 14336 712 µs; one product after the other 1045.

    Args:
        rows: M.
        groups: G, gsize and r.
        reduced: ``K_c``.
        gated: whether there are two products.
    """
    count, size, rank = groups
    few = rows <= 64 or (reduced <= 256 and ceil_div(rows, 128) * count <= 132)
    if size % 128 in range(1, 65):  # 192: three pieces of 64 in place of two of 128
        return (64, 64, 4, 4, None) if few or gated or rank > 64 else (128, 64, 4, 3, 168)
    wide = rank > 64  # whose sums do not fit into the registers beside two products, or into 128
    if few:
        return (64, 64, 4, 3, None) if gated and wide else (64, 128, 4, 3, None)
    if gated:
        return (128, 64, 8, 3, None) if wide else (128, 128, 8, 4 if reduced > 512 else 3, None)
    if reduced < 512:
        return 128, 128, 4, 3, None
    return 128, 128, 8, 3, None if wide else 128


@lru_cache(maxsize=4096)
def _plan(
    rows: int,
    reduced: int,
    out_features: int,
    groups: tuple[int, int, int],
    z_stride: int,
    gate_stride: int | None,
    activation: Any,
    tile: tuple[int, int, int, int, int | None] | None,
) -> Launch:
    count, size, rank = groups
    chosen = tile or default_tile(rows, groups, reduced, gate_stride is not None)
    tile_m, tile_n, warps, stages, registers = chosen
    block_k = 64
    blocks = {
        0: Block((rows, reduced), (reduced, 1), (tile_m, block_k)),
        1: Block((out_features, reduced), (z_stride, 1), (tile_n, block_k)),
    }
    if gate_stride is not None:
        blocks[2] = Block((out_features, reduced), (gate_stride, 1), (tile_n, block_k))
    constants = {
        "SIZE": size,
        "RANK": rank,
        "BM": tile_m,
        "BN": tile_n,
        "BK": block_k,
        "BR": max(16, power_of_2(rank)),
        "GROUP_M": 8,
        "ACT": activation,
    }
    return Launch(
        _gemm_sketch_kernel,
        (ceil_div(rows, tile_m) * count,),
        (rows, out_features, reduced, count, count * rank),
        constants,
        blocks=blocks,
        num_warps=warps,
        num_stages=stages,
        **({} if registers is None else {"maxnreg": registers}),
    )


def matmul_sketch(
    sketched: Tensor,
    z: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    activation: str,
    *,
    gate: tuple[Tensor, Tensor | None] | None = None,
    tile: tuple[int, int, int, int, int | None] | None = None,
) -> Tensor:
    """``X̃' [1, M, G·r]`` of ``act(X̃ zᵀ + b)``, or of ``act(X̃ z_gateᵀ + b_gate)·(X̃ zᵀ + b)``.

    Args:
        sketched: contiguous ``[1, M, K_c]``, float16 or bfloat16; see :func:`supported`.
        z: ``[N, K_c]``, unit column stride.
        bias: ``[N]`` or None.
        blocks: learned blocks ``[1, G, gsize, r]`` of the next layer, of X̃'s dtype;
            ``N <= G·gsize``.
        activation: a key of :data:`.triton_elementwise.ACTIVATIONS`.
        gate: ``z`` and bias of the product that the activation applies to instead, as ``z``.
        tile: overrides :func:`default_tile`.
    """
    _, rows, reduced = sketched.shape
    _, groups, size, rank = blocks.shape
    out = sketched.new_empty(1, rows, groups * rank)
    if rows == 0:
        return out
    z_gate, gate_bias = (None, None) if gate is None else gate
    plan = _plan(
        *(rows, reduced, z.shape[0], (groups, size, rank), z.stride(0)),
        None if z_gate is None else z_gate.stride(0),
        ACTIVATIONS[activation],
        tile,
    )
    plan(sketched, z, z_gate, bias, gate_bias, blocks.contiguous(), out)
    return out
