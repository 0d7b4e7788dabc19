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


def sketched(x: Tensor, sketch: Tensor, reduced_features: int) -> Tensor:
    """``X̃ [J, M, K_c]`` of ``x [M, K]`` in float64: ``X̃[j] = x S_j``, S_j written out by groups."""
    num_hashes, num_supergroups = sketch.shape[:2]
    slots = reduced_features // num_supergroups
    width = sketch.shape[2] * (1 if sketch.is_floating_point() else slots)
    identity = torch.eye(slots, dtype=torch.float64)
    result = torch.zeros(num_hashes, x.shape[0], reduced_features, dtype=torch.float64)
    for g, part in enumerate(x.cpu().double().split(width, 1)):
        for j in range(num_hashes):
            block = materialize(sketch[j : j + 1, g : g + 1], identity, part.shape[1])
            result[j, :, g * slots : (g + 1) * slots] = part @ block.T
    return result


def quantized_product(
    q: Tensor, q_scale: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``y[m, n] = q_scale[j,m] · scale[n] · Σ_k q[j,m,k] z[n,k] + b[n]`` in float64, j = j(n).

    ``q [J, M, K_c]`` and ``z [N, K_c]`` are int8 (the sum is then taken in int64) or float8, whose
    products and sums float64 holds exactly too; ``scale [N, 1]``, ``q_scale [J, M]``.
    """
    integer = z.dtype == torch.int8
    wide = torch.int64 if integer else torch.float64
    q, z = q.cpu().to(wide), z.cpu().to(wide)
    rows_per_block = -(-z.shape[0] // q.shape[0])
    blocks = [
        (q[j] @ z[j * rows_per_block : (j + 1) * rows_per_block].T).double()
        * q_scale[j].cpu().double()[:, None]
        for j in range(q.shape[0])
    ]
    y = torch.cat(blocks, dim=1) * scale.cpu().double().T
    return y if bias is None else y + bias.cpu().double()


def linear_weight_only(
    x: Tensor, sketch: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``y`` in float64 with ``z[n, k] · scale[n, k // (K_c / groups)]`` in place of z."""
    width = z.shape[1] // scale.shape[1]
    return linear(
        x, sketch, z.cpu().double() * scale.cpu().double().repeat_interleave(width, 1), bias
    )
