"""What a projected weight's outputs are to match, in terms of moments of its inputs.

``y = W x_dense + b`` is wanted of inputs x that a compressed prefix has changed by
``d = x_dense - x`` (zero where there is no such prefix). With ``H = E[x xᵀ]``, ``G = E[d xᵀ]`` and
``F = E[d dᵀ]`` everything is a quadratic form, for ``E = W - Ŵ``:

    E‖W x_dense - Ŵ x‖² = tr(W F Wᵀ) + 2 tr(W G Eᵀ) + tr(E H Eᵀ)

and its minimum without a structure is ``Ŵ = W + W G H⁻¹`` (asymmetric calibration, as in GPTAQ,
ICML 2025). A part α of that correction is taken, which held-out inputs can choose: the drift of
unseen inputs is another one.

Where the outputs are added to a stream r of residuals, which lacks ``s = r_dense - r`` by now, the
sum is what counts: ``E‖W x_dense + s - Ŵ x‖²``, whose minimum has ``E[s xᵀ] H⁻¹`` added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ss1_compile.calibration.input_statistics import Drift, InputStatistics, Shortfall
from ss1_compile.errors import ProjectionError


@dataclass(eq=False)
class Target:
    """Moments of the inputs of one weight, float64 on its device.

    Attributes:
        moment: H ``[K, K]``, the covariance if the layer has a bias; ``None`` stands for the
            identity, where no inputs are known.
        mean: ``E[x] [K]``.
        drift: its mean, F and G, centred if H is.
        shortfall: ``E[s]`` and ``E[s xᵀ]``, centred if H is; next to a drift only.
    """

    moment: Tensor | None = None
    mean: Tensor | None = None
    drift: Drift | None = None
    shortfall: Shortfall | None = None

    @classmethod
    def of(cls, statistics: InputStatistics | None, centred: bool, device: torch.device) -> Target:
        """The target on the inputs of ``statistics``, without the drift if that is of no use.

        Rows that a drift is larger than do not belong together: experts may see other tokens.
        """
        if statistics is None:
            return cls()
        mean, drift = statistics.mean.to(device), statistics.drift
        moment = (statistics.covariance() if centred else statistics.second_moment).to(device)
        if drift is None:
            return cls(moment, mean)
        away, second, cross = (
            t.to(device) for t in (drift.mean, drift.second_moment, drift.cross_moment)
        )
        if centred:
            second = torch.addr(second, away, away, alpha=-1)
            cross = torch.addr(cross, away, mean, alpha=-1)
        if second.trace() > moment.trace():
            return cls(moment, mean)
        short = statistics.shortfall
        if short is not None:
            lacking, owed = short.mean.to(device), short.cross_moment.to(device)
            owed = torch.addr(owed, lacking, mean, alpha=-1) if centred else owed
            short = Shortfall(lacking, owed)
        return cls(moment, mean, Drift(away, second, cross), short)

    def correction(self, damping: float, name: str) -> Tensor | None:
        """``G (H + damping · mean(diag H) · I)⁻¹ [K, K]``; ``None`` where nothing has drifted.

        Raises:
            ProjectionError: H is singular after damping.
        """
        drift = self.drift
        return None if drift is None else self._regressed(drift.cross_moment, damping, name)

    def owed(self, damping: float, name: str) -> Tensor | None:
        """``E[s xᵀ] (H + damping · mean(diag H) · I)⁻¹ [N, K]``; ``None`` where nothing is lacking.

        Raises:
            ProjectionError: H is singular after damping.
        """
        short = self.shortfall
        return None if short is None else self._regressed(short.cross_moment, damping, name)

    def _regressed(self, cross: Tensor, damping: float, name: str) -> Tensor | None:
        """``C (H + damping · mean(diag H) · I)⁻¹`` for a cross moment C ``[M, K]``."""
        if self.moment is None or not bool(cross.any()):
            return None
        scale = self.moment.diagonal().mean()
        if scale <= 0:
            return None
        damped = self.moment.clone()
        damped.diagonal().add_(damping * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) != 0:
            raise ProjectionError(
                f"{name}: the input statistics are singular with damping = {damping}; raise "
                f"damping (1e-3 is usual) or calibrate on more data"
            )
        solved: Tensor = torch.cholesky_solve(cross.t(), factor).t()
        return solved

    def lost(self, w: Tensor, e: Tensor) -> Tensor:
        """``E‖W x_dense - Ŵ x‖²`` for rows of W and of ``E = W - Ŵ``; ``‖E‖²`` without inputs."""
        if self.moment is None:
            return e.square().sum()
        lost = ((e @ self.moment).mul_(e)).sum()
        if self.drift is not None:
            lost += (w @ self.drift.second_moment).mul_(w).sum()
            lost += 2 * (w @ self.drift.cross_moment).mul_(e).sum()
        return lost

    def whole(self, w: Tensor) -> Tensor:
        """``E‖W x_dense‖²`` for rows of W; ``‖W‖²`` without inputs."""
        whole = self.lost(torch.zeros_like(w), w)
        if self.drift is not None:
            whole += (w @ self.drift.second_moment).mul_(w).sum()
            whole += 2 * (w @ self.drift.cross_moment).mul_(w).sum()
        return whole

    def along(self, w: Tensor, e: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The slope and the curvature of :meth:`lost` for ``Ŵ + t · step``: ``-s·t + q·t²``."""
        assert self.moment is not None
        weighed = step @ self.moment
        slope = 2 * (weighed * e).sum()
        if self.drift is not None:
            slope += 2 * (w @ self.drift.cross_moment).mul_(step).sum()
        return slope, weighed.mul_(step).sum()

    def shift(self, w: Tensor, e: Tensor) -> Tensor | None:
        """``E[W x_dense - Ŵ x] [M]``, what the bias takes; ``None`` without inputs."""
        if self.mean is None:
            return None
        shift = e @ self.mean
        return shift if self.drift is None else shift + w @ self.drift.mean
