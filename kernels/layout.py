"""How a sketch is laid out in one tensor, and the index arithmetic that follows from it.

The operator takes a *sketch* and ``z``; the sketch's dtype tells its kind:

* **rotation** (SS1 proper): int32 ``[J, G, c]``, the signed rotation code. A sign of +1 with
  rotation ``h`` is stored as ``h``, a sign of -1 as ``~h`` (= ``-h - 1``), so that ``h = 0`` keeps
  its sign and one load fetches both.
* **learned**: floating ``[J, G, gsize, r]``, the diagonal blocks of a block-diagonal matrix.

Every size of the layer can be read off the shapes of ``x``, ``sketch`` and ``z``, so the operator
carries no integers that could disagree with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

VECTOR_WIDTH = 8
"""Rotations are multiples of this many elements, so that vector loads stay whole."""


def pack(rotations: Tensor, signs: Tensor) -> Tensor:
    """Pack ``rotations`` and ``signs`` (both ``[J, G, c]``) into the int32 code ``[J, G, c]``."""
    rotations = rotations.to(torch.int32)
    return torch.where(signs < 0, ~rotations, rotations)


def unpack(code: Tensor) -> tuple[Tensor, Tensor]:
    """Invert :func:`pack`: ``(rotations int32 [J, G, c], signs int8 [J, G, c])``."""
    negative = code < 0
    rotations = torch.where(negative, ~code, code)
    signs = 1 - 2 * negative.to(torch.int8)
    return rotations, signs


def is_rotation(sketch: Tensor) -> bool:
    """Whether ``sketch`` is a rotation code (integers) and not learned blocks (floating)."""
    return not sketch.is_floating_point()


def group_size(sketch: Tensor, reduced_features: int) -> int:
    """Input features per supergroup: ``c·B_K`` for a rotation, ``gsize`` for a learned sketch."""
    if is_rotation(sketch):
        return sketch.shape[2] * (reduced_features // sketch.shape[1])
    return sketch.shape[2]


def block_n(out_features: int, num_hashes: int) -> int:
    """``B_N``: rows of ``z`` that share one hash. The last block may be shorter."""
    return -(-out_features // num_hashes)


def source_columns(code: Tensor, reduced_features: int) -> tuple[Tensor, Tensor]:
    """For every slot of the sketch, the input columns that are added into it.

    Returns:
        ``(columns int64 [J, c, K_c], signs int8 [J, c, K_c])`` with
        ``X̃[j, m, i] = Σ_l signs[j, l, i] · x[m, columns[j, l, i]]``. Columns at or beyond
        ``in_features`` are the zero padding.
    """
    num_hashes, num_supergroups, reduction = code.shape
    block_k = reduced_features // num_supergroups
    rotations, signs = unpack(code)
    u = torch.arange(block_k, device=code.device)
    within = (u - rotations.long().unsqueeze(-1)) % block_k  # [J, G, c, B_K]
    chunk = torch.arange(num_supergroups * reduction, device=code.device)
    columns = chunk.view(1, num_supergroups, reduction, 1) * block_k + within
    shape = (num_hashes, reduction, reduced_features)
    columns = columns.transpose(1, 2).reshape(shape)
    signs = signs.unsqueeze(-1).expand(-1, -1, -1, block_k).transpose(1, 2).reshape(shape)
    return columns, signs


def target_slots(code: Tensor, reduced_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """For every input column, the slot it is added into.

    Returns:
        ``(slots int64 [J, K], signs int8 [J, K])`` with
        ``W[n, k] = signs[j, k] · z[n, slots[j, k]]`` for the rows n of column block j.
    """
    num_hashes, num_supergroups = code.shape[:2]
    block_k = reduced_features // num_supergroups
    rotations, signs = unpack(code)
    t = torch.arange(block_k, device=code.device)
    within = (t + rotations.long().unsqueeze(-1)) % block_k  # [J, G, c, B_K]
    group = torch.arange(num_supergroups, device=code.device).view(1, num_supergroups, 1, 1)
    slots = (group * block_k + within).reshape(num_hashes, -1)
    signs = signs.unsqueeze(-1).expand(-1, -1, -1, block_k).reshape(num_hashes, -1)
    return slots[:, :in_features], signs[:, :in_features]
