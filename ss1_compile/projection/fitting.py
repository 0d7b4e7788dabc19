"""Fits of one weight: for the damping and the asymmetry in question, by column block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.learned import Structure
from ss1_compile.projection.learned_fit import SWEEPS, LearnedFit
from ss1_compile.projection.rotation_fit import RotationFit
from ss1_compile.projection.target import Target
from ss1_compile.structure import SS1Structure

Method = Literal["average", "calibrated", "learned"]
Fit = RotationFit | LearnedFit
DAMPING = 1e-3
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)
"""What ``damping="auto"`` chooses from."""
_TRIAL_SWEEPS = 1
_CHUNK_ELEMENTS = 2**25  # rows of W are taken in float64 copies of at most 256 MiB


@dataclass(frozen=True, eq=False)
class Weight:
    """What stays the same over all fits of one weight.

    Attributes:
        weight: ``[N, K]``; where a sketch alone is fitted, any rows ``[M, K]`` to fit it to.
        structure: of ``[N, K]``.
        centred: whether a bias takes the mean error.
        method: of projection.
        name: of the layer, for messages.
        blocks: ``[J, G, gsize, r]``, learned blocks to be used as they are.
    """

    weight: Tensor
    structure: Structure
    centred: bool
    method: Method
    name: str
    blocks: Tensor | None = None

    def target(self, statistics: InputStatistics | None) -> Target:
        """The target on the inputs of ``statistics``."""
        return Target.of(statistics, self.centred, self.weight.device)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight in float64."""
        return self.weight.index_select(0, index).double()

    def fits(
        self, target: Target, damping: float, asymmetry: float, sweeps: int = SWEEPS
    ) -> Iterator[tuple[int, Fit, tuple[Tensor, ...], Tensor | None]]:
        """Per distinct hash: its j, the fit, the rows of W in chunks, and ``α G H⁻¹``."""
        correction = None
        if asymmetry > 0:
            correction = target.correction(damping, self.name)
            if correction is not None:
                correction = correction * asymmetry
        structure = self.structure
        for j, rows in _blocks_by_hash(structure, len(self.weight)):
            chunks = _row_chunks(rows, structure.in_features, self.weight.device)
            if isinstance(structure, SS1Structure):
                code = structure.code[j : j + 1].to(self.weight.device)
                moment = None if self.method == "average" else target.moment
                rotation = RotationFit(code, structure, moment, damping, self.name)
                yield j, rotation, chunks, correction
                continue
            fit = LearnedFit(structure, target.moment, damping, self.name)
            if self.blocks is not None:
                fit.use(self.blocks[j])
            else:
                for index in chunks:
                    fit.add(corrected(self.rows(index), correction))
                fit.fit(self.weight.dtype, sweeps)
            yield j, fit, chunks, correction


def corrected(w: Tensor, correction: Tensor | None) -> Tensor:
    """Rows of W with the correction for drifted inputs."""
    return w if correction is None else w + w @ correction


@dataclass(frozen=True)
class Chosen:
    """How to fit a weight.

    Attributes:
        damping: of the fit.
        asymmetry: of the fit.
        error: ``E‖W x_dense - Ŵ x‖²`` on held-out rows of what was fitted to the others in one
            sweep; ``None`` without such rows, or if nothing was tried.
    """

    damping: float
    asymmetry: float
    error: float | None = None


