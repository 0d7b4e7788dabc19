"""A layer of a plan: its choices, measured, and the one that was made."""

from __future__ import annotations

from dataclasses import dataclass

from ss1_compile.errors import ConfigError


@dataclass(frozen=True)
class LayerChoice:
    """One way to treat a layer.

    Attributes:
        reduction: c; 1 leaves the layer dense.
        error: relative output error on held-out inputs, ``sqrt(E‖Δy‖² / E‖y - E[y]‖²)`` (not
            centred without a bias).
        loss: what it is predicted to add to the model's loss; additive over layers.
        cost: parameters, or microseconds.
    """

    reduction: float
    error: float
    loss: float
    cost: float


@dataclass(frozen=True)
class PlannedLayer:
    """A layer with its choices and the one that was made.

    Attributes:
        name: qualified name.
        shape: ``(N, K)``.
        choices: from dense to the largest reduction, with a sketch of its own.
        reduction: of the chosen one; 1 is dense.
        sensitivity: measured: what the model loses per squared relative output error of the layer.
        group: number of the layers that read the same input and can share a sketch, or ``None``.
        shared: the choices where the whole group has the same reduction, and so shares.
        sharing: whether it does.
    """

    name: str
    shape: tuple[int, int]
    choices: tuple[LayerChoice, ...]
    reduction: float = 1
    sensitivity: float = 1.0
    group: int | None = None
    shared: tuple[LayerChoice, ...] = ()
    sharing: bool = False

    def __post_init__(self) -> None:
        known = [choice.reduction for choice in self.choices]
        if self.reduction not in known:
            raise ConfigError(f"{self.name}: reduction {self.reduction!r} is not one of {known}")

    @property
    def chosen(self) -> LayerChoice:
        """The choice that was made."""
        among = self.shared if self.sharing else self.choices
        return next(c for c in among if c.reduction == self.reduction)

    @property
    def dense_cost(self) -> float:
        """The cost of leaving it dense."""
        return self.choices[0].cost
