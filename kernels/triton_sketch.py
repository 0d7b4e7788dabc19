"""Rotation sketch and its transpose in Triton: read the input once, write the output once.

    X̃[j, m, g·B_K+u]      = Σ_l s[j,g,l] · x[m, (g·c+l)·B_K + (u - h[j,g,l]) mod B_K]     (sketch)
    x'[m, (g·c+l)·B_K+t]  = Σ_j s[j,g,l] · g[j, m, g·B_K + (t + h[j,g,l]) mod B_K]      (unsketch)

Both sum *planes*: the sketch sums the ``c`` chunks of a supergroup into ``J`` hashes, its transpose
sums the ``J`` hashes into ``c`` chunks. One kernel does either; only strides and the direction of
the rotation change. There are two kernels:

* ``_permute_kernel`` (16-bit types). Rotations are multiples of 8, so seen as vectors of 8 elements
  a supergroup's sketch is one small 0/±1 matrix ``[c·B_K/8, J·B_K/8]``, and the tensor cores apply
  it to the tile ``[8·rows, c·B_K/8]``. Products are exact, sums are float32. Every element is
  loaded once however many hashes there are. Fraction of copy bandwidth on one NVIDIA H200 at
  16384 x 4096, B_K = 64, J = c = 2/4/8: 0.94/0.93/0.89, where gathering c·J times through L1
  reached 0.94/0.86/0.46.
* ``_gather_kernel``: plain loads and float32 additions, for float32, for few rows (its programs
  also split the hashes, 2 µs at M <= 16) and for supergroups too large for the matrix above.

Mind the order of a tile's dimensions. Triton lays the lanes of a warp along the most contiguous
dimension, and of equals along the *first*: as ``[rows, vectors, 8]`` they walk rows, which cost a
third of the bandwidth. Hence ``[rows, columns]`` with an explicit hint that runs of 8 columns are
contiguous in one kernel, ``[vectors, rows, 8]`` in the other.

A *prologue* maps loaded values, for a producer fused into the sketch: a ``@triton.jit`` function
``(values, rows, columns, mask, aux, ready) -> values``. ``values`` have x's dtype, ``rows`` and
``columns`` index x and broadcast against them, and what it returns outside ``mask`` is ignored.
As a pair of functions the first, ``(columns, aux) -> ready``, runs once for all row tiles.
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

from ss1_compile.kernels.launch import Launch, ceil_div, power_of_2

_TENSOR_CORE_DTYPES = (torch.float16, torch.bfloat16)
# Largest input side of the 0/±1 matrix: its cost per element grows with it, and at 256 the tensor
# cores need about as long as memory.
_MAX_VECTORS = 256
_FEW_ROWS = 64


@triton.jit(do_not_specialize=["M", "G", "NO", "STEPS"])
def _permute_kernel(
    x,
    code,
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
    s_ig,
    s_om,
    s_op,
    s_og,
    cs_o,
    cs_i,
    cs_g,
    NI: tl.constexpr,
    IB: tl.constexpr,
    OB: tl.constexpr,
    GB: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    INVERSE: tl.constexpr,
    MASK_IN: tl.constexpr,
    MASK_OUT: tl.constexpr,
    TRIGGER: tl.constexpr,
    PREPARE: tl.constexpr,
    PROLOGUE: tl.constexpr,
):
    """``STEPS`` row tiles of GB supergroups: NI input planes to OB of the NO output planes."""
    if TRIGGER:
        # the next kernel may be launched now; it waits for this one before it reads X̃
        tl.extra.cuda.gdc_launch_dependents()
    B8: tl.constexpr = BK // 8
    U: tl.constexpr = GB * IB * B8
    V: tl.constexpr = OB * GB * B8
    blocks_g = tl.cdiv(G, GB)
    blocks_o = tl.cdiv(NO, OB)
    pid = tl.program_id(0)
    g0 = (pid % blocks_g) * GB
    o0 = pid // blocks_g % blocks_o * OB
    first = pid // (blocks_g * blocks_o) * STEPS

    # The 0/±1 matrix, built once per program. Vectors are ordered as they lie in memory: chunks
    # (g, l, u), sketches (j, g, u).
    iu = tl.arange(0, U)
    iv = tl.arange(0, V)
    gi = g0 + (iu // B8 % GB if INVERSE else iu // (IB * B8))
    i = iu // (GB * B8) if INVERSE else iu // B8 % IB
    go = g0 + (iv // (OB * B8) if INVERSE else iv // B8 % GB)
    o = o0 + (iv // B8 % OB if INVERSE else iv // (GB * B8))
    used = ((gi < G) & (i < NI))[:, None] & (o < NO)[None, :] & (gi[:, None] == go[None, :])
    h = tl.load(code + o[None, :] * cs_o + (gi * cs_g + i * cs_i)[:, None], mask=used, other=0)
    h8 = (h ^ (h >> 31)) // 8
    source = (iv[None, :] + (h8 if INVERSE else -h8)) & (B8 - 1)
    hit = used & (source == (iu & (B8 - 1))[:, None])
    matrix = tl.where(hit, tl.where(h < 0, -1.0, 1.0), 0.0).to(x.dtype.element_ty)

    # element columns of the two tiles
    ci = tl.arange(0, U * 8)
    gi = g0 + (ci // BK % GB if INVERSE else ci // (IB * BK))
    i = ci // (GB * BK) if INVERSE else ci // BK % IB
    mask_in = (gi < G) & (i < NI)
    if INVERSE:
        icol = gi * s_ig + i.to(tl.int64) * s_ip + (ci & (BK - 1))
    else:
        icol = gi * s_ig + i * s_ip + (ci & (BK - 1))
    if MASK_IN:
        mask_in = mask_in & (icol < K_in)
    co = tl.arange(0, V * 8)
    go = g0 + (co // (OB * BK) if INVERSE else co // BK % GB)
    o = o0 + (co // BK % OB if INVERSE else co // (GB * BK))
    mask_out = (go < G) & (o < NO)
    ocol = go * s_og + o.to(tl.int64) * s_op + (co & (BK - 1))
    if MASK_OUT:
        mask_out = mask_out & (ocol < K_out)
    icol = tl.max_contiguous(tl.multiple_of(icol, 8), 8)
    ocol = tl.max_contiguous(tl.multiple_of(ocol, 8), 8)

    ready = None
    if PREPARE is not None:
        ready = PREPARE(icol[None, :], aux)
    rm = tl.arange(0, BM)
    for step in tl.range(first, first + STEPS, num_stages=STAGES):
        row0 = tl.cast(step, tl.int64) * BM
        rows = rm < M - row0
        mask = rows[:, None] & mask_in[None, :]
        v = tl.load(x + row0 * s_im + rm[:, None] * s_im + icol[None, :], mask=mask, other=0.0)
        if PROLOGUE is not None:
            v = PROLOGUE(v, row0 + rm[:, None], icol[None, :], mask, aux, ready)
            v = tl.where(mask, v, 0.0).to(x.dtype.element_ty)
        a = tl.reshape(tl.permute(tl.reshape(v, (BM, U, 8)), (0, 2, 1)), (BM * 8, U))
        y = tl.dot(a, matrix).to(out.dtype.element_ty)
        y = tl.reshape(tl.permute(tl.reshape(y, (BM, 8, V)), (0, 2, 1)), (BM, V * 8))
        tl.store(
            out + row0 * s_om + rm[:, None] * s_om + ocol[None, :],
            y,
            mask=rows[:, None] & mask_out[None, :],
        )


@triton.jit
def _gather_plane(
    x, code, aux, o, i, g, u, row0, rm, rows, G, K_in, s_im, s_ip, s_ig, cs_o, cs_i, cs_g,
    BK: tl.constexpr, INVERSE: tl.constexpr, MASK_IN: tl.constexpr,
    PREPARE: tl.constexpr, PROLOGUE: tl.constexpr,
):  # fmt: skip
    """The rotated, signed piece of input plane i that belongs to output plane o, in float32."""
    h = tl.load(code + o * cs_o + i * cs_i + g * cs_g, mask=g < G, other=0)
    sign = tl.where(h < 0, -1.0, 1.0)
    h8 = (h ^ (h >> 31)) // 8
    turned = (u + (h8 if INVERSE else -h8)) & (BK // 8 - 1)
    col = (tl.cast(i, tl.int64) * s_ip + g * s_ig + turned * 8)[:, None, None]
    col = col + tl.arange(0, 8)[None, None, :]
    mask = rows
    if MASK_IN:
        mask = mask & (col < K_in)
    v = tl.load(x + rm * s_im + col, mask=mask, other=0.0)
    if PROLOGUE is not None:
        ready = None
        if PREPARE is not None:
            ready = PREPARE(col, aux)
        v = tl.where(mask, PROLOGUE(v, row0 + rm, col, mask, aux, ready), 0.0)
    return v.to(tl.float32) * sign[:, None, None]


@triton.jit(do_not_specialize=["M", "G", "NO"])
def _gather_kernel(
    x,
    code,
    out,
    aux,
    M,
    K_in,
    K_out,
    G,
    NO,
    s_im,
    s_ip,
    s_ig,
    s_om,
    s_op,
    s_og,
    cs_o,
    cs_i,
    cs_g,
    NI: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    GB: tl.constexpr,
    INVERSE: tl.constexpr,
    MASK_IN: tl.constexpr,
    MASK_OUT: tl.constexpr,
    SPLIT_OUT: tl.constexpr,
    TRIGGER: tl.constexpr,
    PREPARE: tl.constexpr,
    PROLOGUE: tl.constexpr,
):
    """BM rows of GB supergroups; all output planes, or one of them with SPLIT_OUT."""
    if TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    B8: tl.constexpr = BK // 8
    blocks_g = tl.cdiv(G, GB)
    pid = tl.program_id(0)
    if SPLIT_OUT:
        o_first = pid % NO
        o_last = o_first + 1
        pid = pid // NO
    else:
        o_first = 0
        o_last = NO
    row0 = (pid // blocks_g).to(tl.int64) * BM
    w = tl.arange(0, GB * B8)
    g = pid % blocks_g * GB + w // B8
    u = w & (B8 - 1)
    rm = tl.arange(0, BM)[None, :, None]
    rows = (rm < M - row0) & (g < G)[:, None, None]
    x += row0 * s_im
    out += row0 * s_om
    for o in range(o_first, o_last):
        acc = tl.zeros((GB * B8, BM, 8), tl.float32)
        if NI <= 16:
            for i in tl.static_range(NI):
                acc += _gather_plane(
                    x, code, aux, o, i, g, u, row0, rm, rows, G, K_in, s_im, s_ip, s_ig,
                    cs_o, cs_i, cs_g, BK, INVERSE, MASK_IN, PREPARE, PROLOGUE,
                )  # fmt: skip
        else:
            for i in range(NI):
                acc += _gather_plane(
                    x, code, aux, o, i, g, u, row0, rm, rows, G, K_in, s_im, s_ip, s_ig,
                    cs_o, cs_i, cs_g, BK, INVERSE, MASK_IN, PREPARE, PROLOGUE,
                )  # fmt: skip
        ocol = (tl.cast(o, tl.int64) * s_op + g * s_og + u * 8)[:, None, None]
        ocol = ocol + tl.arange(0, 8)[None, None, :]
        mask = rows
        if MASK_OUT:
            mask = mask & (ocol < K_out)
        tl.store(out + rm * s_om + ocol, acc.to(out.dtype.element_ty), mask=mask)


@lru_cache(maxsize=4096)
def _plan(
    dtype: torch.dtype,
    rows: int,
    block_k: int,
    groups: int,
    planes_in: tuple[int, int, int],
    planes_out: tuple[int, int, int],
    code_strides: tuple[int, int, int],
    limits: tuple[int | None, int | None],
    row_strides: tuple[int, int],
    prologue: Any,
    pdl: bool,
) -> Launch:
    """Choose kernel and tile. ``planes_*``: (count, plane stride, supergroup stride)."""
    prepare, prologue = prologue if isinstance(prologue, tuple) else (None, prologue)
    (count_in, plane_in, group_in), (count_out, plane_out, group_out) = planes_in, planes_out
    inverse = limits[1] is not None
    columns_in = group_in * groups if limits[0] is None else limits[0]
    columns_out = group_out * groups if limits[1] is None else limits[1]
    strides = (
        *(row_strides[0], plane_in, group_in, row_strides[1], plane_out, group_out),
        *code_strides,
    )
    common = {
        "BK": block_k,
        "INVERSE": inverse,
        "MASK_IN": limits[0] is not None and limits[0] != groups * group_in,
        "MASK_OUT": limits[1] is not None and limits[1] != groups * group_out,
        "TRIGGER": pdl,
        "PREPARE": prepare,
        "PROLOGUE": prologue,
    }
    vectors = power_of_2(count_in) * block_k // 8
    few = rows <= _FEW_ROWS
    if dtype not in _TENSOR_CORE_DTYPES or few or vectors > _MAX_VECTORS:
        batch = min(max(1, 64 // block_k), power_of_2(groups))
        # few rows are all latency: small programs, and no rows that are only masked
        size = 512 if rows <= 4 else 1024 if few else 2048
        tile = max(4, size // (batch * block_k))
        if rows <= 4:
            tile = 4
        programs = ceil_div(rows, tile) * ceil_div(groups, batch)
        return Launch(
            _gather_kernel,
            (programs * (count_out if few else 1),),
            (rows, columns_in, columns_out, groups, count_out, *strides),
            {"NI": count_in, "BM": tile, "GB": batch, "SPLIT_OUT": few, **common},
            num_warps=2 if rows <= 4 else 4,
        )
    # enough supergroups for rows of 512 bytes: 0.94 instead of 0.90 of copy bandwidth at c = 2
    batch = 1
    while batch < power_of_2(groups) and batch * vectors * 8 < 256:
        batch *= 2
    while batch * vectors < 16:
        batch *= 2
    widest = 64 if batch * vectors >= 128 else 128
    block_out = min(power_of_2(count_out), max(1, widest // (batch * block_k // 8)))
    while block_out * batch * block_k < 128:
        block_out *= 2
    tiles = ceil_div(rows, 8)
    columns = ceil_div(groups, batch) * ceil_div(count_out, block_out)
    # eight row tiles a program amortise the matrix; fewer where that would leave the GPU idle
    steps = max(1, min(8, tiles * columns // 1024))
    constants = {
        "NI": count_in,
        "IB": power_of_2(count_in),
        "OB": block_out,
        "GB": batch,
        "BM": 8,
        "STAGES": 3,
        **common,
    }
    return Launch(
        _permute_kernel,
        (ceil_div(tiles, steps) * columns,),
        (rows, columns_in, columns_out, groups, count_out, steps, *strides),
        constants,
        num_warps=4,
    )


def sketch(
    x: Tensor,
    code: Tensor,
    reduced_features: int,
    *,
    prologue: Any = None,
    aux: Any = None,
    pdl: bool = False,
) -> Tensor:
    """``X̃ [J, M, K_c]`` of ``x [M, K]`` for the rotation code int32 ``[J, G, c]``.

    Args:
        x: float16, bfloat16 or float32, any row stride; a column stride other than 1 is copied.
        code: packed signs and rotations, contiguous.
        reduced_features: ``K_c = G·B_K``; ``K`` may be ragged (``K <= c·K_c``).
        prologue: a producer to apply to loaded values (see the module), or None.
        aux: a tensor, or a tuple of tensors, numbers and None, for the prologue.
        pdl: let a kernel launched with programmatic dependent launch start early (sm_90).
    """
    hashes, groups, reduction = code.shape
    rows, features = x.shape
    block_k = reduced_features // groups
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty(hashes, rows, reduced_features)
    if rows:
        plan = _plan(
            *(x.dtype, rows, block_k, groups),
            (reduction, block_k, reduction * block_k),
            (hashes, rows * reduced_features, block_k),
            (groups * reduction, 1, reduction),
            (features, None),
            (x.stride(0), reduced_features),
            *(prologue, pdl),
        )
        plan(x, code, out, aux)
    return out


def unsketch(g: Tensor, code: Tensor, in_features: int) -> Tensor:
    """The transpose: ``[M, K]`` of ``g [J, M, K_c]``; the gradient of x given that of X̃."""
    hashes, groups, reduction = code.shape
    rows = g.shape[1]
    block_k = g.shape[2] // groups
    if g.stride(2) != 1:
        g = g.contiguous()
    out = g.new_empty(rows, in_features)
    if rows:
        plan = _plan(
            *(g.dtype, rows, block_k, groups),
            (hashes, g.stride(0), block_k),
            (reduction, block_k, reduction * block_k),
            (1, groups * reduction, reduction),
            (None, in_features),
            (g.stride(1), in_features),
            *(None, False),
        )
        plan(g, code, out, None)
    return out
