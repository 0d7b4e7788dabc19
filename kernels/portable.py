"""The operator in plain PyTorch, for any device and floating dtype.

Used where no specialised kernel exists, and under tracing. Two phases, as everywhere: sketch once,
then one matrix product per column block. ``W`` is never materialised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ss1_compile.kernels.layout import (
    block_n,
    group_size,
    is_rotation,
    source_columns,
    target_slots,
)

_ACCUMULATE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def _pad_features(x: Tensor, features: int) -> Tensor:
    missing = features - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def sketch(x: Tensor, code: Tensor, reduced_features: int) -> Tensor:
    """``X̃ [J, M, K_c]`` of ``x [M, K]``, in x's dtype; sums run in float32 or wider.

    Rotation: ``X̃[j, m, g·B_K+u] = Σ_l s[j,g,l] · x[m, (g·c+l)·B_K + (u - h[j,g,l]) mod B_K]``.
    Learned: ``X̃[j, m, g·r : (g+1)·r] = x[m, g·gsize : (g+1)·gsize] @ S[j, g]``.
    """
    rows = x.shape[0]
    num_hashes, num_supergroups = code.shape[:2]
    size = group_size(code, reduced_features)
    x = _pad_features(x, num_supergroups * size)
    if not is_rotation(code):
        groups = x.reshape(rows, num_supergroups, size)
        out = torch.einsum("mgk,jgkr->jmgr", groups, code.to(x.dtype))
        return out.reshape(num_hashes, rows, reduced_features)
    columns, signs = source_columns(code, reduced_features)
    dtype = _ACCUMULATE.get(x.dtype, x.dtype)
    signs = signs.to(dtype)
    total = torch.zeros(rows, num_hashes, reduced_features, dtype=dtype, device=x.device)
    for part in range(code.shape[2]):
        picked = x.index_select(1, columns[:, part].reshape(-1)).view_as(total)
        total = torch.addcmul(total, picked.to(dtype), signs[:, part])
    return total.to(x.dtype).transpose(0, 1).contiguous()


def unsketch(g: Tensor, code: Tensor, in_features: int) -> Tensor:
    """The adjoint of :func:`sketch`: ``[M, K]`` from ``g [J, M, K_c]``, in g's dtype.

    Rotation: ``out[m, (g·c+l)·B_K+t] = Σ_j s[j,g,l] · g[j, m, g·B_K + (t + h[j,g,l]) mod B_K]``.
    """
    num_hashes, rows, reduced_features = g.shape
    num_supergroups = code.shape[1]
    size = group_size(code, reduced_features)
    if not is_rotation(code):
        groups = g.reshape(num_hashes, rows, num_supergroups, code.shape[3])
        out = torch.einsum("jmgr,jgkr->mgk", groups, code.to(g.dtype))
        return out.reshape(rows, -1)[:, :in_features].contiguous()
    slots, signs = target_slots(code, reduced_features, num_supergroups * size)
    dtype = _ACCUMULATE.get(g.dtype, g.dtype)
    total = torch.zeros(rows, slots.shape[1], dtype=dtype, device=g.device)
    for j in range(num_hashes):
        total = torch.addcmul(total, g[j].index_select(1, slots[j]).to(dtype), signs[j].to(dtype))
    return total[:, :in_features].to(g.dtype).contiguous()


def grouped_matmul(sketched: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    """``y[:, block j] = X̃[j] @ z[block j]ᵀ + b``: ``[J, M, K_c] × [N, K_c] → [M, N]``."""
    num_hashes, rows, reduced_features = sketched.shape
    out_features = z.shape[0]
    if num_hashes == 1:
        return F.linear(sketched[0], z, bias)
    width = block_n(out_features, num_hashes)
    y = sketched.new_empty(rows, out_features)
    if out_features % num_hashes == 0:
        blocks = z.view(num_hashes, width, reduced_features).transpose(1, 2)
        torch.bmm(sketched, blocks, out=y.view(rows, num_hashes, width).permute(1, 0, 2))
    else:
        for j, block in enumerate(z.split(width)):
            torch.mm(sketched[j], block.t(), out=y[:, j * width : j * width + block.shape[0]])
    return y if bias is None else y.add_(bias)


def linear(x: Tensor, code: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    """``y [..., N]`` of ``x [..., K]``: sketch, then one product per column block."""
    flat = x.reshape(-1, x.shape[-1])
    y = grouped_matmul(sketch(flat, code, z.shape[1]), z, bias)
    return y.view(*x.shape[:-1], z.shape[0])
