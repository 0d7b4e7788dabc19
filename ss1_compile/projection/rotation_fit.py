"""Fit z to a weight for one hash of a rotation: the average, and its least-squares correction."""

from __future__ import annotations

import torch
from torch import Tensor

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.errors import ProjectionError
from ss1_compile.kernels import layout
from ss1_compile.structure import SS1Structure


class RotationFit:
    """The sketch with one hash, applied from the right: ``A S`` and ``z Sᵀ``, all float64.

    Args:
        code: of the hash, int32 ``[1, G, c]``.
        structure: of the layer.
        moment: H, float64 ``[K, K]``; ``None`` gives the average.
        damping: ridge relative to the mean of ``diag(H)``.
        name: of the layer, for messages.
    """

    def __init__(
        self,
        code: Tensor,
        structure: SS1Structure,
        moment: Tensor | None,
        damping: float,
        name: str,
    ) -> None:
        self._code, self._name = code, name
        self._moment, self._damping = moment, damping
        self._reduced = structure.reduced_features
        slots, signs = layout.target_slots(code, self._reduced, structure.in_features)
        self._slots, self._signs = slots[0], signs[0].double()
        # columns that are padding fall into slots too, and are not counted
        self._counts = torch.bincount(self._slots, minlength=self._reduced).double()
        self._solver: tuple[Tensor, Tensor] | None = None

    def solve(self, w: Tensor) -> Tensor:
        """``z [M, K_c]`` for rows ``[M, K]`` of W: calibrated with H, the average without."""
        z = self._average(w)
        if self._moment is not None:
            z += self._correction(w - self.materialize(z), self._moment)
        return z

    def _average(self, w: Tensor) -> Tensor:
        """``W S (Sᵀ S)⁻¹ [M, K_c]``; 0 in slots without a source."""
        return self._sketch(w) / self._counts.clamp(min=1)

    def materialize(self, z: Tensor) -> Tensor:
        """``z Sᵀ [M, K]``."""
        return z.index_select(1, self._slots).mul_(self._signs)

    def _correction(self, residual: Tensor, moment: Tensor) -> Tensor:
        """``R H S (Sᵀ H S)⁻¹ [M, K_c]`` with damped H, for the residual R of the average.

        ``R S = 0``, so the ridge adds nothing to ``R H S`` in exact arithmetic.
        """
        if not bool(residual.any()):
            return residual.new_zeros(residual.shape[0], self._reduced)
        if self._solver is None:
            self._solver = self._factorize(moment)
        moment_sketch, factor = self._solver
        return torch.cholesky_solve((residual @ moment_sketch).t(), factor).t()

    def _factorize(self, moment: Tensor) -> tuple[Tensor, Tensor]:
        """``H S [K, K_c]`` and the lower Cholesky factor of ``Sᵀ (H + λI) S``."""
        moment_sketch = self._sketch(moment)
        gram = self._sketch(moment_sketch.t().contiguous())
        scale = moment.diagonal().mean()
        ridge = self._damping * scale * self._counts
        # A slot without a source has a zero row; a layer whose inputs never vary keeps the average.
        free = (self._counts == 0) | (scale <= 0)
        gram.diagonal().add_(torch.where(free, 1.0, ridge))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed) != 0:
            raise ProjectionError(
                f"{self._name}: the input statistics are singular at slot {int(failed) - 1} of "
                f"{self._reduced} with damping = {self._damping}; raise damping (1e-3 is usual) or "
                f"calibrate on more data"
            )
        return moment_sketch, factor

    def _sketch(self, rows: Tensor) -> Tensor:
        sketched: Tensor = torch.ops.ss1.sketch(rows, self._code, self._reduced)
        return sketched[0]
