"""What a plan is to reach: a budget of parameters or time, or a quality."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ss1_compile.errors import ConfigError

Cost = Literal["parameters", "latency"]

_PATTERN = re.compile(
    r"(?:(?P<name>\w+)\s*(?P<sign><=|>=|≤|≥)\s*)?"
    r"(?P<number>[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(?P<unit>%|us|µs|ms|s|k|M|G)?"
)
_UNITS = {
    "parameters": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    "latency": {"us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6},
}
_EXAMPLES = (
    "'50%' (of the linear layers' parameters or time), 'parameters <= 6M', 'latency <= 3 ms', "
    "'cosine >= 0.98', 'perplexity <= +3%' or 'metric >= 0.9'"
)


@dataclass(frozen=True)
class Target:
    """A parsed target.

    Attributes:
        kind: ``"budget"`` or ``"quality"``.
        name: ``"parameters"`` or ``"latency"``, or the metric: ``"cosine"``, ``"perplexity"`` or
            ``"metric"`` (the user's own function); ``""`` for a budget of whatever is the cost.
        value: as ``unit`` says.
        unit: ``"fraction"`` of the dense cost, ``"absolute"`` (numbers, microseconds or the
            metric's own unit) or ``"change"`` relative to the dense model's figure.
        more_is_better: of a quality.
    """

    kind: Literal["budget", "quality"]
    name: str
    value: float
    unit: Literal["fraction", "absolute", "change"]
    more_is_better: bool = False

    @classmethod
    def parse(cls, target: str | float) -> Target:
        """Read a target.

        Args:
            target: a number in (0, 1], the fraction of the cost to keep, or text such as ``"50%"``,
                ``"parameters <= 6M"``, ``"latency <= 3 ms"``, ``"cosine >= 0.98"``,
                ``"perplexity <= +3%"``, ``"metric >= 0.9"``.

        Raises:
            ConfigError: none of these, or out of range.
        """
        if isinstance(target, int | float) and not isinstance(target, bool):
            return cls._budget("", 100 * target, "%", str(target))
        found = _PATTERN.fullmatch(target.strip()) if isinstance(target, str) else None
        if found is None:
            raise ConfigError(f"target must be like {_EXAMPLES}; got {target!r}")
        name, sign = found["name"] or "", found["sign"]
        number, unit = float(found["number"]), found["unit"] or ""
        if name in ("", *_UNITS):
            if sign in (">=", "≥"):
                raise ConfigError(f"{name} is a cost, a target says {name} <= ...; got {target!r}")
            return cls._budget(name, number, unit, str(target))
        if name not in ("cosine", "perplexity", "metric"):
            raise ConfigError(f"unknown target {name!r} in {target!r}; it is like {_EXAMPLES}")
        if unit not in ("", "%"):
            raise ConfigError(f"a {name} has no unit {unit!r}; got target {target!r}")
        more = sign in (">=", "≥")
        if name != "metric" and more != (name == "cosine"):
            better = "more" if name == "cosine" else "less"
            raise ConfigError(f"of {name} {better} is better; got target {target!r}")
        if unit == "%":
            return cls("quality", name, number / 100, "change", more)
        return cls("quality", name, number, "absolute", more)

    @classmethod
    def _budget(cls, name: str, number: float, unit: str, given: str) -> Target:
        if unit == "%":
            if not 0 < number <= 100:
                raise ConfigError(f"a budget is more than 0 % and at most 100 %, got {given!r}")
            return cls("budget", name, number / 100, "fraction")
        units = _UNITS.get(name, {})
        if unit not in units:
            what = f"{name} needs one of the units {sorted(units)} or %" if name else "give it in %"
            raise ConfigError(f"no budget: {given!r}; {what}")
        if number <= 0:
            raise ConfigError(f"a budget is positive, got {given!r}")
        return cls("budget", name, number * units[unit], "absolute")

    def budget(self, dense: float) -> float:
        """The budget in the cost's unit, for a dense cost of ``dense``."""
        return self.value * dense if self.unit == "fraction" else self.value

    def met_by(self, figure: float, dense: float) -> bool:
        """Whether a figure reaches the quality; ``dense`` is the dense model's."""
        bound = dense * (1 + self.value) if self.unit == "change" else self.value
        return figure >= bound if self.more_is_better else figure <= bound
