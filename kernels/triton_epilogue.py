"""What the library's product has no epilogue for, in one pass over y.

y[m, n] = act(y[m, n] + b[n]) + residual[m, n]
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from ss1_compile.kernels.launch import Launch, ceil_div
from ss1_compile.kernels.triton_elementwise import ACTIVATIONS


@triton.jit(do_not_specialize=["M"])
def _epilogue_kernel(
    y, bias, residual, M, N, s_ym, s_rm,
    BM: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    row0 = (pid // tiles_n).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    rn = pid % tiles_n * BN + tl.arange(0, BN)
    mask = (rm < M - row0)[:, None] & (rn < N)[None, :]
    at = y + row0 * s_ym + (rm * s_ym)[:, None] + rn[None, :]
    v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    if ACT is not None:
        v = ACT(v, y.dtype.element_ty)
    if residual is not None:
        added = residual + row0 * s_rm + (rm * s_rm)[:, None] + rn[None, :]
        v += tl.load(added, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, v.to(y.dtype.element_ty), mask=mask)


@lru_cache(maxsize=4096)
def _plan(rows: int, columns: int, s_ym: int, s_rm: int, activation: str) -> Launch:
    return Launch(
        _epilogue_kernel,
        (ceil_div(rows, 4) * ceil_div(columns, 512),),
        (rows, columns, s_ym, s_rm),
        {"BM": 4, "BN": 512, "ACT": ACTIVATIONS[activation]},
        num_warps=4,
    )


def finish(y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> None:
    """``act(y + b) + residual`` in place; ``y`` and ``residual`` ``[M, N]``, any row stride."""
    stride = 0 if residual is None else residual.stride(0)
    _plan(*y.shape, y.stride(0), stride, activation)(y, bias, residual)
