"""Grouped GEMM of 8-bit operands in Triton, dequantised in the epilogue.

    y[:, block j] = act(s_x[j] · s_zᵀ · (q[j] @ z_jᵀ) + b) + residual

The sibling of :mod:`.triton_gemm`, persistent over TMA descriptors. With both operands int8 the sum
is exact (int32); float8 sums are as precise as the tensor cores keep them.

For many rows a *weight-only* layer widens z first (:func:`widen`) and runs as a 16-bit layer:
widening inside the product, where wgmma takes it as a left operand from registers only, took 767
instead of 360 µs (one NVIDIA H200, 8192 x 4096 -> 14336, c = 4).
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ss1_compile.kernels.triton_elementwise import ACTIVATIONS
from ss1_compile.kernels.triton_gemm import _processors


@triton.jit
def _finish(
    acc, y_desc, y, q_scale, scale, bias, residual, row0, n0, n_end, M, s_ym, s_rm,
    BM: tl.constexpr, BW: tl.constexpr, TMA_OUT: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Scales, bias, activation, residual and store of one ``[BM, BW]`` piece of a tile."""
    rn = n0 + tl.arange(0, BW)
    rm = row0 + tl.arange(0, BM)
    mask = (rm < M)[:, None] & (rn < n_end)[None, :]
    v = acc.to(tl.float32)
    v *= tl.load(q_scale + rm, mask=rm < M, other=0.0)[:, None]
    v *= tl.load(scale + rn, mask=rn < n_end, other=0.0)[None, :]
    if bias is not None:
        v += tl.load(bias + rn, mask=rn < n_end, other=0.0).to(tl.float32)[None, :]
    if ACT is not None:
        v = ACT(v, y.dtype.element_ty)
    if residual is not None:
        at = rm[:, None].to(tl.int64) * s_rm + rn[None, :]
        v += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if TMA_OUT:
        y_desc.store([row0, n0], v.to(y.dtype.element_ty))
    else:
        at = rm[:, None].to(tl.int64) * s_ym + rn[None, :]
        tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _gemm_kernel(
    x_desc,
    z_desc,
    y_desc,
    y,
    q_scale,
    scale,
    bias,
    residual,
    M,
    N,
    J,
    B_N,
    K_c,
    s_ym,
    s_rm,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HALVES: tl.constexpr,
    TMA_OUT: tl.constexpr,
    ACT: tl.constexpr,
    INTEGER: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # launched while the sketch drains, to hide this launch; X̃ is complete after the wait
        tl.extra.cuda.gdc_wait()
    tiles_m = tl.cdiv(M, BM)
    tiles_block = tl.cdiv(B_N, BN)
    tiles_n = J * tiles_block
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        # GROUP_M row tiles at a time share the columns of z in L2
        group = tile // (GROUP_M * tiles_n)
        width = min(tiles_m - group * GROUP_M, GROUP_M)
        pm = group * GROUP_M + tile % (GROUP_M * tiles_n) % width
        pn = tile % (GROUP_M * tiles_n) // width
        j = pn // tiles_block
        n0 = j * B_N + pn % tiles_block * BN
        n_end = min((j + 1) * B_N, N)
        q_rows = q_scale + tl.cast(j, tl.int64) * M
        SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
        acc = tl.zeros((BM, BN), SUM)
        for k in range(tl.cdiv(K_c, BK)):
            a = x_desc.load([j * M + pm * BM, k * BK])
            b = z_desc.load([n0, k * BK])
            acc = tl.dot(a, b.T, acc, out_dtype=SUM)
        if HALVES == 1:
            _finish(
                acc, y_desc, y, q_rows, scale, bias, residual, pm * BM, n0, n_end, M, s_ym, s_rm,
                BM, BN, TMA_OUT, ACT,
            )  # fmt: skip
        else:
            # two halves: the smaller staging buffer leaves room for one more pipeline stage
            HALF: tl.constexpr = BN // 2
            low, high = tl.split(tl.permute(tl.reshape(acc, (BM, 2, HALF)), (0, 2, 1)))
            _finish(
                low, y_desc, y, q_rows, scale, bias, residual, pm * BM, n0, n_end, M, s_ym, s_rm,
                BM, HALF, TMA_OUT, ACT,
            )  # fmt: skip
            _finish(
                high, y_desc, y, q_rows, scale, bias, residual, pm * BM, n0 + HALF, n_end, M,
                s_ym, s_rm, BM, HALF, TMA_OUT, ACT,
            )  # fmt: skip


def default_tile(block_n: int) -> tuple[int, int, int, int, int]:
    """``(BM, BN, BK, warps, stages)`` for column blocks of ``block_n``.

    Two programs a multiprocessor: the epilogue of one, long beside an 8-bit product, runs while the
    other multiplies. Best of ten tiles at 24 layers, in µs, against the 128 x 256 of the 16-bit
    product: 16384 x 1024 -> 4096, c = 2, 82 and 100 (int8), 75 and 85 (float8); 8192 x 4096 ->
    14336, c = 4, 214 and 254, 204 and 216. float8 with K_c = 7168 alone loses 1 %.
    """
    if block_n <= 64:
        return 128, 64 if block_n > 32 else 32, 128, 4, 4
    return 128, 128, 128, 4, 3


def _programs_per_processor(tile: tuple[int, int, int, int, int], halves: int) -> int:
    """Two if their operands' stages and 16-bit outputs fit into 227 KiB, with 1 KiB of each."""
    tile_m, tile_n, block_k, warps, stages = tile
    memory = stages * (tile_m + tile_n) * block_k + 2 * tile_m * tile_n // halves
    return 2 if warps == 4 and memory <= 112 * 1024 else 1


def _row_tiles_per_group(out_features: int, reduced: int) -> int:
    """How many row tiles share z's columns in L2, by the rule of :mod:`.triton_gemm`."""
    if out_features > 8192:
        return 32
    return 2 if reduced <= 512 else 8


def supported(z: Tensor, hashes: int) -> bool:
    """Whether TMA can describe the operands, and a column block fills a tile."""
    return (
        z.shape[1] % 16 == 0
        and z.stride(1) == 1
        and z.stride(0) % 16 == 0
        and z.data_ptr() % 16 == 0
        and -(-z.shape[0] // hashes) >= 32
    )


@triton.jit
def _widen_kernel(z, scale, out, K_c, SIZE, s_zn, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K_c
    v = tl.load(z + row * s_zn + k, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(scale + row * GROUPS + (k // SIZE if GROUPS > 1 else 0 * k), mask=inside, other=0.0)
    tl.store(out + row * K_c + k, (v * s).to(out.dtype.element_ty), mask=inside)


def widen(z: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale · z`` in ``dtype``, ``[N, K_c]``; ``scale`` contiguous float32 ``[N, groups]``."""
    rows, reduced = z.shape
    out = z.new_empty(rows, reduced, dtype=dtype)
    block = min(1024, triton.next_power_of_2(reduced))
    _widen_kernel[(rows, triton.cdiv(reduced, block))](
        *(z, scale, out, reduced, reduced // scale.shape[1], z.stride(0)),
        GROUPS=scale.shape[1],
        BLOCK=block,
        num_warps=4,
    )
    return out


def grouped_matmul(
    sketched: Tensor,
    sketched_scale: Tensor,
    z: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: tuple[int, int, int, int, int] | None = None,
    pdl: bool = False,
) -> Tensor:
    """``[M, N]`` of ``dtype`` for every column block j; see :func:`supported`.

    Args:
        sketched: contiguous ``[J, M, K_c]``, quantised like z.
        sketched_scale: contiguous float32 ``[J, M]``.
        z: int8 or float8 ``[N, K_c]``, unit column stride.
        scale: contiguous float32 ``[N, 1]``.
        bias: ``[N]`` or None.
        dtype: of y.
        activation: a key of :data:`.triton_elementwise.ACTIVATIONS`.
        residual: ``[M, N]`` with unit column stride, or None.
        out: ``[M, N]`` to write to, with unit column stride.
        tile: overrides :func:`default_tile`.
        pdl: launch as dependent of the previous kernel, which must be the sketch (sm_90).
    """
    hashes, rows, reduced = sketched.shape
    out_features = z.shape[0]
    y = sketched.new_empty(rows, out_features, dtype=dtype) if out is None else out
    if rows == 0:
        return y
    block_n = -(-out_features // hashes)
    tile_m, tile_n, block_k, warps, stages = tile or default_tile(block_n)
    if dtype == torch.float32 and tile is None:
        # y's staging buffer is twice as large
        warps, stages = 8, min(stages, 3)
    if activation != "none" or residual is not None:
        # with four warps the epilogue's values spill; the residual's tile takes a stage's room
        warps, stages = 8, min(stages, 3)
    # a TMA store cannot stop at a column block's end, only at y's
    whole = block_n % tile_n == 0 and out_features == hashes * block_n
    unit = 16 // y.element_size()
    tma_out = whole and y.stride(0) % unit == 0 and y.data_ptr() % 16 == 0
    halves = 2 if tile_n >= 128 else 1
    several = _programs_per_processor((tile_m, tile_n, block_k, warps, stages), halves)
    programs = several * _processors(y.device)
    tiles = triton.cdiv(rows, tile_m) * hashes * triton.cdiv(block_n, tile_n)
    y_desc = None
    if tma_out:
        y_desc = TensorDescriptor(y, list(y.shape), [y.stride(0), 1], [tile_m, tile_n // halves])
    _gemm_kernel[(min(programs, tiles),)](
        TensorDescriptor(sketched, [hashes * rows, reduced], [reduced, 1], [tile_m, block_k]),
        TensorDescriptor(z, [out_features, reduced], [z.stride(0), 1], [tile_n, block_k]),
        *(y_desc, y, sketched_scale, scale, bias, residual, rows, out_features, hashes),
        *(block_n, reduced, y.stride(0), 0 if residual is None else residual.stride(0)),
        BM=tile_m,
        BN=tile_n,
        BK=block_k,
        GROUP_M=_row_tiles_per_group(out_features, reduced),
        PROGRAMS=programs,
        HALVES=halves,
        TMA_OUT=tma_out,
        ACT=ACTIVATIONS[activation],
        INTEGER=z.dtype == torch.int8,
        PDL=pdl,
        num_warps=warps,
        num_stages=stages,
        **({"launch_pdl": True} if pdl else {}),
    )
    return y
