"""Output errors weighed by what the model makes of them, in the fit of a sketch.

``min tr(Γ E H Eᵀ)``, ``E = W - z Sᵀ``, for the second moment Γ of the loss's gradients with respect
to the outputs. Row by row z is the least-squares solution whatever Γ is; S depends on it through
``M = WᵀΓW`` alone. So S is fitted to any rows R with ``RᵀR = M`` in the place of W's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ss1_compile.projection.target import Target

EQUAL_PART = 0.3
"""The part of the weighed output energy that the outputs counted alike are added with: gradients of
few inputs know little about the directions that they miss. Measured, see benchmarks/NOTES.md."""
_ROUNDING = 1e-10  # of the mean of diag(M), which leaves a singular M positive definite


def normalised(weight: Tensor, target: Target) -> Tensor:
    """``[N, K]`` with ``E‖W x‖² = 1``; as it is where it has no output."""
    energy = target.whole(weight.double()).item()
    return weight / energy**0.5 if energy > 0 else weight


def weighed_rows(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], target: Target
) -> Tensor | None:
    """Rows R ``[K, K]``, float64, in the place of the rows of weights that share a sketch.

    ``RᵀR = M / tr(M H) + EQUAL_PART · (Σ WᵢᵀWᵢ / tr(Wᵢ H Wᵢᵀ)) / n``, ``M = Σ E[gᵢ gᵢᵀ]`` over the
    n weights.

    Args:
        weights: ``[N_i, K]`` each.
        gradients: ``E[g gᵀ]`` of each, float64 ``[K, K]``.
        target: on the inputs of the weights.

    Returns:
        ``None`` where M is 0 on these inputs: nothing that the weights do reaches the loss.
    """
    device = weights[0].device
    total = torch.zeros_like(gradients[0], device=device)
    for each in gradients:
        total += each.to(device)
    energy = total.trace() if target.moment is None else (total * target.moment).sum()
    if not energy > 0:
        return None
    total /= energy
    for weight in weights:
        rows = normalised(weight, target).double()
        total.addmm_(rows.t(), rows, alpha=EQUAL_PART / len(weights))
    total.diagonal().add_(_ROUNDING * total.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(total)
    return None if int(failed) else factor.t().contiguous()
