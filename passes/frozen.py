"""Frozen values: graph nodes that are a view or cast of one frozen input.

``F.linear(x, w)``, ``x @ w.t()`` and ``q, k, v = w.chunk(3)`` all multiply by a pure function of a
parameter. The function is kept as a list of steps, so that it can be replayed on whatever tensor
the caller passes later: after ``load_state_dict``, or for another instance of the same module.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

_METHODS = frozenset(
    (
        "t",
        "T",
        "mT",
        "transpose",
        "permute",
        "swapaxes",
        "view",
        "reshape",
        "contiguous",
        "detach",
        "to",
        "float",
        "half",
        "bfloat16",
        "double",
        "chunk",
        "split",
        "unsqueeze",
        "squeeze",
        "select",
        "narrow",
        "unbind",
        "flatten",
        "unflatten",
        "__getitem__",
    )
)
_FUNCTIONS = frozenset(
    {
        operator.getitem,
        torch.t,
        torch.transpose,
        torch.permute,
        torch.swapaxes,
        torch.reshape,
        torch.chunk,
        torch.split,
        torch.squeeze,
        torch.unsqueeze,
        torch.select,
        torch.narrow,
        torch.unbind,
        torch.flatten,
    }
)
_ATEN = frozenset(
    (
        "t",
        "transpose",
        "swapaxes",
        "permute",
        "numpy_T",
        "matrix_H",
        "mT",
        "view",
        "reshape",
        "_unsafe_view",
        "contiguous",
        "clone",
        "detach",
        "alias",
        "to",
        "_to_copy",
        "chunk",
        "split",
        "split_with_sizes",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "narrow",
        "unbind",
        "flatten",
        "unflatten",
    )
)
_ATTRIBUTES = frozenset({"T", "mT"})


@dataclass(frozen=True)
class FrozenValue:
    """A pure function of one frozen graph input.

    Attributes:
        root: the placeholder or ``get_attr`` node of the input.
        path: the nodes between the root and the value, in order.
    """

    root: fx.Node
    path: tuple[fx.Node, ...] = ()

    @property
    def node(self) -> fx.Node:
        """The node that holds the value."""
        return self.path[-1] if self.path else self.root

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the function within its graph, and across graphs that spell it alike."""
        return tuple((str(n.target), repr(n.args[1:]), repr(n.kwargs)) for n in self.path)

    def function(self) -> Callable[[Tensor], Tensor]:
        """The function from the root's tensor to the value, free of the graph."""
        steps = [_step(node) for node in self.path]

        def evaluate(tensor: Any) -> Any:
            for step in steps:
                tensor = step(tensor)
            return tensor

        return evaluate


def frozen_value(node: object, roots: frozenset[fx.Node]) -> FrozenValue | None:
    """``node`` as a function of one of ``roots``, or ``None`` if it is anything else."""
    path: list[fx.Node] = []
    while isinstance(node, fx.Node) and node not in roots:
        if not _is_view_or_cast(node):
            return None
        path.append(node)
        node = node.args[0]
    return FrozenValue(node, tuple(reversed(path))) if isinstance(node, fx.Node) else None


def _is_view_or_cast(node: fx.Node) -> bool:
    inputs = node.all_input_nodes
    if len(inputs) != 1 or not node.args or node.args[0] is not inputs[0]:
        return False
    if node.op == "call_method":
        return node.target in _METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        return namespace == "aten" and name in _ATEN
    return node.target in _FUNCTIONS


def _step(node: fx.Node) -> Callable[[Any], Any]:
    target, args, kwargs = node.target, node.args[1:], dict(node.kwargs)
    if node.op == "call_method":
        assert isinstance(target, str)
        return lambda value: getattr(value, target)(*args, **kwargs)
    assert callable(target)
    return lambda value: target(value, *args, **kwargs)


def example(node: object) -> Any:
    """The fake value of a node: Dynamo's ``example_value`` or AOT and export's ``val``."""
    if not isinstance(node, fx.Node):
        return None
    return node.meta.get("example_value", node.meta.get("val"))
