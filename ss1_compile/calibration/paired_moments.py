"""Moments of inputs in a compressed model, and of what sets them apart from the dense model's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ss1_compile.calibration.input_statistics import Drift, InputStatistics, Shortfall
from ss1_compile.calibration.moments import CHUNK_ELEMENTS, Moments


class PairedMoments:
    """Moments of the inputs of a group of weights in one model, and of their drift from another's.

    Weights that read the very same tensors share what is added; whichever weights read an input
    together in some batches only have their sums added up in the end.

    Args:
        paired: whether there are rows of a second, dense model to compare with.
    """

    def __init__(self, paired: bool) -> None:
        self._paired = paired
        self._sums: dict[frozenset[str], tuple[Moments, _DriftSums | None]] = {}
        self._unpaired: set[str] = set()

    def add(
        self, rows: Mapping[str, list[Tensor]], dense: Mapping[str, list[Tensor]] | None
    ) -> None:
        """Count the rows ``[M, K]`` that each weight has read, call by call.

        Args:
            rows: by weight; equal inputs are the same tensor object.
            dense: the same of the dense model. A weight that read another number of rows there, as
                an expert may, has no drift from then on.

        Raises:
            CalibrationError: an input is not finite.
        """
        together: dict[tuple[int, ...], list[str]] = {}
        for name, calls in rows.items():
            together.setdefault(tuple(map(id, calls)), []).append(name)
        for names in together.values():
            first, key = names[0], frozenset(names)
            calls = [x for x in rows[first] if len(x)]
            if not calls:
                continue
            if key not in self._sums:
                size, device = calls[0].shape[1], calls[0].device
                drift = _DriftSums(size, device) if self._paired else None
                self._sums[key] = Moments(size, device), drift
            moments, drift = self._sums[key]
            for x in calls:
                moments.absorb(x, first)
            others = [x for x in (dense or {}).get(first, ()) if len(x)]
            if [x.shape for x in others] != [x.shape for x in calls]:
                self._unpaired |= key
            elif drift is not None:
                for x, x_dense in zip(calls, others, strict=True):
                    drift.absorb(x, x_dense)

    def finish(self) -> dict[str, InputStatistics]:
        """The statistics by weight."""
        made: dict[frozenset[str], InputStatistics] = {}
        for key, (moments, drift) in self._sums.items():
            made[key] = moments.finish()
            if drift is not None and not key & self._unpaired:
                made[key].drift = drift.finish(made[key].count)
        found: dict[str, InputStatistics] = {}
        for key, entry in made.items():
            for name in key:
                found[name] = found[name].combine(entry) if name in found else entry
        return found


class _DriftSums:
    """``Σ d``, ``Σ d dᵀ`` and ``Σ d xᵀ`` for ``d = x_dense - x``."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.outer)

    def absorb(self, x: Tensor, x_dense: Tensor) -> None:
        size = max(1, CHUNK_ELEMENTS // x.shape[1])
        for mine, its in zip(x.split(size), x_dense.split(size), strict=True):
            here = mine.double()
            d = its.double() - here
            self.total += d.sum(0)
            self.outer.addmm_(d.t(), d)
            self.cross.addmm_(d.t(), here)

    def finish(self, count: int) -> Drift:
        return Drift(self.total.div_(count), self.outer.div_(count), self.cross.div_(count))


class ShortfallSums:
    """``Σ s`` and ``Σ s xᵀ`` for ``s = r_dense - r``, r what a weight's outputs are added to."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._cross: Tensor | None = None
        self._count = 0

    def add(self, calls: list[Tensor], summand: Tensor | None, dense: Tensor | None) -> None:
        """Count the rows of a batch: x ``[M, K]`` of the one call, r and r_dense ``[M, N]``.

        Rows that do not belong to each other are not counted.
        """
        (rows,) = calls
        if summand is None or dense is None or not len(rows) == len(summand) == len(dense):
            return
        size = max(1, CHUNK_ELEMENTS // max(rows.shape[1], summand.shape[1]))
        parts = (rows.split(size), summand.split(size), dense.split(size))
        for x, mine, its in zip(*parts, strict=True):
            s = its.double() - mine.double()
            total, cross = s.sum(0), s.t() @ x.double()
            self._total = total if self._total is None else self._total + total
            self._cross = cross if self._cross is None else self._cross + cross
        self._count += len(rows)

    def finish(self, count: int) -> Shortfall | None:
        """The moments, if they are of all the ``count`` rows."""
        if self._total is None or self._cross is None or self._count != count:
            return None
        return Shortfall(self._total / count, self._cross / count)
