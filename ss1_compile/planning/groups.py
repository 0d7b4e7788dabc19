"""Layers that read the same input: with the same reduction they share a sketch, which is better.

So such a group is one unit of the budget problem. Its options are one reduction for all, as
measured with a shared sketch, and every mixture, as measured with sketches of their own. (Where
some but not all of a group agree, these share in fact: the measured loss is on the safe side.)
Options that another beats in both cost and loss are dropped on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ss1_compile.planning.layers import LayerChoice, PlannedLayer


@dataclass(frozen=True)
class Option:
    """One way to treat a unit: a reduction for each of its layers, by name."""

    reductions: dict[str, float]
    loss: float
    cost: float


def units(layers: Sequence[PlannedLayer]) -> list[list[Option]]:
    """The options of every group, and of every layer that is in none."""
    groups: dict[object, list[PlannedLayer]] = {}
    for layer in layers:
        key = layer.name if layer.group is None else layer.group
        groups.setdefault(key, []).append(layer)
    return [_options(members) for members in groups.values()]


def settle(layers: tuple[PlannedLayer, ...]) -> tuple[PlannedLayer, ...]:
    """The layers with ``sharing`` as their reductions imply."""
    members: dict[int, list[PlannedLayer]] = {}
    for layer in layers:
        if layer.group is not None:
            members.setdefault(layer.group, []).append(layer)
    together = {
        group: len({layer.reduction for layer in found}) == 1
        and all(_shared(layer, layer.reduction) is not None for layer in found)
        for group, found in members.items()
    }
    return tuple(
        replace(layer, sharing=layer.group is not None and together[layer.group])
        for layer in layers
    )


def _options(members: Sequence[PlannedLayer]) -> list[Option]:
    found = [Option({}, 0.0, 0.0)]
    for layer in members:
        found = _front(
            [
                Option(
                    {**before.reductions, layer.name: choice.reduction},
                    before.loss + choice.loss,
                    before.cost + choice.cost,
                )
                for before in found
                for choice in layer.choices
            ]
        )
    for common in members[0].shared:
        choices = [_shared(layer, common.reduction) for layer in members]
        known = [choice for choice in choices if choice is not None]
        if len(known) == len(members):
            found.append(
                Option(
                    {layer.name: common.reduction for layer in members},
                    sum(choice.loss for choice in known),
                    sum(choice.cost for choice in known),
                )
            )
    return _front(found)


def _shared(layer: PlannedLayer, reduction: float) -> LayerChoice | None:
    return next((c for c in layer.shared if c.reduction == reduction), None)


def _front(options: Sequence[Option]) -> list[Option]:
    """Those that no other beats in both, from cheap to dear."""
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss)):
        if not best or option.loss < best[-1].loss:
            best.append(option)
    return best
