"""Choose, among the learned sketches that compute the same, the one that loses least to rounding.

A layer ``y = x S zᵀ`` stays the same function when group g has any invertible ``A [r, r]`` put in:

    S_g → S_g A,    z_g → z_g A⁻ᵀ

Rounding a row of X̃ with one scale disturbs y by about ``max_k x̃_k² · Σ_k ‖z_k‖²``, and rounding a
row of z by ``max_k z_k² · Σ_k E[x̃_k²]``. With ``C = S_gᵀ H_gg S_g`` and ``Z = z_gᵀ z_g``, and with
slots that are alike, both are in proportion to ``tr(C P) tr(Z P⁻¹)``, ``P = A Aᵀ``. This is least
for the geometric mean of ``C⁻¹`` and Z,

    P = C^-½ (C^½ Z C^½)^½ C^-½,    where    P^½ C P^½ = P^-½ Z P^-½ = D:

X̃ and z are then equally hard to round, as SmoothQuant (Xiao et al., ICML 2023) balances them with a
diagonal A. What A is beside P^½ is an orthogonal factor. From D's eigenvectors a Hartley matrix,
whose entries are at most ``√(2/r)``, mixes them into slots of almost equal energy, which spreads
outliers, as QuaRot (Ashkboos et al., NeurIPS 2024) does with Hadamard matrices; here it costs
nothing when the layer runs. A rotation sketch is fixed and has no such freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ss1_compile.kernels.layout import block_n

_RIDGE = 1e-6
"""Of the mean energy of a group's slots, added to all: some may be idle, or z of lower rank."""


@torch.no_grad()
def balance(
    zs: Sequence[Tensor], sketch: Tensor, moment: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The balanced sketch of layers that share it, and their z for it.

    The layers count by their relative errors: each z by its output energy. All stay as they are
    where one is not finite, which whoever rounds it refuses by name.

    Args:
        zs: ``[N_i, G·r]`` of each layer, any floating dtype.
        sketch: their learned blocks ``[J, G, gsize, r]``.
        moment: ``E[x xᵀ]`` of their inputs, ``[K, K]``; ``None`` stands for the identity.

    Returns:
        The blocks in their dtype, a new tensor, and each z in float64.
    """
    hashes, groups, _, rank = sketch.shape
    blocks = sketch.detach().double()
    wide = [z.detach().to(blocks) for z in zs]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (blocks, *wide)):
        return sketch.detach().clone(), wide
    made = [torch.empty_like(z) for z in wide]
    balanced = torch.empty_like(blocks)
    for j in range(hashes):
        rows = [_rows(z, hashes, j) for z in wide]
        parts = [z[at].unflatten(1, (groups, rank)) for z, at in zip(wide, rows, strict=True)]
        inner = _inner_moments(blocks[j], moment)
        outer = torch.zeros_like(inner)
        for part in parts:
            gram = torch.einsum("ngr,ngs->grs", part, part)
            energy = (gram * inner).sum()
            outer += gram / torch.where(energy > 0, energy, 1.0)
        change = balancing(inner, outer)
        balanced[j] = blocks[j] @ change
        back = torch.linalg.inv(change)
        for new, part, at in zip(made, parts, rows, strict=True):
            new[at] = torch.einsum("ngr,gsr->ngs", part, back).flatten(1)
    return balanced.to(sketch.dtype), made


def balancing(inner: Tensor, outer: Tensor) -> Tensor:
    """A ``[G, r, r]`` from C and Z of every group, ``[G, r, r]``, positive semi-definite.

    The identity for a group whose slots are all idle, or whose z is zero.
    """
    rank = inner.shape[-1]
    sizes = [m.diagonal(dim1=1, dim2=2).mean(1) for m in (inner, outer)]
    used = (sizes[0] > 0) & (sizes[1] > 0)
    eye = torch.eye(rank, dtype=inner.dtype, device=inner.device)
    # each to a mean of 1 first, or the ridge of a tiny one would be lost
    c, z = (
        m / torch.where(used, size, 1.0)[:, None, None] * used[:, None, None] + _RIDGE * eye
        for m, size in zip((inner, outer), sizes, strict=True)
    )
    root, inverse = _power(c, 0.5), _power(c, -0.5)
    mean = inverse @ _power(root @ z @ root, 0.5) @ inverse
    half = _power(mean, 0.5)
    # their levels apart from their shapes: tr C' = tr Z'
    half = half * (sizes[1] / torch.where(used, sizes[0], 1.0)).pow(0.25)[:, None, None]
    directions = torch.linalg.eigh(half @ c @ half)[1]
    change = half @ directions @ hartley(rank).to(inner)
    return torch.where(used[:, None, None], change, eye)


def hartley(size: int) -> Tensor:
    """The orthogonal matrix ``(cos + sin)(2π i k / size) / √size``, float64, for any size."""
    steps = torch.arange(size, dtype=torch.float64)
    angles = (2 * math.pi / size) * torch.outer(steps, steps).remainder(size)
    return (angles.cos() + angles.sin()) / math.sqrt(size)


def _power(matrices: Tensor, exponent: float) -> Tensor:
    """Of symmetric positive definite matrices ``[G, r, r]``."""
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    least = values[:, -1:] * torch.finfo(values.dtype).eps
    powered: Tensor = (vectors * values.maximum(least).pow(exponent).unsqueeze(1)) @ vectors.mT
    return powered


def _rows(z: Tensor, hashes: int, j: int) -> slice:
    width = block_n(z.shape[0], hashes)
    return slice(j * width, min((j + 1) * width, z.shape[0]))


def _inner_moments(blocks: Tensor, moment: Tensor | None) -> Tensor:
    """``S_gᵀ H_gg S_g [G, r, r]`` of blocks ``[G, gsize, r]``."""
    if moment is None:
        return blocks.mT @ blocks
    made = []
    for g, block in enumerate(blocks):
        at = slice(g * len(block), min((g + 1) * len(block), len(moment)))
        part = block[: at.stop - at.start]
        made.append(part.t() @ moment[at, at].to(blocks) @ part)
    return torch.stack(made)
