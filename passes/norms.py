"""Recognise LayerNorm and RMSNorm, called by name or spelt out.

Spelt out, an RMSNorm is ``w · cast(x · rsqrt(mean(x²) + ε))`` with casts up to float32 and back in
any place, as Transformers and others write it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ss1_compile.passes.frozen import example
from ss1_compile.passes.matching import argument

_aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """``node = norm(x) · weight + bias`` over the last dimension, in x's dtype.

    Attributes:
        node: the node that holds the result.
        x: the input, of the same shape and dtype.
        weight: ``[K]`` of x's dtype, or ``None``.
        bias: likewise.
        eps: ε.
        rms: RMSNorm and not LayerNorm.
        nodes: every node of the expression, ``node`` included.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    rms: bool
    nodes: frozenset[fx.Node] = field(default_factory=frozenset)


_LAYER_NORMS = frozenset({F.layer_norm, torch.layer_norm, _aten.layer_norm.default})
_RMS_NORMS = frozenset({F.rms_norm, torch.rms_norm, _aten.rms_norm.default})


def find_norm(node: fx.Node) -> Norm | None:
    """``node`` as a norm over its last dimension, or ``None``."""
    value = example(node)
    if node.op not in ("call_function", "call_method") or not isinstance(value, Tensor):
        return None
    if node.target in _LAYER_NORMS or node.target in _RMS_NORMS:
        norm = _called(node)
    else:
        norm = _spelt_out(node)
    if norm is None:
        return None
    x = example(norm.x)
    if not isinstance(x, Tensor) or x.dtype != value.dtype or x.dim() < 2:
        return None
    for vector in (norm.weight, norm.bias):
        held = example(vector)
        if vector is not None and (
            not isinstance(held, Tensor)
            or held.dtype != x.dtype
            or tuple(held.shape) != (x.shape[-1],)
        ):
            return None
    return norm


def _called(node: fx.Node) -> Norm | None:
    rms = node.target in _RMS_NORMS
    x, shape = argument(node, 0, "input"), argument(node, 1, "normalized_shape")
    weight = argument(node, 2, "weight")
    bias = None if rms else argument(node, 3, "bias")
    eps = argument(node, 3 if rms else 4, "eps", None if rms else 1e-5)
    if not isinstance(x, fx.Node) or not isinstance(shape, tuple | list) or len(shape) != 1:
        return None
    if eps is None:  # rms_norm chooses one by the dtype
        if example(x).dtype not in (torch.float32, torch.float64):
            return None
        eps = torch.finfo(example(x).dtype).eps
    if not all(isinstance(vector, fx.Node | None) for vector in (weight, bias)):
        return None
    return Norm(node, x, weight, bias, float(eps), rms, frozenset({node}))


# --- RMSNorm spelt out --------------------------------------------------------------------------

_MULTIPLY = (operator.mul, torch.mul, "mul", _aten.mul.Tensor)
_DIVIDE = (operator.truediv, torch.div, "div", _aten.div.Tensor)
_ADD = (operator.add, torch.add, "add", _aten.add.Tensor)
_POWER = (operator.pow, torch.pow, "pow", _aten.pow.Tensor_Scalar)
_SQUARE = (torch.square, "square", _aten.square.default)
_MEAN = (torch.mean, "mean", _aten.mean.dim)
_RSQRT = (torch.rsqrt, "rsqrt", _aten.rsqrt.default)
_SQRT = (torch.sqrt, "sqrt", _aten.sqrt.default)
_CASTS = ("to", "float", "half", "bfloat16", "type", "type_as")


