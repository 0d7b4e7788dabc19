"""Find the linear layers of a graph: ``y = x Wᵀ + b`` with a frozen ``W``, however it is spelt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ss1_compile.passes.frozen import FrozenValue, example, frozen_value
from ss1_compile.passes.spellings import HOLD_SEVERAL, Operands, frozen_operands, normaliser


@dataclass(frozen=True)
class Site:
    """A linear layer that can be rewritten.

    Attributes:
        node: the node that computes it.
        operands: its operands.
        weight: the weight operand as a function of a frozen input; 2-D, or 3-D if per group.
        bias: the bias likewise, or ``None`` if there is none or it is computed in the graph.
        shape: ``(N, K)``.
    """

    node: fx.Node
    operands: Operands
    weight: FrozenValue
    bias: FrozenValue | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class Skipped:
    """A node with a frozen operand that multiplies like a linear layer but is left alone."""

    node: fx.Node
    weight: FrozenValue | None
    reason: str


def find_sites(graph: fx.Graph, frozen: Iterable[fx.Node]) -> tuple[list[Site], list[Skipped]]:
    """All linear layers of ``graph`` whose weight is a view or cast of one of ``frozen``.

    A weight with any other use (an embedding it is tied to, an in-place update) is left alone:
    both uses must see the same values.
    """
    roots = frozenset(frozen)
    sites: list[Site] = []
    skipped: list[Skipped] = []
    for node in graph.nodes:
        normalise = normaliser(node)
        found = normalise(node, roots) if normalise else None
        if isinstance(found, str):
            weights: list[FrozenValue | None] = [*frozen_operands(node, roots)]
            count = None if normalise in HOLD_SEVERAL else 1
            skipped.extend(Skipped(node, weight, found) for weight in weights[:count] or [None])
        elif isinstance(found, Operands):
            site = _site(node, found, roots)
            if isinstance(site, Site):
                sites.append(site)
            else:
                skipped.append(Skipped(node, frozen_value(found.weight, roots), site))
    return _without_shared(sites, skipped)


def _site(node: fx.Node, operands: Operands, roots: frozenset[fx.Node]) -> Site | str:
    weight = frozen_value(operands.weight, roots)
    assert weight is not None
    value, x = example(weight.node), example(operands.x)
    if not isinstance(value, Tensor) or not isinstance(x, Tensor):
        return "the graph carries no shapes"
    dims = 3 if operands.per_group else 2
    if value.dim() != dims:
        return f"the weight has {value.dim()} dimensions, not {dims}"
    if not value.is_floating_point() or value.layout != torch.strided:
        return f"the weight is {value.dtype}, {value.layout}"
    n, k = reversed(value.shape[-2:]) if operands.weight_is_kn else value.shape[-2:]
    bias = frozen_value(operands.bias, roots) if operands.bias is not None else None
    if bias is not None and (operands.per_group or tuple(example(bias.node).shape) != (n,)):
        bias = None
    return Site(node, operands, weight, bias, (int(n), int(k)))


def _without_shared(sites: list[Site], skipped: list[Skipped]) -> tuple[list[Site], list[Skipped]]:
    """Move the sites whose weight has other users to ``skipped``."""
    consumers = {((*site.operands.repeats, site.node)[0], site.weight.node) for site in sites}
    kept: list[Site] = []
    for site in sites:
        other = _other_user(site.weight.root, consumers)
        if other is None:
            kept.append(site)
        else:
            reason = f"the weight is also used by {_describe(other)}"
            skipped.append(Skipped(site.node, site.weight, reason))
    order = {node: i for i, node in enumerate(sites[0].node.graph.nodes)} if sites else {}
    skipped.sort(key=lambda entry: order.get(entry.node, 0))
    return kept, skipped


def _other_user(node: fx.Node, consumers: set[tuple[fx.Node, fx.Node]]) -> fx.Node | None:
    for user in node.users:
        if (user, node) in consumers:
            continue
        if frozen_value(user, frozenset({node})) is None:
            return user
        other = _other_user(user, consumers)
        if other is not None:
            return other
    return None


def _describe(node: fx.Node) -> str:
    if node.op == "output":
        return "the graph's output"
    return getattr(node.target, "__name__", str(node.target))
