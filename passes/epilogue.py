"""Fuse what follows an SS1 product into it.

    act(linear(x, S, z, b))             ->  matmul(sketch(x, S), z, b, act)
    linear(x, S, z, b) + residual       ->  matmul(sketch(x, S), z, b, residual)
    act(linear(x, S, z, b)) + residual  ->  matmul(sketch(x, S), z, b, residual, act)
    linear(x, S, z) + b                 ->  matmul(sketch(x, S), z, b)

likewise for an ``ss1::matmul`` of one layer that an earlier pass has made; views, copies and idle
dropouts may lie between. Run it after :func:`~ss1_compile.passes.producers.fuse_activations`: an
activation in front of a sketch belongs to the sketch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ss1_compile.passes.activations import Activation, find_activation
from ss1_compile.passes.emit import Emit, erase_unused, replace
from ss1_compile.passes.frozen import example
from ss1_compile.passes.matching import (
    Linear,
    PassResult,
    as_linear,
    is_matmul,
    only_user,
    row_input,
    same_form,
)
from ss1_compile.passes.order import Order, find_add

_ss1 = torch.ops.ss1


@dataclass
class _Epilogue:
    """What was found behind one product.

    Attributes:
        end: the last node that is fused.
        path: all of them.
        bias: the layer's bias, or a vector that is added.
        residual: what is added behind the activation.
        activation: its name.
    """

    end: fx.Node
    bias: fx.Node | None
    residual: fx.Node | None = None
    activation: str = "none"
    path: list[fx.Node] = field(default_factory=list)
    found: list[str] = field(default_factory=list)


def fuse_epilogues(graph: fx.Graph) -> PassResult:
    """Fuse bias, activation and residual into the products of ``graph``, in place."""
    result, order = PassResult("fuse_epilogues"), Order(graph)
    activations = {}
    for node in graph.nodes:
        activation = find_activation(node, order)
        if activation is not None:
            activations[activation.x] = activation
    for node in list(graph.nodes):
        if node._erased:
            continue
        linear = as_linear(node)
        if linear is not None:
            z, bias = linear.z, linear.bias
        elif is_matmul(node) and len(node.args[1]) == 1 and node.args[3:] == (None, "none"):
            (z,), (bias,) = node.args[1:3]
        else:
            continue
        epilogue = _follow(node, bias, activations, order)
        if not epilogue.found or not order.may_move([z, bias], node, epilogue.end):
            continue
        if _rewrite(node, linear, z, epilogue, order):
            for what in epilogue.found:
                result.add(what, z)
    return result


def _follow(
    node: fx.Node, bias: fx.Node | None, activations: dict[fx.Node, Activation], order: Order
) -> _Epilogue:
    """Walk on from ``node`` for as long as nothing else reads the values."""
    done, current = _Epilogue(node, bias), node
    width = example(node).shape[-1]
    while done.residual is None:
        activation = activations.get(current)
        if activation is not None and set(current.users) <= activation.nodes:
            if done.activation != "none":
                break
            done.activation, current = activation.name, activation.node
            done.path += activation.nodes
            done.found.append(f"{activation.name} behind")
        else:
            user = only_user(current)
            if user is None:
                break
            if row_input(user) is current:
                current = user
                done.path.append(user)
                continue  # a view alone is not worth fusing
            operands = find_add(user, order)
            if operands is None or operands[0] is operands[1]:
                break
            other = operands[1] if operands[0] is current else operands[0]
            if same_form(other, user) and same_form(current, user):
                done.residual = other
                done.found.append("residual")
            elif _is_bias(other, current, user, width) and (done.bias, done.activation) == (
                None,
                "none",
            ):
                done.bias = other
                done.found.append("bias")
            else:
                break
            current = user
            done.path.append(user)
        done.end = current
    return done


def _is_bias(other: fx.Node, current: fx.Node, added: fx.Node, width: int) -> bool:
    value, rows = example(other), example(current)
    return (
        isinstance(value, Tensor)
        and tuple(value.shape) == (width,)
        and value.dtype == rows.dtype
        and same_form(current, added)
    )


def _rewrite(
    node: fx.Node, linear: Linear | None, z: fx.Node, epilogue: _Epilogue, order: Order
) -> bool:
    """Rewrite unless a symbolic size cannot be spelt."""
    end, residual = epilogue.end, epilogue.residual
    sources = [residual, None if linear is None else linear.x]
    sizes = order.leading_sizes(end, sources)
    if sizes is None:
        return False
    if linear is None:
        sketched = node.args[0]
    else:
        emit = Emit(order, node)
        x = emit.flatten(linear.x)
        sketched = emit(_ss1.sketch.default, x, linear.sketch, linear.reduced_features)
    emit = Emit(order, end)
    flat = None if residual is None else emit.flatten(residual)
    y = emit(_ss1.matmul.default, sketched, [z], [epilogue.bias], flat, epilogue.activation)
    replace(end, emit.restore(y, sizes))
    erase_unused([end], replaced=epilogue.path)
    return True
