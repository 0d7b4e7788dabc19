"""Join the product of one layer with the sketch of the next, so that nothing is written between.

    sketch₂(act(matmul(X̃, z, b)))        ->  matmul_sketch(X̃, z, b, act, S₂)
    sketch₂(act(linear(x, S, z, b)))     ->  matmul_sketch(sketch(x, S), z, b, act, S₂)
    activation_sketch₂(matmul(X̃, z, b))  ->  matmul_sketch(X̃, z, b, act, S₂)
    sketch₂(act(g)·u)                    ->  matmul_sketch(X̃, z, b, z_gate, b_gate, act, S₂)
        where [g, u] = matmul(X̃, [z_gate, z]), or the halves of one layer's product

as for the layers of a feed-forward block. ``sketch₂`` is an ``ss1::sketch`` or the one inside an
``ss1::linear``; a plain activation is the product's or the sketch's by now, or there is none, so
it runs last. Views, copies and idle dropouts may lie between. The gated form is for learned
sketches with J = 1 on both sides. Products with a residual or with another reader stay.

Whether the operator launches one kernel or two is its own choice, by the shapes of the call.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from ss1_compile.passes.activations import find_gated
from ss1_compile.passes.emit import Emit, erase_unused, feed, leading_sizes
from ss1_compile.passes.frozen import example
from ss1_compile.passes.matching import (
    Linear,
    PassResult,
    Reader,
    as_linear,
    as_reader,
    is_matmul,
    matmul_weights,
    only_user,
    row_path,
)
from ss1_compile.passes.order import Order

_aten = torch.ops.aten
_ss1 = torch.ops.ss1
_SPLITS = ("chunk", "split", torch.chunk, torch.split, _aten.chunk.default, _aten.split.Tensor)


@dataclass(frozen=True)
class _Product:
    """One layer's product, or two layers' of which one is the other's gate.

    Attributes:
        node: the ``ss1::matmul``, or the ``ss1::linear`` that has one inside.
        read: makes ``X̃``, or ``x`` of a linear.
        activation: its own, or the gate's.
        gate: ``(z, bias)`` of the gate's layer.
        gate_first: whether the gate is the first half of z, the second, or no half of it.
        linear: what the node is where it is an ``ss1::linear``.
        replaced: the nodes of the gate's activation.
    """

    node: fx.Node
    read: fx.Node
    z: fx.Node
    bias: fx.Node | None
    activation: str
    gate: tuple[fx.Node | None, fx.Node | None] = (None, None)
    gate_first: bool | None = None
    linear: Linear | None = None
    replaced: frozenset[fx.Node] = frozenset()

    @property
    def moved(self) -> list[fx.Node | None]:
        """What is read where the sketch is; a linear's own sketch stays where it was."""
        return [None if self.linear else self.read, self.z, self.bias, *self.gate]


def join_products(graph: fx.Graph) -> PassResult:
    """Join products of ``graph`` with the sketch that alone reads them, in place."""
    result, order = PassResult("join_products"), Order(graph)
    for node in list(graph.nodes):
        if node._erased:
            continue
        reader, activation = _reader(node)
        if reader is None:
            continue
        path = row_path(reader.x)
        if any(only_user(between) is None for between in path):
            continue
        product = _product(path[-1]) or _gated_product(path[-1], reader, order)
        if product is None or "none" not in (activation, product.activation):
            continue
        sizes = leading_sizes(reader, order, product.read)
        if sizes is None or not order.may_move(product.moved, product.node, node):
            continue
        layers = reader.layers
        _rewrite(reader, product, activation, sizes, order)
        erase_unused(path, replaced=product.replaced)
        gates = [z for z in product.gate[:1] if z is not None]
        if gates or product.gate_first is not None:
            result.add(f"gated {product.activation}", *layers)
        result.add("joined", *gates, product.z, *layers)
    return result


