"""What is between the layers, in the spelling that ONNX Runtime's CPU kernels run fastest.

With the linear layers compressed, the rest of a transformer takes most of the time. The rewrites
use standard operators and keep the result:

* ``LayerNormalization (Add (a, b))`` → ``LayerNormalization (Sum (a, b))``. ONNX Runtime fuses the
  former into ``SkipLayerNormalization``, whose CPU kernel took 3.7 times as long as the two
  (1.31, [128, 384], one thread: 0.37 against 0.10 ms).
* ``Where (IsNaN (P), 0, P) @ V`` with ``P = Softmax (S)``, as PyTorch's attention with a mask is
  exported, → ``Where (IsNaN (P[..., :1]), 0, P @ V)``. Softmax gives a row of NaN or none in it, so
  one column tells, and ``P @ V`` is smaller than P.
* ``Attention`` (opset 23) of ``[batch, heads, tokens, size]`` → of ``[batch, tokens, heads·size]``
  with the heads as attributes, as the layers write and read them: its kernel finds the heads by
  strides. MiniLM, 128 tokens: 24 transpositions and 24 reshapes less, 1.5 ms of 35.8.
* The mask of ``Attention``, if one row of it is for all queries, is repeated for each: the kernel
  refuses it otherwise (1.23 to 1.31, "inconsistent q_sequence_length").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


def tune_for_cpu(model: ir.Model) -> None:
    """Apply the rewrites to the main graph, in place."""
    for node in list(model.graph):
        if node.domain != "":
            continue
        if node.op_type == "LayerNormalization":
            _unfuse_residual(node)
        elif node.op_type == "MatMul":
            _guard_output(model, node)
        elif node.op_type == "Attention":
            _repeat_mask(model, _attend_in_rows(model, node) or node)


def _unfuse_residual(norm: ir.Node) -> None:
    """``Add`` → ``Sum`` before ``norm``; in float32, which ``Sum`` has a CPU kernel for."""
    x = norm.inputs[0]
    add = None if x is None else x.producer()
    if x is None or add is None or (add.domain, add.op_type) != ("", "Add"):
        return
    if x.dtype == ir.DataType.FLOAT:
        add.op_type = "Sum"


def _guard_output(model: ir.Model, product: ir.Node) -> None:
    """Replace NaN rows after the product of attention weights and values, not before."""
    guarded = product.inputs[0]
    where = _producer(guarded, "Where")
    if guarded is None or where is None or len(guarded.uses()) != 1 or guarded.is_graph_output():
        return
    test, zero, weights = where.inputs
    isnan = _producer(test, "IsNaN")
    softmax = _producer(weights, "Softmax")
    if isnan is None or softmax is None or isnan.inputs[0] is not weights:
        return
    constant = None if zero is None else ir.convenience.get_const_tensor(zero)
    rank = None if weights is None or weights.shape is None else len(weights.shape)
    axis = softmax.attributes.get_int("axis", -1)
    if constant is None or constant.size != 1 or constant.numpy().item() != 0 or rank is None:
        return
    if axis not in (-1, rank - 1):
        return
    first = _column(model, weights)
    if weights is not None and weights.type is not None:
        first.outputs[0].type = weights.type
    bad = ir.node("IsNaN", [first.outputs[0]])
    raw = ir.node("MatMul", [weights, product.inputs[1]])
    kept = ir.node("Where", [bad.outputs[0], zero, raw.outputs[0]])
    output, new = product.outputs[0], kept.outputs[0]
    for value in (raw.outputs[0], new):
        value.type, value.shape = output.type, output.shape
    new.name = output.name
    ir.convenience.replace_nodes_and_values(
        model.graph, product, [product], [first, bad, raw, kept], [output], [new]
    )
    for node in (where, isnan):
        if not node.outputs[0].uses():
            model.graph.remove(node, safe=True)


def _repeat_mask(model: ir.Model, attention: ir.Node) -> None:
    """``mask [..., 1, keys]`` → ``[..., queries, keys]``."""
    query, mask = attention.inputs[0], attention.inputs[3] if len(attention.inputs) > 3 else None
    if query is None or query.shape is None or mask is None or mask.shape is None:
        return
    axis, rank = len(query.shape) - 2, len(mask.shape)
    if rank < 2 or mask.shape[-2] != 1 or query.shape[axis] == 1:
        return
    bounds = {"start": axis, "end": axis + 1}
    queries = ir.node("Shape", [query], bounds)
    shape = ir.node("Concat", [queries.outputs[0], _number(model, 1)], {"axis": 0})
    repeated = ir.node("Expand", [mask, shape.outputs[0]])
    repeated.outputs[0].type = mask.type
    repeated.outputs[0].shape = ir.Shape([*mask.shape[:-2], query.shape[axis], mask.shape[-1]])
    model.graph.insert_before(attention, [queries, shape, repeated])
    attention.replace_input_with(3, repeated.outputs[0])


def _attend_in_rows(model: ir.Model, attention: ir.Node) -> ir.Node | None:
    """Let ``attention`` read and write rows of all heads, not transposed copies of each head.

    The new node, or ``None`` if the heads are made or joined in another way.
    """
    heads = [_Heads.of(value) for value in attention.inputs[:3]]
    joined = _joined_heads(attention.outputs[0])
    further = [*attention.inputs[4:], *attention.outputs[1:]]  # a cache has heads, too
    if joined is None or any(value is not None and value.name for value in further):
        return None
    if any(found is None for found in heads):
        return None
    query, key, _ = found = [each for each in heads if each is not None]
    attributes = [a for name, a in attention.attributes.items() if not name.endswith("_num_heads")]
    counts = {"q_num_heads": query.count, "kv_num_heads": key.count}
    attributes += [ir.AttrInt64(name, count) for name, count in counts.items()]
    rows = ir.Node(
        "",
        "Attention",
        [*(each.rows for each in found), *attention.inputs[3:]],
        attributes,
        name=attention.name,
    )
    output, new = joined[-1].outputs[0], rows.outputs[0]
    new.name, new.type, new.shape = output.name, output.type, output.shape
    ir.convenience.replace_nodes_and_values(
        model.graph, attention, [*reversed(joined), attention], [rows], [output], [new]
    )
    for node in [node for each in found for node in (each.transpose, each.reshape)]:
        if node.graph is not None and not node.outputs[0].uses():
            model.graph.remove(node, safe=True)
    return rows


@dataclass(frozen=True, eq=False)
class _Heads:
    """``rows [batch, tokens, heads·size]``, reshaped and transposed to one matrix per head."""

    rows: ir.Value
    reshape: ir.Node
    transpose: ir.Node
    count: int

    @classmethod
    def of(cls, value: ir.Value | None) -> _Heads | None:
        transpose = _swapping(value)
        reshape = None if transpose is None else _producer(transpose.inputs[0], "Reshape")
        if transpose is None or reshape is None:
            return None
        rows, split = reshape.inputs[0], reshape.outputs[0].shape
        if rows is None or rows.shape is None or split is None or len(split) != 4:
            return None
        count, size = split[2], split[3]
        if not isinstance(count, int) or not isinstance(size, int):
            return None
        if not _batch_and_tokens(rows.shape, split) or rows.shape[2] != count * size:
            return None
        return cls(rows, reshape, transpose, count)


def _joined_heads(value: ir.Value) -> tuple[ir.Node, ir.Node] | None:
    """The transposition and the reshape to ``[batch, tokens, heads · size]``, all that reads it."""
    uses = list(value.uses())
    transpose = _swapping(uses[0].node.outputs[0]) if len(uses) == 1 else None
    if transpose is None or transpose.outputs[0].is_graph_output() or value.is_graph_output():
        return None
    uses = list(transpose.outputs[0].uses())
    if len(uses) != 1 or (uses[0].node.domain, uses[0].node.op_type) != ("", "Reshape"):
        return None
    reshape = uses[0].node
    apart, joined = transpose.outputs[0].shape, reshape.outputs[0].shape
    if apart is None or joined is None or not _batch_and_tokens(joined, apart):
        return None
    return transpose, reshape


def _batch_and_tokens(rows: ir.Shape, heads: ir.Shape) -> bool:
    """Whether ``rows`` has three dimensions, of which the first two are those of ``heads``."""
    known = all(isinstance(d, int) or d.value is not None for d in rows[:2])
    return len(rows) == 3 and known and list(rows[:2]) == list(heads[:2])


def _swapping(value: ir.Value | None) -> ir.Node | None:
    """The node that exchanges the second and the third of four dimensions, if one gives it."""
    transpose = _producer(value, "Transpose")
    if transpose is None or transpose.attributes.get_ints("perm", ()) != (0, 2, 1, 3):
        return None
    return transpose


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None


def _column(model: ir.Model, value: ir.Value | None) -> ir.Node:
    """``value[..., :1]``."""
    return ir.node("Slice", [value, *(_number(model, number) for number in (0, 1, -1))])


def _number(model: ir.Model, number: int) -> ir.Value:
    """An initializer ``[number]``, int64."""
    name = f"ss1.number_{number}"
    held = model.graph.initializers.get(name)
    if held is None:
        tensor = ir.tensor(np.array([number], np.int64), name=name)
        held = ir.Value(
            name=name, shape=ir.Shape([1]), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        model.graph.register_initializer(held)
    return held
