"""What the learned sketch is compared with, all at the same number of parameters.

Every method takes ``W [N, K]``, the second moment ``H [K, K]`` of its inputs (damped; the identity
for methods that do not look at inputs) and c, and returns a dense ``Ŵ [N, K]`` that needs at most
``N·K/c`` numbers. All are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ss1_compile.learned import LearnedStructure
from ss1_compile.projection.learned_fit import LearnedFit

Method = Callable[[Tensor, Tensor, float], Tensor]


def damped(moment: Tensor, damping: float = 1e-3) -> Tensor:
    """``H + damping · mean(diag H) · I``, the treatment that all methods get."""
    ridge = damping * moment.diagonal().mean()
    return moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def svd(weight: Tensor, moment: Tensor, reduction: float) -> Tensor:
    """The best matrix of rank ``N·K / (c·(N + K))`` for the Frobenius norm."""
    return aware_svd(weight, torch.eye(len(moment)).to(moment), reduction)


def aware_svd(weight: Tensor, moment: Tensor, reduction: float) -> Tensor:
    """The best matrix of that rank for ``E‖(W - Ŵ) x‖²``: ``W L`` truncated, times ``L⁻¹``.

    ``H = L Lᵀ`` (activation-aware SVD: SVD-LLM, ICLR 2025, section 3.1).
    """
    n, k = weight.shape
    return weighed_svd(weight, moment, max(1, int(n * k / (reduction * (n + k)))), weight)


def weighed_svd(weight: Tensor, moment: Tensor, rank: int, rows: Tensor) -> Tensor:
    """The best matrix of a rank for ``tr(Γ (W - Ŵ) H (W - Ŵ)ᵀ)``, for rows R, ``RᵀR = WᵀΓW``.

    ``Ŵ = W L V Vᵀ L⁻¹`` with the leading right singular vectors V of ``R L`` (Fisher-weighted SVD,
    ICLR 2022, with the whole Γ and for the inputs' H).
    """
    factor, vectors = directions(moment, rows)
    return of_rank(weight, factor, vectors, rank)


def directions(moment: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """L, and the right singular vectors of ``R L``, the leading ones first."""
    factor = torch.linalg.cholesky(moment)
    wide = rows @ factor
    return factor, torch.linalg.eigh(wide.T @ wide)[1].flip(1)


def of_rank(weight: Tensor, factor: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """``W L V Vᵀ L⁻¹`` for so many of the vectors."""
    v = vectors[:, :rank]
    truncated = weight @ factor @ v @ v.T
    result: Tensor = torch.linalg.solve_triangular(factor, truncated, upper=False, left=False)
    return result


def monarch(weight: Tensor, moment: Tensor, reduction: float) -> Tensor:
    """Two block-diagonal factors with a permutation between (Monarch, ICML 2022, section 3.3).

    W falls into b × b tiles by (block of outputs, block of inputs), each of rank r; r is the most
    that the budget allows, and b the number of blocks (2 … 16) for which the weighted error is the
    least. Weighted, each tile is truncated for its own inputs' H.
    """
    n, k = weight.shape
    best, least = torch.zeros_like(weight), math.inf
    for blocks in (2, 4, 8, 16):
        if n % blocks or k % blocks:
            continue
        rank = int(n * k / reduction / (blocks * (n + k)))
        if rank < 1:
            continue
        # Outputs are strided, as the permutation of a Monarch matrix deals them out
        rows = weight.view(n // blocks, blocks, k).transpose(0, 1)
        tiles = torch.zeros_like(rows)
        for j, tile in enumerate(rows):
            for i in range(blocks):
                columns = slice(i * k // blocks, (i + 1) * k // blocks)
                factor = torch.linalg.cholesky(moment[columns, columns])
                u, s, v = torch.linalg.svd(tile[:, columns] @ factor, full_matrices=False)
                truncated = (u[:, :rank] * s[:rank]) @ v[:rank]
                tiles[j, :, columns] = torch.linalg.solve_triangular(
                    factor, truncated, upper=False, left=False
                )
        candidate = tiles.transpose(0, 1).reshape(n, k)
        error = output_energy(weight - candidate, moment)
        if error < least:
            best, least = candidate, error
    return best


def magnitude(weight: Tensor, moment: Tensor, reduction: float) -> Tensor:
    """The ``N·K/c`` largest entries kept, the places of the others not counted against it."""
    keep = int(weight.numel() / reduction)
    flat = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
    index = weight.flatten().abs().topk(keep).indices
    flat[index] = weight.flatten()[index]
    return flat.view_as(weight)


def learned(weight: Tensor, moment: Tensor, reduction: float) -> Tensor:
    """Ours: the learned block sketch in groups of about 128."""
    n, k = weight.shape
    fit = LearnedFit(LearnedStructure.create(k, n, reduction), moment, 0.0, "weight")
    fit.add(weight)
    fit.fit(weight.dtype)
    return fit.materialize(fit.solve(weight))


METHODS: dict[str, Method] = {
    "SVD": svd,
    "activation-aware SVD": aware_svd,
    "Monarch": monarch,
    "magnitude pruning": magnitude,
    "learned sketch": learned,
}


def output_energy(weight: Tensor, moment: Tensor) -> float:
    """``E‖W x‖² = tr(W H Wᵀ)``."""
    return ((weight @ moment) * weight).sum().item()


def output_error(weight: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """``sqrt(E‖(W - Ŵ) x‖² / E‖W x‖²)``."""
    lost = output_energy(weight - approximation, moment)
    return math.sqrt(max(0.0, lost) / output_energy(weight, moment))