def choose(
    layer: Weight,
    statistics: InputStatistics | None,
    damping: float | Literal["auto"],
    asymmetry: float | Literal["auto"],
    *,
    always: bool = False,
) -> Chosen:
    """The damping and the asymmetry to use, those that are "auto" by the error on held-out rows.

    What is fitted for α = ½ is linear in α with its sketch held, so that the error is a parabola.

    Args:
        layer: the weight.
        statistics: of its inputs.
        damping: see :func:`ss1_compile.project`.
        asymmetry: see :func:`ss1_compile.project`.
        always: measure the error on held-out rows even if nothing is left to choose.
    """
    ridge = DAMPING if damping == "auto" else damping
    if statistics is None or layer.method == "average" or layer.structure.reduction == 1:
        return Chosen(ridge, 0.0)
    held_out, drifted = statistics.held_out, statistics.drift is not None
    part = 0.0
    if drifted:
        part = 0.5 if asymmetry == "auto" else asymmetry
    open_ = damping == "auto" or (asymmetry == "auto" and drifted) or always
    if held_out is None or not open_:
        return Chosen(ridge, part)
    target, unseen = layer.target(statistics.without_held_out()), layer.target(held_out)
    tried = [
        _trial(layer, target, unseen, each, part, asymmetry == "auto")
        for each in (DAMPINGS if damping == "auto" else (ridge,))
    ]
    return min(tried, key=lambda chosen: chosen.error or 0.0)


def _trial(
    layer: Weight, target: Target, unseen: Target, damping: float, asymmetry: float, free: bool
) -> Chosen:
    """A fit of one sweep and its error on unseen inputs, at the best asymmetry if it is free."""
    terms = torch.zeros(3, dtype=torch.float64, device=layer.weight.device)
    for _, fit, chunks, correction in layer.fits(target, damping, asymmetry, _TRIAL_SWEEPS):
        for index in chunks:
            w = layer.rows(index)
            e = w - fit.materialize(fit.solve(w))
            terms[0] += unseen.lost(w, e)
            if correction is not None:
                more = fit.materialize(fit.solve(w @ correction))
                terms[1:] += torch.stack(unseen.along(w, e, more))
    constant, slope, curvature = terms.tolist()
    t = 1.0
    if free and curvature > 0:
        t = min(1.0, max(0.0, asymmetry * slope / (2 * curvature))) / asymmetry
    return Chosen(damping, asymmetry * t, constant - slope * t + curvature * t * t)


def best_fit(
    candidates: Sequence[Weight],
    statistics: InputStatistics,
    damping: float | Literal["auto"],
    asymmetry: float | Literal["auto"],
    sweeps: int = SWEEPS,
) -> tuple[Weight, Chosen, LearnedFit]:
    """Fit learned blocks, for the candidate of one hash that does best on held-out rows.

    Args:
        candidates: the same rows with different structures; at least one.
        statistics: of the inputs.
        damping: see :func:`ss1_compile.project`.
        asymmetry: see :func:`ss1_compile.project`.
        sweeps: of the fit, at most.

    Raises:
        ProjectionError: the statistics are singular after damping.
    """
    several = len(candidates) > 1
    tried = [
        (choose(layer, statistics, damping, asymmetry, always=several), layer)
        for layer in candidates
    ]
    chosen, best = min(tried, key=lambda pair: pair[0].error or 0.0)
    target = best.target(statistics)
    _, fit, _, _ = next(best.fits(target, chosen.damping, chosen.asymmetry, sweeps))
    assert isinstance(fit, LearnedFit)
    return best, chosen, fit


def _blocks_by_hash(structure: Structure, end: int) -> Iterator[tuple[int, list[range]]]:
    """A column block j per distinct hash, with the rows of all blocks that have the same."""
    if structure.num_hashes == 1:
        yield 0, [range(end)]
        return
    alike: dict[Any, list[int]] = {}
    keys: Iterable[Any] = range(structure.num_hashes)
    if isinstance(structure, SS1Structure):
        keys = map(tuple, structure.code.flatten(1).tolist())
    for j, key in enumerate(keys):
        alike.setdefault(key, []).append(j)
    width = structure.block_n
    for blocks in alike.values():
        yield blocks[0], [range(j * width, min((j + 1) * width, end)) for j in blocks]


def _row_chunks(rows: list[range], columns: int, device: torch.device) -> tuple[Tensor, ...]:
    index = torch.cat([torch.arange(r.start, r.stop, device=device) for r in rows])
    chunks: tuple[Tensor, ...] = index.split(max(1, _CHUNK_ELEMENTS // columns))
    return chunks
