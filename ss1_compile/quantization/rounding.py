"""Rounding ``z`` so that the layer's *output* moves least: GPTQ in the sketched space.

A quantised layer with column block j computes ``(z_j + E) X̃[j]``; over the calibration inputs the
error it adds is ``tr(E Γ_j Eᵀ)`` with ``Γ_j = E[X̃[j] X̃[j]ᵀ] = S_jᵀ H S_j``, the matrix that the
calibrated projection has factorised already. Nearest rounding ignores Γ. GPTQ (Frantar et al.,
ICLR 2023, section 3.3) rounds one slot after another and lets the slots still to come make up for
each error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ss1_compile.errors import QuantizationError
from ss1_compile.kernels.layout import block_n
from ss1_compile.kernels.quantize import check_groups, round_to

_SLOTS = 128  # columns whose updates to the rest are applied together


def gptq_round(
    z: Tensor,
    scale: Tensor,
    gram: Tensor,
    *,
    dtype: torch.dtype = torch.int8,
    damping: float = 0.01,
    name: str = "z",
) -> Tensor:
    """Quantise ``z`` on the grid of ``scale``, minimising ``tr(E Γ_j Eᵀ)`` for ``E = z - scale·q``.

    Slots are taken in the order of falling ``diag Γ_j``, so that the slots that matter most are
    rounded while the most others can still make up for them. Slots that were never active, a zero
    on the diagonal, are rounded to nearest. Float64 throughout, on z's device; work
    ``O(J K_c³ + N K_c²)``.

    Args:
        z: ``[N, K_c]``, any floating dtype, finite.
        scale: float32 ``[N, groups]``, positive, as :func:`.kernels.quantize.quantize_rows` gives.
        gram: ``[J, K_c, K_c]``, ``S_jᵀ H S_j`` of every column block, symmetric and positive
            semi-definite.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
        damping: added to the diagonal, relative to its mean, more than 0.
        name: of the layer, for messages.

    Returns:
        q ``[N, K_c]`` of ``dtype``.

    Raises:
        QuantizationError: shapes do not fit, a value is not finite, a scale or the damping is not
            positive, or ``gram`` is not positive semi-definite.
    """
    check_groups(z, scale.shape[-1] if scale.dim() == 2 else 0, dtype, name)
    _check(z, scale, gram, damping, name)
    q = torch.empty_like(z, dtype=dtype)
    rows = block_n(z.shape[0], gram.shape[0])
    steps = scale.double().repeat_interleave(z.shape[1] // scale.shape[1], 1)
    with torch.no_grad():
        for j in range(gram.shape[0]):
            block = slice(j * rows, (j + 1) * rows)
            q[block] = _round_block(
                z[block].double(), steps[block], gram[j].double(), dtype, damping, name
            )
    return q


def _round_block(
    z: Tensor, steps: Tensor, gram: Tensor, dtype: torch.dtype, damping: float, name: str
) -> Tensor:
    """One column block: z, steps ``[rows, K_c]``, gram ``[K_c, K_c]``, all float64."""
    order = gram.diagonal().argsort(descending=True)
    factor = _inverse_factor(gram[order][:, order], damping, name)
    z, steps = z[:, order].clone(), steps[:, order]
    q = torch.empty_like(z, dtype=dtype)
    for start in range(0, z.shape[1], _SLOTS):
        end = min(start + _SLOTS, z.shape[1])
        errors = torch.empty_like(z[:, start:end])
        for k in range(start, end):
            q[:, k] = round_to(z[:, k] / steps[:, k], dtype)
            error = (z[:, k] - q[:, k].double() * steps[:, k]) / factor[k, k]
            z[:, k + 1 : end] -= error.unsqueeze(1) * factor[k, k + 1 : end]
            errors[:, k - start] = error
        z[:, end:] -= errors @ factor[start:end, end:]
    restored = torch.empty_like(q)
    restored[:, order] = q
    return restored


def _inverse_factor(gram: Tensor, damping: float, name: str) -> Tensor:
    """Upper U with ``Uᵀ U = (Γ + λI)⁻¹``: its row k, over its diagonal, is slot k's update."""
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    idle = diagonal <= 0
    ridge = torch.where(idle, mean if mean > 0 else torch.ones_like(mean), damping * mean)
    lower, failed = torch.linalg.cholesky_ex(gram + torch.diag(ridge))
    if int(failed) != 0:
        raise QuantizationError(
            f"{name}: the calibration statistics are not positive semi-definite at slot "
            f"{int(failed) - 1} with damping = {damping}; raise damping or calibrate again"
        )
    inverse = torch.cholesky_inverse(lower)
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _check(z: Tensor, scale: Tensor, gram: Tensor, damping: float, name: str) -> None:
    if scale.shape[0] != z.shape[0] or not bool((scale > 0).all()):
        raise QuantizationError(
            f"{name}: scale must be positive [{z.shape[0]}, groups], got {list(scale.shape)}"
        )
    if gram.dim() != 3 or not len(gram) or gram.shape[1:] != (z.shape[1], z.shape[1]):
        raise QuantizationError(
            f"{name}: gram must be [J, {z.shape[1]}, {z.shape[1]}], got {list(gram.shape)}"
        )
    if (len(gram) - 1) * block_n(z.shape[0], len(gram)) >= z.shape[0]:
        raise QuantizationError(
            f"{name}: gram has {len(gram)} column blocks, which leave some empty at "
            f"N = {z.shape[0]}"
        )
    for what, tensor in (("z", z), ("gram", gram)):
        if not bool(torch.isfinite(tensor).all()):
            raise QuantizationError(
                f"{name}: {what} is not finite; repair the checkpoint or calibrate on clean data"
            )
    if not 0 < damping < math.inf:
        raise QuantizationError(f"{name}: damping must be positive and finite, got {damping}")
