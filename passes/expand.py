"""Spell out, as ``aten.linear`` and views, the linear layers that come in another form.

    addmm(b, x, W, beta=β, alpha=α)  ->  β·b + α·mm(x, W)
    conv(x, W [N, K, 1, 1], b)       ->  linear(x as [..., K], W [N, K], b), channels moved back
    einsum("bthk,hkd->btd", x, W)    ->  linear(x as [b, t, h·k], W as [d, h·k])
    einsum("ebk,ekn->ebn", x, W)     ->  bmm(x, W), one matrix per e
    tensordot(x, W, dims)            ->  the einsum that it is
    attention(x, …)                  ->  see :mod:`~ss1_compile.passes.attention`

Whatever does not fit stays as it is, for :mod:`~ss1_compile.passes.sites` to give a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ss1_compile.passes.attention import (
    ATTENTION_OPERATORS,
    Wanted,
    replace_outputs,
    spell_out_attention,
)
from ss1_compile.passes.einsum import EinsumLinear, read_einsum, tensordot_equation
from ss1_compile.passes.frozen import example, frozen_value

_aten = torch.ops.aten


def expand_linears(graph: fx.Graph, frozen: Iterable[fx.Node], wanted: Wanted) -> int:
    """Spell out the layers of ``graph``, in place, that ``wanted`` accepts; returns their number.

    Args:
        graph: torch or ATen operators, with example values in ``node.meta``.
        frozen: the nodes of the parameters.
        wanted: other layers keep their form, as the new one may be slower.
    """
    roots = frozenset(frozen)
    count = 0
    for node in list(graph.nodes):
        expand = _EXPANSIONS.get(node.target) if node.op == "call_function" else None
        if node.op == "call_method" and node.target == "addmm":
            expand = _addmm
        if expand is None:
            continue
        with graph.inserting_before(node):
            out = expand(node, _Emit(graph, node), roots, wanted)
        if isinstance(out, fx.Node):
            node.replace_all_uses_with(out)
            graph.erase_node(node)
            out.name = node.name  # signatures refer to outputs by name
        elif out is not None:
            replace_outputs(node, out)
        count += out is not None
    return count


class _Emit:
    """Adds nodes in place of ``node``, with their example values."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph = graph
        self.key = "val" if "val" in node.meta else "example_value"
        self.meta = {k: v for k, v in node.meta.items() if k not in ("val", "example_value")}

    def __call__(self, target: torch._ops.OpOverload, *args: Any) -> fx.Node:
        made = self.graph.call_function(target, args)
        made.meta.update(self.meta)
        with torch.no_grad():
            made.meta[self.key] = target(*fx.map_arg(args, example))
        return made


def _wanted_root(weight: object, roots: frozenset[fx.Node], wanted: Wanted, n: int, k: int) -> bool:
    value = frozen_value(weight, roots)
    return value is not None and wanted(value.root, n, k)


# --- addmm --------------------------------------------------------------------------------------


def _addmm(node: fx.Node, emit: _Emit, roots: frozenset[fx.Node], wanted: Wanted) -> fx.Node | None:
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if len(node.args) != 3 or (alpha == 1 and beta == 1) or beta == 0:
        return None  # with beta = 0 a bias that is not finite is ignored
    bias, x, weight = node.args
    value = example(weight)
    if not isinstance(value, Tensor) or value.dim() != 2:
        return None
    if not _wanted_root(weight, roots, wanted, value.shape[1], value.shape[0]):
        return None
    y = emit(_aten.mul.Tensor, emit(_aten.mm.default, x, weight), alpha)
    y = emit(_aten.add.Tensor, y, emit(_aten.mul.Tensor, bias, beta))
    dtype = example(node).dtype  # under autocast addmm casts the bias, too, and add does not
    return y if example(y).dtype == dtype else emit(_aten.to.dtype, y, dtype)


# --- 1×1 convolutions ---------------------------------------------------------------------------


def _convolution(
    node: fx.Node, emit: _Emit, roots: frozenset[fx.Node], wanted: Wanted
) -> fx.Node | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if node.target is _aten.convolution.default:
        transposed, groups = node.args[6], node.args[8]
    else:
        transposed, groups = False, node.args[6] if len(node.args) > 6 else given.get("groups", 1)
    x, weight = example(given["input"]), example(given["weight"])
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return None
    spatial = weight.dim() - 2
    stride: Any
    padding: Any
    stride, padding = given.get("stride", 1), given.get("padding", 0)
    strides = [stride] * spatial if isinstance(stride, int) else list(stride) * spatial
    padded = padding != "valid" and any(pad for pad in _sequence(padding)) and padding != "same"
    if transposed or groups != 1 or padded or any(size != 1 for size in weight.shape[2:]):
        return None
    n, k = weight.shape[:2]
    if not _wanted_root(given["weight"], roots, wanted, n, k):
        return None
    channels = x.dim() - spatial - 1
    rows = given["input"]
    for axis in range(spatial):
        if strides[axis] != 1:
            rows = emit(_aten.slice.Tensor, rows, channels + 1 + axis, 0, 2**63 - 1, strides[axis])
    rows = emit(_aten.movedim.int, rows, channels, -1)
    matrix = emit(_aten.reshape.default, given["weight"], [int(n), int(k)])
    y = emit(_aten.linear.default, rows, matrix, given.get("bias"))
    # What follows may view the output as the convolution laid it out.
    return emit(_aten.contiguous.default, emit(_aten.movedim.int, y, -1, channels))


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