def _spelt_out(root: fx.Node) -> Norm | None:
    seen: list[fx.Node] = []
    node = _uncast(root, seen)
    weight: fx.Node | None = None
    scaled = _scaled(node, seen)
    if scaled is None and node.target in _MULTIPLY:
        for vector, inner in _either_order(node):
            if getattr(example(vector), "ndim", 0) == 1:
                before = len(seen)
                scaled = _scaled(_uncast(inner, seen), seen)
                if scaled is not None:
                    weight = vector
                    seen.append(node)
                    break
                del seen[before:]
    if scaled is None:
        return None
    x, eps = scaled
    while example(x).dtype != example(root).dtype and (uncast := _cast_input(x)) is not None:
        seen.append(x)
        x = uncast
    if any(_narrowed(inside, root) for inside in seen):
        return None
    return Norm(root, x, weight, None, eps, rms=True, nodes=frozenset({root, *seen}))


def _scaled(node: fx.Node, seen: list[fx.Node]) -> tuple[fx.Node, float] | None:
    """``(x, ε)`` of ``x · rsqrt(mean(x²) + ε)`` or ``x / sqrt(mean(x²) + ε)``."""
    if node.target in _MULTIPLY:
        pairs: list[tuple[Any, Any]] = list(_either_order(node))
        roots: Any = _RSQRT
    elif node.target in _DIVIDE and len(node.args) == 2:
        pairs = [(node.args[0], node.args[1])]
        roots = _SQRT
    else:
        return None
    for x, factor in pairs:
        if not isinstance(x, fx.Node) or not isinstance(factor, fx.Node):
            continue
        found = _mean_of_squares(factor, roots)
        casts: list[fx.Node] = []
        if found is not None and _uncast(found[0], casts) is _uncast(x, casts):
            seen += [node, *found[2], *casts]
            return x, found[1]
    return None


def _mean_of_squares(
    node: Any, roots: Iterable[Any]
) -> tuple[fx.Node, float, list[fx.Node]] | None:
    """``(x, ε, nodes)`` of ``root(mean(x²) + ε)``."""
    inside: list[fx.Node] = []
    node = _uncast(node, inside)
    if node.target not in roots:
        return None
    inside.append(node)
    node = _uncast(node.args[0], inside)
    if not isinstance(node, fx.Node) or node.target not in _ADD or node.kwargs:
        return None
    inside.append(node)
    sides = [argument for argument in node.args if isinstance(argument, fx.Node)]
    numbers = [argument for argument in node.args if isinstance(argument, float | int)]
    if len(sides) != 1 or len(numbers) != 1:
        return None
    eps = float(numbers[0])
    node = _uncast(sides[0], inside)
    if node.target not in _MEAN or argument(node, 2, "keepdim", False) is not True:
        return None
    last = argument(node, 1, "dim")
    rank = example(node).dim()
    if last not in (-1, rank - 1, [-1], (-1,), [rank - 1], (rank - 1,)):
        return None
    inside.append(node)
    node = _uncast(node.args[0], inside)
    if not isinstance(node, fx.Node):
        return None
    inside.append(node)
    x = node.args[0] if node.args else None
    squares = (
        node.target in _SQUARE
        or (node.target in _POWER and len(node.args) == 2 and node.args[1] == 2)
        or (node.target in _MULTIPLY and len(node.args) == 2 and node.args[0] is node.args[1])
    )
    return (x, eps, inside) if squares and isinstance(x, fx.Node) else None


def _either_order(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    if len(node.args) != 2 or node.kwargs:
        return []
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return []
    return [(a, b), (b, a)]


def _cast_input(node: fx.Node) -> fx.Node | None:
    """The input of a cast between floating types, or of a cast that does nothing."""
    if node.op != "call_method" or node.target not in _CASTS or not node.args:
        return None
    before, after = example(node.args[0]), example(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if not before.is_floating_point() or not after.is_floating_point():
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) and before.device == after.device else None


def _uncast(node: Any, seen: list[fx.Node]) -> Any:
    """``node`` without casts; anything but a node is returned as it is."""
    while isinstance(node, fx.Node) and (inner := _cast_input(node)) is not None:
        seen.append(node)
        node = inner
    return node


def _narrowed(node: fx.Node, root: fx.Node) -> bool:
    """Whether a node keeps fewer digits than the result."""
    value, result = example(node), example(root)
    return bool(torch.finfo(value.dtype).eps > torch.finfo(result.dtype).eps)
