"""The definition of SS1 in float64, written for reading and not for speed.

Source: "Sketch Structured Transform", NeurIPS 2024, section 3. Every other implementation is
tested against this one; it shares no code with them, not even the unpacking of the sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def materialize(sketch: Tensor, z: Tensor, in_features: int) -> Tensor:
    """The dense weight ``W [N, K]`` in float64.

    Rotation, for the rows n of column block j:
    ``W[n, (g·c+l)·B_K + t] = s[j,g,l] · z[n, g·B_K + (t + h[j,g,l]) mod B_K]``.
    Learned: ``W[n, g·gsize + t] = Σ_i S[j,g,t,i] · z[n, g·r + i]``.
    """
    out_features, reduced_features = z.shape
    num_hashes, num_supergroups = sketch.shape[:2]
    rows_per_block = -(-out_features // num_hashes)
    w = torch.zeros(out_features, in_features, dtype=torch.float64)
    sketch, z = sketch.cpu(), z.cpu().double()
    for j in range(num_hashes):
        rows = slice(j * rows_per_block, min((j + 1) * rows_per_block, out_features))
        for g in range(num_supergroups):
            if sketch.is_floating_point():
                group_size, rank = sketch.shape[2:]
                block = z[rows, g * rank : (g + 1) * rank] @ sketch[j, g].double().T
                first = g * group_size
                width = max(0, min(group_size, in_features - first))
                w[rows, first : first + width] = block[:, :width]
                continue
            reduction, block_k = sketch.shape[2], reduced_features // num_supergroups
            for l in range(reduction):  # noqa: E741 - the paper's letter
                code = int(sketch[j, g, l])
                rotation, sign = (code, 1.0) if code >= 0 else (-code - 1, -1.0)
                for t in range(block_k):
                    column = (g * reduction + l) * block_k + t
                    if column < in_features:
                        slot = g * block_k + (t + rotation) % block_k
                        w[rows, column] = sign * z[rows, slot]
    return w


def linear(x: Tensor, sketch: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x Wᵀ + b`` in float64 on the CPU, through the materialised W. ``x [..., K]``."""
    y = x.cpu().double() @ materialize(sketch, z, x.shape[-1]).T
    return y if bias is None else y + bias.cpu().double()
