"""Recognise activations, by name or by value.

``F.gelu(x)`` is known by its target. Spelt out, as ``0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))``
say, it takes many orders and forms; so the expression is evaluated in float64 and compared with the
activations that the kernels know. Only analytic functions are followed, so that agreement on the
probes is agreement everywhere.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ss1_compile.passes.frozen import example
from ss1_compile.passes.matching import argument, only_user, same_form, same_shape
from ss1_compile.passes.order import Order

_aten = torch.ops.aten
_MOST_NODES = 16
_PROBES = torch.cat(
    [torch.linspace(-12, 12, 241, dtype=torch.float64), torch.tensor([-1e3, -60.0, 60.0, 1e3])]
)
_TOLERANCE = 1e-6
"""Relative to 1 + |x|. Models round their constants to 7 digits or more."""


@dataclass(frozen=True)
class Activation:
    """``node = name(x)``.

    Attributes:
        node: the node that holds the result.
        x: the input, of the same shape and dtype.
        name: as in ``ss1_compile.kernels.fused_portable.ACTIVATIONS``.
        nodes: every node of the expression, ``node`` included.
    """

    node: fx.Node
    x: fx.Node
    name: str
    nodes: frozenset[fx.Node]


_GELUS = frozenset({F.gelu, torch._C._nn.gelu, _aten.gelu.default})
_NAMED: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    _aten.relu.default: "relu",
    F.silu: "silu",
    torch._C._nn.silu: "silu",
    _aten.silu.default: "silu",
    "relu": "relu",
    "relu_": "relu",
}


def find_activation(node: object, order: Order) -> Activation | None:
    """``node`` as an activation of some node, or ``None``.

    One that works in place counts where nothing else reads what it overwrites.
    """
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if not isinstance(example(node), Tensor):
        return None
    name = _NAMED.get(node.target)
    if node.target in _GELUS:
        approximate = argument(node, 1, "approximate", "none")
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    if name is None:
        return _by_value(node, order) if _operation(node) in _PRODUCTS else None
    x = argument(node, 0, "input")
    if not isinstance(x, fx.Node) or not same_form(x, node):
        return None
    in_place = example(x).untyped_storage()._cdata == example(node).untyped_storage()._cdata
    if in_place and not order.dies_at(x, node):
        return None
    return Activation(node, x, name, frozenset({node}))


def find_gated(node: fx.Node, order: Order) -> tuple[Activation | None, fx.Node | None]:
    """``(activation, None)`` if ``node`` is one, ``(activation, x)`` if it is ``act(gate) · x``."""
    activation = find_activation(node, order)
    if activation is not None or node.target not in _SAME[operator.mul] or len(node.args) != 2:
        return activation, None
    a, b = node.args
    for inner, x in ((a, b), (b, a)):
        activation = find_activation(inner, order)
        if activation is None or not isinstance(x, fx.Node) or x in activation.nodes:
            continue
        if only_user(activation.node) is node and same_form(activation.node, x):
            return activation, x
    return None, None


def _by_value(root: fx.Node, order: Order) -> Activation | None:
    """The expression of one input that ends in ``root``, if it computes an activation."""
    if not any(_operation(n) in _BENT for n in _near(root)):
        return None
    result = example(root)
    inside: list[fx.Node] = []
    frontier = {root}
    while len(inside) < _MOST_NODES:
        node = max(frontier, key=order.index.__getitem__)
        if inside and len(frontier) == 1:
            name = _name_of(root, node, inside) if same_form(node, root) else None
            if name is not None:
                return Activation(root, node, name, frozenset(inside))
        if _operation(node) is None or not isinstance(value := example(node), Tensor):
            return None
        if not same_shape(value, result) or _narrows(value.dtype, result.dtype):
            return None
        if inside and not set(node.users) <= set(inside):
            return None  # it is computed anyway
        frontier.remove(node)
        frontier.update(node.all_input_nodes)
        inside.append(node)
    return None


def _near(root: fx.Node) -> Iterator[fx.Node]:
    """The node and its inputs of three generations: enough to see whether there is any bend."""
    generation = {root}
    for _ in range(4):
        yield from generation
        generation = {before for node in generation for before in node.all_input_nodes}
        if len(generation) > _MOST_NODES:
            return


def _narrows(compute: torch.dtype, result: torch.dtype) -> bool:
    """Whether an intermediate type is coarser than the result's."""
    return not compute.is_floating_point or torch.finfo(compute).eps > torch.finfo(result).eps


def _name_of(root: fx.Node, x: fx.Node, inside: list[fx.Node]) -> str | None:
    values: dict[fx.Node, Any] = {x: _PROBES}
    for node in reversed(inside):
        operation = _operation(node)
        assert operation is not None
        arguments = fx.map_arg(node.args, values.__getitem__)
        if operation is _identity:
            arguments = arguments[:1]
        values[node] = operation(*arguments)
    actual = values[root]
    for name, function in _KNOWN.items():
        if bool(((actual - function(_PROBES)).abs() <= _TOLERANCE * (1 + _PROBES.abs())).all()):
            return name
    return None


_KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
_PRODUCTS = (operator.mul, operator.truediv)
"""What every activation that is spelt out ends with."""
_BENT = frozenset({torch.tanh, torch.erf, torch.sigmoid})


def _identity(x: Any) -> Any:
    return x


_SAME: dict[Callable[..., Any], tuple[Any, ...]] = {
    operator.add: (operator.add, torch.add, "add", _aten.add.Tensor),
    operator.sub: (operator.sub, torch.sub, "sub", _aten.sub.Tensor),
    operator.mul: (operator.mul, torch.mul, torch.multiply, "mul", _aten.mul.Tensor),
    operator.truediv: (operator.truediv, torch.div, "div", _aten.div.Tensor),
    operator.neg: (operator.neg, torch.neg, "neg", _aten.neg.default),
    operator.pow: (operator.pow, torch.pow, "pow", _aten.pow.Tensor_Scalar),
    torch.square: (torch.square, "square", _aten.square.default),
    torch.tanh: (torch.tanh, F.tanh, "tanh", _aten.tanh.default),
    torch.erf: (torch.erf, torch.special.erf, "erf", _aten.erf.default),
    torch.sigmoid: (torch.sigmoid, F.sigmoid, "sigmoid", _aten.sigmoid.default),
    math.sqrt: (math.sqrt,),
    _identity: ("to", "float", "type_as"),
}
_OPERATIONS = {spelling: made for made, spellings in _SAME.items() for spelling in spellings}


def _operation(node: fx.Node) -> Callable[..., Any] | None:
    """The analytic function of a node on float64, or ``None``."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.kwargs and set(node.kwargs) != {"dtype"}:
        return None  # alpha, rounding_mode, out
    return _OPERATIONS.get(node.target)
