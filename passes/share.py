"""Sketch an input once for all linears that read it with the same sketch.

    linear(x, S, z₁, b₁), …, linear(x, S, z_n, b_n)
        ->  split(matmul(sketch(x, S), [z₁ … z_n], [b₁ … b_n]))

as for q, k and v, for gate and up, or for the keys and values of cross-attention. Sketches held by
several graph inputs (a compressed model has one per layer) count as the same if their values are
equal now; the result lists the inputs that have to stay equal.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ss1_compile.passes.emit import Emit, erase_unused, replace
from ss1_compile.passes.frozen import example
from ss1_compile.passes.matching import Linear, PassResult, linears, row_path
from ss1_compile.passes.order import Order, written

_aten = torch.ops.aten
_ss1 = torch.ops.ss1


def share_sketches(graph: fx.Graph, values: Mapping[fx.Node, Tensor] | None = None) -> PassResult:
    """Merge, in place, the linears of ``graph`` that read the same rows with the same sketch.

    Args:
        graph: holds ``ss1::linear`` nodes with example values.
        values: the present value of inputs that hold a sketch; those missing are equal to none.
    """
    result, order = PassResult("share_sketches"), Order(graph)
    found = linears(graph)
    rank = {linear: i for i, linear in enumerate(found)}
    by_input: dict[fx.Node, list[Linear]] = {}
    for linear in found:
        by_input.setdefault(row_path(linear.x)[-1], []).append(linear)
    for group in by_input.values():
        while len(group) > 1:
            first, *others = group
            members = [first, *(x for x in others if _fits(first, x, order, values or {}))]
            group = [linear for linear in others if linear not in members]
            if len(members) > 1:
                _merge(_runs(members, rank), order)
                result.add("shared", *(member.z for member in members))
                sketches = {member.sketch: None for member in others if member in members}
                result.equal += [(s, first.sketch) for s in sketches if s is not first.sketch]
    return result


def _runs(members: list[Linear], rank: Mapping[Linear, int]) -> list[list[Linear]]:
    """Cut where another linear lies between: one product for all would hold outputs for long."""
    runs = [members[:1]]
    for before, member in itertools.pairwise(members):
        if rank[member] == rank[before] + 1:
            runs[-1].append(member)
        else:
            runs.append([member])
    return runs


def _fits(first: Linear, other: Linear, order: Order, values: Mapping[fx.Node, Tensor]) -> bool:
    """Whether ``other`` can be computed where ``first`` is, with the same sketch."""
    if other.z is not first.z and example(other.z).dtype != example(first.z).dtype:
        return False
    if other.reduced_features != first.reduced_features:
        return False
    operands = [other.sketch, other.z, other.bias]
    read = [*operands, *row_path(other.x)]
    if not order.precedes(operands, first.node) or not order.may_move(read, first.node, other.node):
        return False
    if other.sketch is first.sketch:
        return True
    mine, its = values.get(first.sketch), values.get(other.sketch)
    if mine is None or its is None or mine.is_inference() or its.is_inference():
        return False  # an inference tensor does not tell that it was written
    return mine.dtype == its.dtype and mine.device == its.device and torch.equal(mine, its)


def _merge(runs: list[list[Linear]], order: Order) -> None:
    """One sketch for all linears, one product for each run of them."""
    first = runs[0][0]
    emit = Emit(order, first.node)
    x = emit.flatten(first.x)
    sketched = emit(_ss1.sketch.default, x, first.sketch, first.reduced_features)
    for run in itertools.chain.from_iterable(map(_products, runs)):
        emit = Emit(order, run[0].node)
        z, bias = [member.z for member in run], [member.bias for member in run]
        y = emit(_ss1.matmul.default, sketched, z, bias, None, "none")
        start = 0
        for member in run:
            emit = Emit(order, member.node)
            end = start + member.out_features
            sizes = order.leading_sizes(member.x, [member.x]) or []
            part = y if len(run) == 1 else emit(_aten.slice.Tensor, y, 1, start, end)
            replace(member.node, emit.restore(part, sizes))
            erase_unused([member.node])
            start = end


def _products(run: list[Linear]) -> list[list[Linear]]:
    """The members whose users take a slice of a common product; each of the others by itself.

    A copy of each slice costs more: for q, k and v of 16384 x 1024 as outputs, c = 4, bf16, on one
    NVIDIA H200, 106 µs (52 for the product) where three products take 61.
    """
    together: list[Linear] = []
    alone: list[Linear] = []
    for member in run:
        value = example(member.node)
        n = value.shape[-1]
        wider = value.new_empty(*value.shape[:-1], 2 * n)
        fits = _takes_strides(member.node, wider[..., :n])
        (together if fits else alone).append(member)
    return [part for part in (together, *([member] for member in alone)) if part]


# --- strides ------------------------------------------------------------------------------------

_VIEWS: frozenset[Any] = frozenset(
    (
        *("view", "transpose", "permute", "split", "chunk", "unbind", "unsqueeze", "squeeze"),
        *("expand", "unflatten", "movedim", "narrow", "select", "swapaxes", "__getitem__"),
        *("reshape", "flatten", "t", "mT", "view_as", "tensor_split", "unfold", "detach"),
        *("to", "float", "half", "bfloat16", "double", "type", "type_as"),
        *(torch.transpose, torch.permute, torch.split, torch.chunk, torch.unbind),
        *(torch.unsqueeze, torch.squeeze, torch.unflatten, torch.movedim, torch.narrow),
        *(torch.select, torch.swapaxes, torch.reshape, torch.flatten, torch.tensor_split),
        *(operator.getitem, getattr, F.dropout, torch.dropout),
    )
)
_READING_STRIDES = frozenset(
    ("as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr", torch.as_strided)
)


def _takes_strides(node: fx.Node, value: Any) -> bool:
    """Whether the users of ``node`` do the same for ``value``, of its shape and other strides.

    A ``view`` may not fit other strides, an output may be viewed by whoever gets it, and what an
    operator of another library does with strides is unknown.
    """
    for user in node.users:
        target = user.target
        if target in _READING_STRIDES or written(user) or _is_foreign(user):
            return False
        if target not in _VIEWS and not _is_aten_view(target):
            continue

        def substitute(argument: fx.Node, node: fx.Node = node) -> Any:
            return value if argument is node else example(argument)

        args: Any = fx.map_arg(user.args, substitute)
        kwargs: Any = fx.map_arg(user.kwargs, substitute)
        try:
            with torch.no_grad():
                if user.op == "call_method":
                    viewed = getattr(args[0], str(target))(*args[1:], **kwargs)
                else:
                    viewed = target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError):
            return False
        if not _takes_strides(user, viewed):
            return False
    return True


def _is_foreign(user: fx.Node) -> bool:
    """An output, or an operator that is not PyTorch's own."""
    target = user.target
    if user.op not in ("call_function", "call_method"):
        return True
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in ("aten", "prims", "ss1")
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.partition("::")[0] not in ("aten", "prims", "ss1")
    return isinstance(target, torch._ops.HigherOrderOperator)


def _is_aten_view(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and any(
        result.alias_info is not None for result in target._schema.returns
    )
