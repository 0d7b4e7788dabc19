"""Fuse what makes the input of a sketch into the sketch.

    sketch(act(x))             ->  activation_sketch(x)
    sketch(act(gate) · x)      ->  activation_sketch(x, gate)
    sketch(norm(x))            ->  norm_sketch(x)[0]
    sketch(norm(x + residual)) ->  norm_sketch(x, residual)[0]; the sum is its output 1

where ``sketch`` is an ``ss1::sketch`` or the one inside an ``ss1::linear``, and views, copies and
idle dropouts may lie between. A norm that is read elsewhere too is output 2 of ``norm_sketch``; an
activation that is read elsewhere too is left alone, as fusing it would save nothing. In front of a
learned sketch only a plain gelu is fused: its product has no time to spare for another.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ss1_compile.kernels.fused_cuda import activation_suits_sketch
from ss1_compile.passes.activations import find_gated
from ss1_compile.passes.emit import Emit, erase_unused, feed, leading_sizes, replace
from ss1_compile.passes.frozen import example
from ss1_compile.passes.matching import PassResult, Reader, only_user, readers, row_path, same_form
from ss1_compile.passes.norms import Norm, find_norm
from ss1_compile.passes.order import Order, find_add

_ss1 = torch.ops.ss1


# --- activations --------------------------------------------------------------------------------


def fuse_activations(graph: fx.Graph) -> PassResult:
    """Fuse activations and gated activations into the sketch that alone reads them, in place."""
    result, order = PassResult("fuse_activations"), Order(graph)
    for reader in readers(graph):
        path = row_path(reader.x)
        if any(only_user(node) is None for node in path):
            continue
        activation, x = find_gated(path[-1], order)
        if activation is None:
            continue
        gate = None if x is None else activation.x
        if not _pays(reader.sketch, activation.name, gated=gate is not None):
            continue
        x = x or activation.x
        read = {activation.x, x}
        start = min(activation.nodes, key=order.index.__getitem__)
        if not same_form(x, path[-1]) or not order.may_move(read, start, reader.node):
            continue
        sizes = leading_sizes(reader, order, x)
        if sizes is None:
            continue
        emit = Emit(order, reader.node)
        flat = emit.flatten(x)
        flat_gate = None if gate is None else emit.flatten(gate)
        layers = reader.layers
        sketched = emit(
            _ss1.activation_sketch.default,
            flat,
            flat_gate,
            reader.sketch,
            reader.reduced_features,
            activation.name,
        )
        feed(emit, reader, sketched, sizes)
        erase_unused(path, replaced=activation.nodes)
        result.add(activation.name if gate is None else f"gated {activation.name}", *layers)
    return result


def _pays(sketch: fx.Node, activation: str, gated: bool) -> bool:
    value = example(sketch)
    learned = isinstance(value, Tensor) and value.is_floating_point()
    return activation_suits_sketch(learned, activation, gated)


# --- norms --------------------------------------------------------------------------------------


def fuse_norms(graph: fx.Graph) -> PassResult:
    """Fuse LayerNorm and RMSNorm, and an addition in front, into the sketch, in place."""
    result, order = PassResult("fuse_norms"), Order(graph)
    for reader in readers(graph):
        path = row_path(reader.x)
        norm = find_norm(path[-1])
        if norm is None or not order.may_move(path, norm.node, reader.node):
            continue
        start = min(norm.nodes, key=order.index.__getitem__)
        available = [norm.weight, norm.bias, reader.sketch]
        if not order.precedes(available, norm.node):
            continue
        if not order.may_move([norm.x, norm.weight, norm.bias], start, norm.node):
            continue
        _fuse_norm(reader, norm, path, order, result)
    return result


def _fuse_norm(
    reader: Reader, norm: Norm, path: list[fx.Node], order: Order, result: PassResult
) -> None:
    """Rewrite unless a symbolic size cannot be spelt."""
    layers, keep_norm = reader.layers, any(only_user(node) is None for node in path)
    added = _addition(norm, order)
    x, residual = (norm.x, None) if added is None else added.operands
    wanted = [norm.node] if keep_norm else []
    wanted += [] if added is None else added.outside
    sizes = leading_sizes(reader, order, x)
    shapes = {node: order.leading_sizes(node, [x, residual]) for node in wanted}
    if sizes is None or None in shapes.values():
        return
    emit = Emit(order, norm.node)
    outputs = emit(
        _ss1.norm_sketch.default,
        emit.flatten(x),
        None if residual is None else emit.flatten(residual),
        norm.weight,
        norm.bias,
        reader.sketch,
        reader.reduced_features,
        norm.eps,
        norm.rms,
        keep_norm,
    )
    sketched = emit(operator.getitem, outputs, 0)
    for node in wanted:
        rows = emit(operator.getitem, outputs, 2 if node is norm.node else 1)
        inside = () if node is norm.node or added is None else {*added.path, *norm.nodes}
        replace(node, emit.restore(rows, shapes[node] or []), but=inside)
    feed(Emit(order, reader.node), reader, sketched, sizes)
    summed = () if added is None else added.path
    erase_unused([*summed, *path], replaced=summed)
    result.add("norm" if added is None else "residual + norm", *layers)


@dataclass(frozen=True)
class _Addition:
    """The addition whose result a norm reads.

    Attributes:
        operands: what it adds.
        path: the nodes from the norm's input to the addition.
        outside: those of ``path`` that other nodes read too.
    """

    operands: tuple[fx.Node, fx.Node]
    path: tuple[fx.Node, ...]
    outside: list[fx.Node]


def _addition(norm: Norm, order: Order) -> _Addition | None:
    path = row_path(norm.x)
    node = path[-1]
    operands = find_add(node, order)
    if operands is None or not all(same_form(operand, node) for operand in operands):
        return None
    if not order.may_move([*operands, *path], node, norm.node):
        return None
    inside = {*path, *norm.nodes}
    outside = [n for n in path if not set(n.users) <= inside]
    users = {user for n in outside for user in n.users} - inside
    if not all(order.precedes([norm.node], user) for user in users):
        return None
    return _Addition(operands, tuple(path), outside)
