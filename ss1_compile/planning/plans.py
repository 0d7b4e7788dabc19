"""``Plan``: which reduction each layer gets, why, and what it would cost otherwise."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ss1_compile.config import SS1Config
from ss1_compile.errors import ConfigError
from ss1_compile.planning import groups, knapsack
from ss1_compile.planning.layers import LayerChoice, PlannedLayer
from ss1_compile.planning.target import Cost, Target
from ss1_compile.report import render

_FORMAT = "ss1-plan"
_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """What :func:`ss1_compile.plan` returns. ``print(plan)`` shows a row per layer.

    Attributes:
        layers: in model order.
        base: the configuration that the plan refines.
        cost: what the costs are: ``"parameters"`` of the weights, or ``"latency"`` in microseconds
            per call of the layer.
        target: as it was given.
        left: name → why a layer was not planned (it follows ``base``, or stays dense).
        figures: measured figures of whole models: dicts with ``metric``, ``reduction`` (``"dense"``
            or ``"plan"``), ``fraction`` of the cost, and ``value``.
    """

    layers: tuple[PlannedLayer, ...]
    base: SS1Config
    cost: Cost = "parameters"
    target: str = ""
    left: Mapping[str, str] = field(default_factory=dict)
    figures: tuple[Mapping[str, Any], ...] = ()

    def __getitem__(self, name: str) -> PlannedLayer:
        """The layer called ``name``.

        Raises:
            KeyError: it is not planned.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def config(self) -> SS1Config:
        """The configuration for :func:`ss1_compile.compress` and the other doors.

        Layers that stay dense are refitted in sequential calibration (``refit_dense``).
        """
        overrides: dict[str, Any] = {}
        for layer in self.layers:
            c = layer.reduction
            whole = int(c) if float(c).is_integer() else c
            overrides[glob.escape(layer.name)] = None if c == 1 else whole
        overrides |= self.base.overrides
        return replace(self.base, overrides=overrides, refit_dense=True)

    @property
    def dense_cost(self) -> float:
        """The cost of all planned layers left dense."""
        return math.fsum(layer.dense_cost for layer in self.layers)

    @property
    def planned_cost(self) -> float:
        """The cost of the choices made."""
        return math.fsum(layer.chosen.cost for layer in self.layers)

    @property
    def least_cost(self) -> float:
        """The smallest budget that can be met."""
        units = groups.units(self.layers)
        return math.fsum(min(option.cost for option in unit) for unit in units)

    @property
    def fraction(self) -> float:
        """``planned_cost / dense_cost``."""
        return self.planned_cost / self.dense_cost

    @property
    def loss(self) -> float:
        """The predicted loss of the choices made."""
        return math.fsum(layer.chosen.loss for layer in self.layers)

    def solve(self, target: str | float) -> Plan:
        """The best choices for another budget; nothing is measured again.

        Args:
            target: a budget, see :func:`ss1_compile.plan`.

        Raises:
            ConfigError: no budget of this plan's kind of cost, or too small a one.
        """
        parsed = Target.parse(target)
        if parsed.kind != "budget" or parsed.name not in ("", self.cost):
            raise ConfigError(
                f"a plan of {self.cost} is solved for a budget of {self.cost}; got {target!r}"
            )
        units = groups.units(self.layers)
        picked = knapsack.choose(
            [[option.loss for option in unit] for unit in units],
            [[option.cost for option in unit] for unit in units],
            parsed.budget(self.dense_cost),
        )
        chosen: dict[str, float] = {}
        for unit, i in zip(units, picked, strict=True):
            chosen |= unit[i].reductions
        return self._with(chosen, str(target))

    def _with(self, reductions: Mapping[str, float], target: str) -> Plan:
        layers = (
            replace(layer, reduction=reductions.get(layer.name, layer.reduction))
            for layer in self.layers
        )
        settled = groups.settle(tuple(layers))
        return replace(self, layers=settled, target=target, figures=())

    def with_choice(self, name: str, reduction: float) -> Plan:
        """The plan with one layer's choice changed by hand.

        Raises:
            KeyError: the layer is not planned.
            ConfigError: the reduction is none of its choices.
        """
        replace(self[name], reduction=reduction)  # raises what this should
        return self._with({name: reduction}, self.target)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_dict` inverts it. Layers' ``reduction`` may be edited."""
        values = {
            "format": _FORMAT,
            "version": _VERSION,
            "target": self.target,
            "cost": self.cost,
            "fraction": self.fraction,
            "base": self.base.to_dict(),
            "left": dict(self.left),
            "figures": [dict(figure) for figure in self.figures],
            "layers": [asdict(layer) for layer in self.layers],
        }
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Invert :meth:`to_dict`.

        Raises:
            ConfigError: not a plan, of another version, or with a bad value; the layer is named.
        """
        if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
            raise ConfigError("this is no plan; ss1 plan and Plan.save write them")
        if values.get("version") != _VERSION:
            raise ConfigError(f"plan of version {values.get('version')!r}; {_VERSION} is known")
        cost = values.get("cost")
        if cost not in ("parameters", "latency"):
            raise ConfigError(f"the plan's cost must be 'parameters' or 'latency', got {cost!r}")
        try:
            layers = groups.settle(tuple(_layer(entry) for entry in values["layers"]))
            return cls(
                layers=layers,
                base=SS1Config.from_dict(values["base"]),
                cost=cost,
                target=str(values["target"]),
                left={str(k): str(v) for k, v in values["left"].items()},
                figures=tuple(dict(figure) for figure in values["figures"]),
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the plan is damaged: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: it cannot be read, or see :meth:`from_dict`.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"plan {path} cannot be read: {error}") from error
        return cls.from_dict(values)

    def summary(self) -> str:
        """One line of totals."""
        dense = sum(layer.reduction == 1 for layer in self.layers)
        text = (
            f"plan for {self.target}: {self.fraction:.1%} of {_amount(self.dense_cost, self.cost)}"
            f", {dense} of {len(self.layers)} layers dense"
        )
        for figure in self.figures:
            text += f"; {figure['metric']} {figure['reduction']} {figure['value']:.4g}"
        return text

    def __rich__(self) -> Table:
        table = Table(title=escape(self.summary()), title_justify="left")
        table.add_column("layer", overflow="fold")
        for name in ("weight", "c", "error", "sensitivity", "loss, %", "cost", "of dense"):
            table.add_column(name, justify="right")
        whole = self.loss or 1.0
        for layer in self.layers:
            choice = layer.chosen
            table.add_row(
                escape(layer.name),
                "×".join(map(str, layer.shape)),
                "dense" if choice.reduction == 1 else f"{choice.reduction:.3g}",
                f"{choice.error:.3f}",
                f"{layer.sensitivity:.3g}",
                f"{100 * choice.loss / whole:.1f}",
                _amount(choice.cost, self.cost),
                f"{choice.cost / layer.dense_cost:.0%}",
            )
        return table

    def __str__(self) -> str:
        return render(self)


def _layer(entry: Mapping[str, Any]) -> PlannedLayer:
    name = str(entry["name"])
    known = {f.name for f in fields(PlannedLayer)}
    if set(entry) != known:
        raise ConfigError(f"{name}: a layer of a plan has exactly the fields {sorted(known)}")
    choices, shared = (
        tuple(LayerChoice(**choice) for choice in entry[key]) for key in ("choices", "shared")
    )
    numbers = [getattr(c, f.name) for c in (*choices, *shared) for f in fields(LayerChoice)]
    if not choices or choices[0].reduction != 1:
        raise ConfigError(f"{name}: the first choice of a layer is dense, reduction 1")
    if not all(isinstance(x, int | float) and 0 <= x < math.inf for x in numbers):
        raise ConfigError(f"{name}: a choice has a value that is no number of at least 0")
    rows, columns = (int(size) for size in entry["shape"])
    values = {**entry, "shape": (rows, columns), "choices": choices, "shared": shared}
    return PlannedLayer(**values)


def _amount(cost: float, kind: Cost) -> str:
    if kind == "latency":
        return f"{cost / 1000:.3g} ms" if cost >= 1000 else f"{cost:.3g} µs"
    return f"{cost / 1e6:.3g} M" if cost >= 1e5 else f"{cost:.6g}"
