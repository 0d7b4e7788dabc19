"""Join the product of one layer with the sketch of the next, so that nothing is written between.

    sketch₂(act(matmul(X̃, z, b)))            ->  matmul_sketch(X̃, z, b, act, S₂)
    sketch₂(act(linear(x, S, z, b)))         ->  matmul_sketch(sketch(x, S), z, b, act, S₂)
    activation_sketch₂(matmul(X̃, z, b))      ->  matmul_sketch(X̃, z, b, act, S₂)

as for the two layers of a feed-forward block. ``sketch₂`` is an ``ss1::sketch`` or the one inside
an ``ss1::linear``; the activation is the product's or the sketch's by now, or there is none, so it
runs last. Views, copies and idle dropouts may lie between. A product of several layers, one with a
residual or with another reader stays as it is, and so does a gated activation.

Whether the operator launches one kernel or two is its own choice, by the shapes of the call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ss1_compile.passes.emit import Emit, erase_unused, feed, leading_sizes
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

_ss1 = torch.ops.ss1


@dataclass(frozen=True)
class _Product:
    """One layer's product: an ``ss1::matmul``, or the one inside an ``ss1::linear``.

    Attributes:
        node: makes ``act(X̃ zᵀ + b)``.
        read: makes ``X̃``, or ``x`` of a linear.
        linear: what the node is where it is an ``ss1::linear``.
    """

    node: fx.Node
    read: fx.Node
    z: fx.Node
    bias: fx.Node | None
    activation: str
    linear: Linear | None

    @property
    def moved(self) -> list[fx.Node | None]:
        """What is read where the sketch is; a linear's own sketch stays where it was."""
        return [self.z, self.bias] if self.linear else [self.read, self.z, self.bias]


def join_products(graph: fx.Graph) -> PassResult:
    """Join products of ``graph`` with the sketch that alone reads them, in place."""
    result, order = PassResult("join_products"), Order(graph)
    for node in list(graph.nodes):
        reader, activation = _reader(node)
        if reader is None:
            continue
        path = row_path(reader.x)
        product = _product(path[-1])
        if product is None or any(only_user(between) is None for between in path):
            continue
        if "none" not in (activation, product.activation):
            continue
        sizes = leading_sizes(reader, order, product.read)
        if sizes is None or not order.may_move(product.moved, product.node, node):
            continue
        layers = reader.layers
        sketched = product.read
        if product.linear is not None:
            emit = Emit(order, product.node)
            x, reduced_features = emit.flatten(product.read), product.linear.reduced_features
            sketched = emit(_ss1.sketch.default, x, product.linear.sketch, reduced_features)
        emit = Emit(order, node)
        further = emit(
            _ss1.matmul_sketch.default,
            sketched,
            product.z,
            product.bias,
            activation if product.activation == "none" else product.activation,
            reader.sketch,
            reader.reduced_features,
        )
        feed(emit, reader, further, sizes)
        erase_unused(path)
        result.add("joined", product.z, *layers)
    return result


def _reader(node: fx.Node) -> tuple[Reader | None, str]:
    """``node`` as something that sketches its input, and what it does to it first."""
    if node.target is not _ss1.activation_sketch.default:
        return as_reader(node), "none"
    x, gate, sketch, reduced_features, activation = node.args
    if gate is not None:
        return None, "none"
    return Reader(node, x, sketch, reduced_features, None), activation


def _product(node: fx.Node) -> _Product | None:
    linear = as_linear(node)
    if linear is not None:
        return _Product(node, linear.x, linear.z, linear.bias, "none", linear)
    if not is_matmul(node) or len(matmul_weights(node)) != 1:
        return None
    sketched, (z,), (bias,), residual, activation = node.args
    return None if residual is not None else _Product(node, sketched, z, bias, activation, None)
