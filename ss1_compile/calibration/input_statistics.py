"""What is known about the inputs of one weight: moments, and what sets them apart from others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ss1_compile.errors import CalibrationError


@dataclass(eq=False)
class Drift:
    """Moments of ``d = x_dense - x``, by what a compressed prefix changes the inputs x of a weight.

    Attributes:
        mean: ``E[d]``, float64 ``[K]``.
        second_moment: ``E[d dᵀ]``, float64 ``[K, K]``.
        cross_moment: ``E[d xᵀ]``, float64 ``[K, K]``.
    """

    mean: Tensor
    second_moment: Tensor
    cross_moment: Tensor


@dataclass(eq=False)
class Shortfall:
    """Moments of ``s = r_dense - r``, r being what the weight's outputs are added to.

    A compressed prefix changes the stream of residuals as it changes the inputs x. What the stream
    lacks, as far as x tells it, the weight's outputs can make up for.

    Attributes:
        mean: ``E[s]``, float64 ``[N]``.
        cross_moment: ``E[s xᵀ]``, float64 ``[N, K]``.
    """

    mean: Tensor
    cross_moment: Tensor


@dataclass(eq=False)
class InputStatistics:
    """First and second moments of the inputs ``x [K]`` of one weight.

    Attributes:
        count: rows seen, at least 1.
        mean: ``E[x]``, float64 ``[K]``.
        second_moment: ``E[x xᵀ]``, float64 ``[K, K]``, on the device where it was collected.
        drift: of inputs in a compressed model, what sets them apart from the dense model's.
        held_out: the statistics of some of these rows, which are there to choose by: what is fitted
            to the others can be tried on them (:meth:`without_held_out`).
        gradients: ``E[g gᵀ]``, float64 ``[K, K]``, for the gradient ``g = δ W`` that goes into
            these inputs through *one* weight, δ that of the model's loss with respect to the
            weight's outputs (:mod:`ss1_compile.calibration.gradients`); ``None`` if not known.
        shortfall: of what the weight's outputs are added to, next to a drift; ``None`` if they are
            not added to anything, or nothing is known of it.
    """

    count: int
    mean: Tensor
    second_moment: Tensor
    drift: Drift | None = None
    held_out: InputStatistics | None = None
    gradients: Tensor | None = None
    shortfall: Shortfall | None = None

    @property
    def of_inputs(self) -> int:
        """Equal for the statistics of weights that read the same inputs, as long as they live."""
        return id(self.second_moment)

    @property
    def in_features(self) -> int:
        """K."""
        size: int = self.mean.shape[0]
        return size

    def covariance(self) -> Tensor:
        """``E[(x - E[x]) (x - E[x])ᵀ]``, float64 ``[K, K]``, a new tensor."""
        return torch.addr(self.second_moment, self.mean, self.mean, alpha=-1)

    def combine(self, other: InputStatistics) -> InputStatistics:
        """The statistics of both sets of rows together, on the device of ``self``.

        Drift is kept if both have it, and so are shortfall, held-out rows and gradients.

        Raises:
            CalibrationError: the two differ in K.
        """
        if self.in_features != other.in_features:
            raise CalibrationError(
                f"cannot combine statistics of {self.in_features} and {other.in_features} features"
            )
        combined = self._mixed(other, other.count / (self.count + other.count))
        combined.count = self.count + other.count
        if self.held_out is not None and other.held_out is not None:
            combined.held_out = self.held_out.combine(other.held_out)
        if self.gradients is not None and other.gradients is not None:
            part = other.count / combined.count
            combined.gradients = self.gradients.lerp(other.gradients.to(self.mean.device), part)
        return combined

    def without_held_out(self) -> InputStatistics:
        """The statistics of the rows that are not held out."""
        if self.held_out is None:
            return self
        count = self.count - self.held_out.count
        rest = self._mixed(self.held_out, -self.held_out.count / count)
        rest.count = count
        return rest

    def _mixed(self, other: InputStatistics, weight: float) -> InputStatistics:
        """``(1 - weight) · self + weight · other``, with the count of ``self``."""

        def mix(mine: Tensor, its: Tensor) -> Tensor:
            return mine.lerp(its.to(mine.device), weight)

        drift = None
        if self.drift is not None and other.drift is not None:
            drift = Drift(
                mix(self.drift.mean, other.drift.mean),
                mix(self.drift.second_moment, other.drift.second_moment),
                mix(self.drift.cross_moment, other.drift.cross_moment),
            )
        shortfall = None
        if self.shortfall is not None and other.shortfall is not None:
            shortfall = Shortfall(
                mix(self.shortfall.mean, other.shortfall.mean),
                mix(self.shortfall.cross_moment, other.shortfall.cross_moment),
            )
        mean, second = self.mean, self.second_moment
        return InputStatistics(
            self.count,
            mix(mean, other.mean),
            mix(second, other.second_moment),
            drift,
            shortfall=shortfall,
        )

    def problem(self) -> str | None:
        """Why these statistics cannot be used, or ``None``: count, shapes, dtypes, finiteness."""
        mean, second = self.mean, self.second_moment
        if not isinstance(self.count, int) or self.count < 1:
            return f"count is {self.count!r}, not an integer of at least 1"
        for name, tensor in (("mean", mean), ("second_moment", second)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float64:
                return f"{name} must be a float64 tensor, got {getattr(tensor, 'dtype', tensor)}"
        if mean.dim() != 1 or second.shape != (mean.shape[0], mean.shape[0]):
            return (
                f"mean {list(mean.shape)} and second_moment {list(second.shape)} are not "
                f"[K] and [K, K]"
            )
        gradients = self.gradients
        if gradients is not None and (
            gradients.dtype != torch.float64 or gradients.shape != second.shape
        ):
            return f"gradients are {gradients.dtype} {list(gradients.shape)}, not float64 [K, K]"
        for name, each in (("mean", mean), ("second_moment", second), ("gradients", gradients)):
            if each is not None and not bool(torch.isfinite(each).all()):
                return f"{name} is not finite"
        return None
