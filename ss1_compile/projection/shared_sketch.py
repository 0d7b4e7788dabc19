"""One learned sketch for all layers that read the same input.

q, k and v, or gate and up, are one weight cut into parts: their blocks ``S`` are fitted to all rows
together: weighed by the gradients of their outputs where these are known, else each layer's scaled
to the same output energy, so that the *relative* errors add up. The blocks are then stored once,
which leaves more of ``c`` to z, and one sketch of x serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.errors import StructureError
from ss1_compile.learned import LearnedStructure
from ss1_compile.projection.fitting import DAMPING, Weight, best_fit
from ss1_compile.projection.learned_fit import SWEEPS
from ss1_compile.projection.target import Target
from ss1_compile.projection.weighing import normalised, weighed_rows

GROUP_SIZES = (128, 192, 384)
"""What is tried where no group size is given, next to K itself where K is at most 1024."""
_WIDEST = 1024


@dataclass(frozen=True, eq=False)
class SharedSketch:
    """What the layers have in common.

    Attributes:
        group_size: ``gsize``.
        rank: r.
        blocks: ``[1, G, gsize, r]``, in the weights' dtype.
        damping: to solve for z with.
        asymmetry: to solve for z with.
    """

    group_size: int
    rank: int
    blocks: Tensor
    damping: float
    asymmetry: float

    def structure(self, weight: Tensor) -> LearnedStructure:
        """Of one layer, for its weight ``[N, K]``."""
        out_features, in_features = weight.shape
        return LearnedStructure(in_features, out_features, self.group_size, self.rank)


def fit_sketch(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    reduction: float,
    *,
    centred: bool,
    gradients: Sequence[Tensor] | None = None,
    group_size: int | None = None,
    damping: float | Literal["auto"] = DAMPING,
    asymmetry: float | Literal["auto"] = "auto",
    sweeps: int = SWEEPS,
    name: str = "weight",
) -> SharedSketch:
    """Fit the blocks for layers that share an input and together keep 1/c of their parameters.

    Without a group size, if there are held-out rows, those of :data:`GROUP_SIZES` are tried for one
    sweep and the best on these rows is taken; else it is N/2 within 128 … 384. Wide groups lose
    less to their borders, narrow ones have more slots at the same budget. The error on the rows
    that were fitted is no guide: it prefers groups that are too wide.

    Args:
        weights: ``[N_i, K]`` each, of one dtype and device, finite.
        statistics: of their inputs.
        reduction: c.
        centred: whether biases take the mean errors.
        gradients: ``E[g gᵀ]`` of each weight, float64 ``[K, K]``, to weigh the outputs by.
        group_size: ``gsize``; ``None`` chooses.
        damping: see :func:`ss1_compile.project`.
        asymmetry: see :func:`ss1_compile.project`.
        sweeps: of the fit, at most.
        name: of the first layer, for messages.

    Raises:
        StructureError: the budget allows no slot at all.
        ProjectionError: the statistics are singular after damping.
    """
    with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
        target = Target.of(statistics, centred, weights[0].device)
        out_features, in_features = sum(map(len, weights)), weights[0].shape[1]
        stack = weighed_rows(weights, gradients, target) if gradients else None
        if stack is None:
            stack = torch.cat([normalised(w, target) for w in weights])
        if group_size is not None:
            sizes = {min(group_size, in_features)}
        elif statistics.held_out is None:
            sizes = {_equal(in_features, min(max(out_features // 2, 128), 384))}
        else:
            sizes = {_equal(in_features, wished) for wished in GROUP_SIZES}
            sizes |= {in_features} if in_features <= _WIDEST else set()
        candidates = [
            Weight(stack, structure, centred, "learned", name)
            for structure in _structures(in_features, out_features, reduction, sizes)
        ]
        best, chosen, fit = best_fit(candidates, statistics, damping, asymmetry, sweeps)
        assert isinstance(best.structure, LearnedStructure)
        blocks = fit.blocks.to(weights[0].dtype).unsqueeze(0)
        return SharedSketch(
            best.structure.group_size,
            best.structure.rank,
            blocks,
            chosen.damping,
            chosen.asymmetry,
        )


def _equal(in_features: int, wished: int) -> int:
    """The group size near the wish, a multiple of 8 as far as possible, of equal groups."""
    groups = max(1, round(in_features / wished))
    return min(in_features, -(-in_features // groups // 8) * 8)


def _structures(
    in_features: int, out_features: int, reduction: float, sizes: set[int]
) -> list[LearnedStructure]:
    """Those of one hash with these group sizes, as far as the budget allows."""
    made, refusal = [], None
    for size in sorted(sizes):
        try:
            made.append(
                LearnedStructure.create(in_features, out_features, reduction, group_size=size)
            )
        except StructureError as error:
            refusal = error
    if refusal is not None and not made:
        raise refusal
    return made
