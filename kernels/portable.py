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
        # one group leaves einsum's own order of dimensions, which the operator's fake does not have
        return out.reshape(num_hashes, rows, reduced_features).contiguous()
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
        return out.reshape(rows, num_supergroups * size)[:, :in_features].contiguous()
    slots, signs = target_slots(code, reduced_features, num_supergroups * size)
    dtype = _ACCUMULATE.get(g.dtype, g.dtype)
    total = torch.zeros(rows, slots.shape[1], dtype=dtype, device=g.device)
    for j in range(num_hashes):
        total = torch.addcmul(total, g[j].index_select(1, slots[j]).to(dtype), signs[j].to(dtype))
    return total[:, :in_features].to(g.dtype).contiguous()


def grouped_matmul(
    sketched: Tensor, z: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """``y[:, block j] = X̃[j] @ z[block j]ᵀ + b``: ``[J, M, K_c] × [N, K_c] → [M, N]``.

    One batched product over the J blocks, written straight into the columns of ``y`` (``out`` if
    given). J separate products are slower, most for few rows (4 rows, 768 → 768, c = 4: 0.11
    against 0.07 ms).
    """
    num_hashes, rows, reduced_features = sketched.shape
    out_features = z.shape[0]
    y = sketched.new_empty(rows, out_features) if out is None else out
    width = block_n(out_features, num_hashes)
    whole = out_features // width  # the last block may be narrower
    columns = whole * width
    # as_strided does in one call what takes three views; with one row the views cost more than
    # the product.
    row, column = z.stride()
    blocks = z.as_strided((whole, reduced_features, width), (width * row, column, row))
    row, column = y.stride()
    target = y.as_strided((whole, rows, width), (width * column, row, column))
    first = sketched if whole == num_hashes else sketched[:whole]
    if bias is None:
        torch.bmm(first, blocks, out=target)
    else:
        step = bias.stride(0)
        start = bias.as_strided((whole, 1, width), (width * step, 0, step))
        torch.baddbmm(start, first, blocks, out=target)
    if columns < out_features:
        last = sketched[whole]
        if bias is None:
            torch.mm(last, z[columns:].t(), out=y[:, columns:])
        else:
            torch.addmm(bias[columns:], last, z[columns:].t(), out=y[:, columns:])
    return y


def linear(x: Tensor, code: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    """``y [..., N]`` of ``x [..., K]``: sketch, then one product per column block."""
    flat = x.reshape(-1, x.shape[-1])
    y = grouped_matmul(sketch(flat, code, z.shape[1]), z, bias)
    return y.view(*x.shape[:-1], z.shape[0])
