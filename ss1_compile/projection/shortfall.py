"""What a weight's outputs make up for in the stream of residuals that they are added to.

The regression of the shortfall s on the inputs, ``O = E[s xᵀ] H⁻¹``, is added to the weight that is
projected, its part by the error of the sum on held-out rows: unseen inputs lack something else.
The blocks of a learned sketch are fitted without it.
"""

from __future__ import annotations

from torch import Tensor

from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.projection.fitting import Chosen, Weight, corrected


def owed_rows(layer: Weight, statistics: InputStatistics, chosen: Chosen) -> Tensor | None:
    """``β O [N, K]``, float64, to add to W; ``None`` where nothing is owed.

    Without held-out rows β is the asymmetry.

    Args:
        layer: the weight; with given blocks where it has a learned structure.
        statistics: of its inputs, with or without a shortfall.
        chosen: how it is fitted.

    Raises:
        ProjectionError: the statistics are singular after damping.
    """
    if statistics.shortfall is None:
        return None
    owed = layer.target(statistics).owed(chosen.damping, layer.name)
    if owed is None:
        return None
    held_out, part = statistics.held_out, chosen.asymmetry
    if held_out is not None and held_out.shortfall is not None:
        part = _part(layer, statistics.without_held_out(), held_out, chosen)
    return part * owed if part > 0 else None


def _part(layer: Weight, kept: InputStatistics, held_out: InputStatistics, chosen: Chosen) -> float:
    """β in 0 … 1 with the least ``E‖W x_dense + s - Ŵ x‖²`` on the held-out rows, a parabola."""
    target, unseen = layer.target(kept), layer.target(held_out)
    owed = target.owed(chosen.damping, layer.name)
    if owed is None or unseen.shortfall is None:
        return 0.0
    slope = curvature = 0.0
    for _, fit, chunks, correction in layer.fits(target, chosen.damping, chosen.asymmetry, 1):
        for index in chunks:
            w = layer.rows(index)
            e = w - fit.materialize(fit.solve(corrected(w, correction)))
            step = fit.materialize(fit.solve(owed[index]))
            along, bend = unseen.along(w, e, step)
            slope += (along + 2 * (unseen.shortfall.cross_moment[index] * step).sum()).item()
            curvature += bend.item()
    return min(1.0, max(0.0, slope / (2 * curvature))) if curvature > 0 else 0.0
