"""Linear layers in the bodies of higher-order operators, which stay dense and must be reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ss1_compile.decision import in_order
from ss1_compile.passes import Skipped, find_sites
from ss1_compile.passes.frozen import frozen_value


def nested_linears(
    module: nn.Module, node: fx.Node, names: Mapping[fx.Node, str]
) -> Iterator[tuple[Skipped, str]]:
    """The linears in the bodies of a higher-order operator (``torch.cond``, a ``no_grad`` region).

    Args:
        module: holds the bodies, under the names that ``get_attr`` nodes give.
        node: any node.
        names: the nodes of the parameters → the names of their layers.

    Yields:
        Each linear, and the name of its layer.
    """
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return
    operands = pytree.tree_leaves(node.args)
    for operand in operands:
        if not isinstance(operand, fx.Node) or operand.op != "get_attr":
            continue
        body = getattr(module, str(operand.target), None)
        if not isinstance(body, fx.GraphModule):
            continue
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        inner: dict[fx.Node, str] = {}
        # What a body captures comes last, in the operands and in its inputs; their numbers may
        # differ (associative_scan takes each operand twice).
        for placeholder, outer in zip(reversed(inputs), reversed(operands), strict=False):
            value = frozen_value(outer, frozenset(names))
            if value is not None:
                inner[placeholder] = names[value.root]
        sites, skipped = find_sites(body.graph, inner)
        for entry in in_order(body.graph, sites, skipped):
            if entry.weight is not None:
                reason = f"inside {node.target.name()}, whose body is not rewritten"
                yield Skipped(entry.node, entry.weight, reason), inner[entry.weight.root]
        for body_node in body.graph.nodes:
            yield from nested_linears(body, body_node, inner)