def _rewrite(
    reader: Reader, product: _Product, activation: str, sizes: list[Any], order: Order
) -> None:
    sketched = product.read
    if product.linear is not None:
        emit = Emit(order, product.node)
        x, reduced_features = emit.flatten(product.read), product.linear.reduced_features
        sketched = emit(_ss1.sketch.default, x, product.linear.sketch, reduced_features)
    emit = Emit(order, reader.node)
    operands = [product.z, product.bias, *product.gate]
    if product.gate_first is not None:
        n = example(product.z).shape[0] // 2
        halves = [
            None if whole is None else emit(_aten.slice.Tensor, whole, 0, start, start + n)
            for start in (0, n)
            for whole in operands[:2]
        ]
        operands = [*halves[2:], *halves[:2]] if product.gate_first else halves
    further = emit(
        _ss1.matmul_sketch.default,
        *(sketched, *operands),
        activation if product.activation == "none" else product.activation,
        reader.sketch,
        reader.reduced_features,
    )
    feed(emit, reader, further, sizes)


def _reader(node: fx.Node) -> tuple[Reader | None, str]:
    """``node`` as something that sketches its input, and what it does to it first."""
    if node.target is not _ss1.activation_sketch.default:
        return as_reader(node), "none"
    x, gate, sketch, reduced_features, activation = cast(
        tuple[fx.Node, fx.Node | None, fx.Node, int, str], node.args
    )
    if gate is not None:
        return None, "none"
    return Reader(node, x, sketch, reduced_features, None), activation


def _product(node: fx.Node) -> _Product | None:
    linear = as_linear(node)
    if linear is not None:
        return _Product(node, linear.x, linear.z, linear.bias, "none", linear=linear)
    if not is_matmul(node) or len(matmul_weights(node)) != 1:
        return None
    sketched, (z,), (bias,), residual, activation = cast(Any, node.args)
    return None if residual is not None else _Product(node, sketched, z, bias, activation)


def _gated_product(node: fx.Node, reader: Reader, order: Order) -> _Product | None:
    """``node`` as ``act(gate) · up`` of the two halves of one product."""
    if not _is_one_learned(example(reader.sketch)):
        return None
    activation, up = find_gated(node, order)
    if activation is None or up is None or not set(activation.x.users) <= activation.nodes:
        return None
    paths = row_path(activation.x), row_path(up)
    inner = [between for path in paths for between in path if between is not activation.x]
    if any(only_user(between) is None for between in inner):
        return None
    gate, other = (_half(path[-1]) for path in paths)
    if gate is None or other is None or gate.of is not other.of or gate.second is other.second:
        return None
    name, replaced = activation.name, activation.nodes
    if is_matmul(gate.of) and len(matmul_weights(gate.of)) == 2:
        sketched, z, bias, residual, behind = cast(Any, gate.of.args)
        if residual is not None or behind != "none" or example(sketched).shape[0] != 1:
            return None
        if example(z[0]).shape != example(z[1]).shape:
            return None
        i, j = int(other.second), int(gate.second)
        gated = z[j], bias[j]
        return _Product(gate.of, sketched, z[i], bias[i], name, gated, replaced=replaced)
    path = row_path(gate.of)
    product = None if any(only_user(n) is None for n in path) else _product(path[-1])
    if product is None or product.activation != "none":
        return None
    if product.linear is not None and not _is_one_learned(example(product.linear.sketch)):
        return None
    if product.linear is None and example(product.read).shape[0] != 1:
        return None
    return replace(product, gate_first=other.second, activation=name, replaced=replaced)


class _Half(NamedTuple):
    of: fx.Node
    second: bool


def _half(node: fx.Node) -> _Half | None:
    """``node`` as one half of the columns of another node, both halves of which have one reader."""
    if node.target is _aten.slice.Tensor and len(node.args) == 4:
        of, dim, start, end = cast(tuple[fx.Node, int, int, int], node.args)
        whole = example(of).shape
        if len(whole) != 2 or dim != 1 or len(of.users) != 2 or not isinstance(start, int):
            return None
        half = whole[1] // 2
        return _Half(of, start > 0) if (start, end) in ((0, half), (half, 2 * half)) else None
    parts, which = (*node.args, None, None)[:2]
    if node.target is not operator.getitem or which not in (0, 1):
        return None
    if not isinstance(parts, fx.Node) or parts.target not in _SPLITS or len(parts.users) != 2:
        return None
    of = cast(fx.Node, parts.args[0])
    if only_user(of) is None:
        return None
    values, whole = example(parts), example(of).shape
    halves = len(values) == 2 and all(2 * v.shape[-1] == whole[-1] for v in values)
    return _Half(of, bool(which)) if halves else None


def _is_one_learned(sketch: Any) -> bool:
    return isinstance(sketch, Tensor) and sketch.is_floating_point() and sketch.shape[0] == 1