# --- einsum -------------------------------------------------------------------------------------


def _einsum(
    node: fx.Node, emit: _Emit, roots: frozenset[fx.Node], wanted: Wanted
) -> fx.Node | None:
    equation = node.args[0]
    operands: list[Any] = list(node.args[1:])
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    return _contract(equation, operands, emit, roots, wanted)


def _tensordot(
    node: fx.Node, emit: _Emit, roots: frozenset[fx.Node], wanted: Wanted
) -> fx.Node | None:
    left, right = node.args[:2]
    values = example(left), example(right)
    if not all(isinstance(value, Tensor) for value in values):
        return None
    if node.target is _aten.tensordot.default:
        dims: Any = tuple(node.args[2:4])
    else:
        dims = node.args[2] if len(node.args) > 2 else node.kwargs.get("dims", 2)
    equation = tensordot_equation(dims, *(value.dim() for value in values))
    if equation is None:
        return None
    return _contract(equation, [left, right], emit, roots, wanted)


def _contract(
    equation: str, operands: list[Any], emit: _Emit, roots: frozenset[fx.Node], wanted: Wanted
) -> fx.Node | None:
    x_at = 1 if frozen_value(operands[1], roots) is None else 0
    x, weight = operands[x_at], operands[1 - x_at]
    values = example(x), example(weight)
    if not all(isinstance(value, Tensor) for value in values):
        return None
    read = read_einsum(equation, x_at, *(value.dim() for value in values))
    if read is None:
        return None
    shape = values[1].shape
    size = {index: int(shape[axis]) for axis, index in enumerate(read.weight)}
    n, k = (math.prod(size[i] for i in group) for group in (read.kept, read.summed))
    if not _wanted_root(weight, roots, wanted, n, k):
        return None
    if read.batch:
        return _grouped_einsum(emit, read, x, weight, size)
    x = _permute(emit, x, read.x, read.rows + read.summed)
    if len(read.summed) > 1:
        x = emit(_aten.flatten.using_ints, x, len(read.rows), -1)
    matrix = _permute(emit, weight, read.weight, read.kept + read.summed)
    if len(read.weight) > 2:
        matrix = emit(_aten.reshape.default, matrix, [n, k])
    y = emit(_aten.linear.default, x, matrix)
    return _finished(emit, y, read.rows, read, size)


def _grouped_einsum(
    emit: _Emit, read: EinsumLinear, x: fx.Node, weight: fx.Node, size: dict[str, int]
) -> fx.Node | None:
    """``bmm`` of ``x [E, M, K]`` and ``W [E, K, N]``, one matrix per value of the batch index."""
    sizes = [example(x).shape[read.x.index(i)] for i in read.rows]
    if len(read.batch) > 1 or not (len(sizes) == 1 or all(isinstance(s, int) for s in sizes)):
        return None  # reshaping would need sizes that are symbolic
    x = _permute(emit, x, read.x, read.batch + read.rows + read.summed)
    if len(read.summed) > 1:
        x = emit(_aten.flatten.using_ints, x, -len(read.summed), -1)
    matrix = _permute(emit, weight, read.weight, read.batch + read.summed + read.kept)
    if len(read.weight) > 3:
        groups, n, k = (
            math.prod(size[i] for i in part) for part in (read.batch, read.kept, read.summed)
        )
        matrix = emit(_aten.reshape.default, matrix, [groups, k, n])
    if len(sizes) != 1:
        shape = example(x).shape
        x = emit(_aten.reshape.default, x, [int(shape[0]), -1, int(shape[-1])])
    y = emit(_aten.bmm.default, x, matrix)
    if len(sizes) != 1:
        y = emit(_aten.reshape.default, y, [size[read.batch], *sizes, int(example(y).shape[-1])])
    return _finished(emit, y, read.batch + read.rows, read, size)


def _finished(
    emit: _Emit, y: fx.Node, rows: str, read: EinsumLinear, size: dict[str, int]
) -> fx.Node:
    """The einsum's output from ``y [rows …, N]``."""
    if len(read.kept) > 1:
        y = emit(_aten.unflatten.int, y, -1, [size[i] for i in read.kept])
    if rows + read.kept != read.out:
        y = emit(_aten.contiguous.default, _permute(emit, y, rows + read.kept, read.out))
    return y


def _permute(emit: _Emit, node: fx.Node, old: Sequence[str], new: Sequence[str]) -> fx.Node:
    order = [old.index(i) for i in new]
    return node if order == sorted(order) else emit(_aten.permute.default, node, order)


def _attention(
    node: fx.Node, emit: _Emit, roots: frozenset[fx.Node], wanted: Wanted
) -> list[Any] | None:
    return spell_out_attention(node, roots, wanted, emit.key)


_EXPANSIONS: dict[Any, Callable[..., fx.Node | list[Any] | None]] = {
    **dict.fromkeys(ATTENTION_OPERATORS, _attention),
    torch.addmm: _addmm,
    _aten.addmm.default: _addmm,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    _aten.conv1d.default: _convolution,
    _aten.conv2d.default: _convolution,
    _aten.conv3d.default: _convolution,
    _aten.convolution.default: _convolution,
    torch.einsum: _einsum,
    torch.functional.einsum: _einsum,
    _aten.einsum.default: _einsum,
    torch.tensordot: _tensordot,
    _aten.tensordot.default: _tensordot,
}
