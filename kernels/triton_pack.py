"""Copy the weights of several layers behind each other, so that one product computes them all."""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ss1_compile.kernels.launch import Launch, ceil_div


@triton.jit
def _pack_kernel(out, parts, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    """``out`` = the parts, of SIZES values each, one after another."""
    start = 0
    for index in tl.static_range(len(SIZES)):
        if tl.program_id(1) == index:
            at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            inside = at < SIZES[index]
            tl.store(out + start + at, tl.load(parts[index] + at, mask=inside), mask=inside)
        start += SIZES[index]


@lru_cache(maxsize=4096)
def _plan(sizes: tuple[int, ...]) -> Launch:
    block = 2048
    grid = (ceil_div(max(sizes), block), len(sizes))
    return Launch(_pack_kernel, grid, (), {"SIZES": sizes, "BLOCK": block}, num_warps=4)


def pack(parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat(parts)`` of contiguous tensors of one dtype, in one launch without its checks."""
    out = torch.empty(
        (sum(part.shape[0] for part in parts), *parts[0].shape[1:]),
        dtype=parts[0].dtype,
        device=parts[0].device,
    )
    operands = tuple([part.contiguous() for part in parts])
    _plan(tuple([part.numel() for part in operands]))(out, operands)
    return out
