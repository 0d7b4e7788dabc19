"""How linear layers are spelt: a table from each target to a *normaliser*.

A normaliser returns the operands in ``F.linear``'s order, or the reason why the node is no linear
layer that can be rewritten. Nothing is passed over in silence.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ss1_compile.passes.frozen import FrozenValue, example, frozen_value


@dataclass(frozen=True)
class Operands:
    """The operands of ``y = x Wᵀ + b``, as nodes.

    Attributes:
        x: the input, ``[..., K]``; ``[..., K, M]`` if ``x_is_right``.
        weight: the weight operand; 3-D if ``per_group``.
        bias: the bias operand or ``None``.
        weight_is_kn: the weight is stored ``[K, N]`` and not ``[N, K]``.
        x_is_right: the node computes ``W x`` and not ``x Wᵀ``.
        repeats: the nodes between the weight and the operator that repeat it over a batch.
        per_group: there is a matrix per group (expert): ``W [E, N, K]``, and ``x`` is
            ``[E, M, K]``, or ``[S, K]`` with ``offsets``.
        offsets: ``[E]``, where the rows of each group end.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    weight_is_kn: bool = False
    x_is_right: bool = False
    repeats: tuple[fx.Node, ...] = ()
    per_group: bool = False
    offsets: fx.Node | None = None


Normaliser = Callable[[fx.Node, frozenset[fx.Node]], Operands | str | None]
"""Returns operands, a reason, or ``None`` for a node that has nothing to do with weights."""


def _argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return default


def _linear(node: fx.Node, roots: frozenset[fx.Node]) -> Operands | str | None:
    x, weight = _argument(node, 0, "input"), _argument(node, 1, "weight")
    if frozen_value(weight, roots) is None:
        return "the weight is computed in the graph or trained, it is no frozen parameter"
    return Operands(x, weight, _argument(node, 2, "bias"))


def _matmul(node: fx.Node, roots: frozenset[fx.Node]) -> Operands | str | None:
    left = _argument(node, 0, "input", "self")
    right = _argument(node, 1, "other", "mat2", "vec", "tensor2")
    left_frozen = frozen_value(left, roots) is not None
    right_frozen = frozen_value(right, roots) is not None
    if left_frozen and right_frozen:
        return "both operands are frozen: a constant, not a layer"
    if right_frozen:
        return Operands(left, right, weight_is_kn=True)
    if left_frozen:
        x = example(right)
        return Operands(right, left, x_is_right=not isinstance(x, Tensor) or x.dim() > 1)
    return None  # a product of activations, such as attention scores


def _addmm(node: fx.Node, roots: frozenset[fx.Node]) -> Operands | str | None:
    bias = _argument(node, 0, "input", "self")
    x, weight = _argument(node, 1, "mat1"), _argument(node, 2, "mat2")
    if frozen_value(weight, roots) is None:
        if frozen_value(x, roots) is None:
            return None
        return "addmm with the weight on the left"
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return "addmm with alpha or beta other than 1"  # if the expansion was not wanted
    return Operands(x, weight, bias, weight_is_kn=True)


def _addmv(node: fx.Node, roots: frozenset[fx.Node]) -> Operands | str | None:
    bias = _argument(node, 0, "input", "self")
    weight, x = _argument(node, 1, "mat"), _argument(node, 2, "vec")
    if frozen_value(weight, roots) is None:
        return None
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return "addmv with alpha or beta other than 1"
    return Operands(x, weight, bias)


def _inner(node: fx.Node, roots: frozenset[fx.Node]) -> Operands | str | None:
    """``inner(x, W) = x Wᵀ``."""
    left, right = _argument(node, 0, "input", "self"), _argument(node, 1, "other")
    if frozen_value(right, roots) is not None and frozen_value(left, roots) is None:
        return Operands(left, right)
    return "inner with the weight on the left" if frozen_operands(node, roots) else None


def _bmm(node: fx.Node, roots: frozenset[fx.Node]) -> Operands | str | None:
    """A matrix per group; or ``bmm(x, W.expand(B, K, N))``, one matrix for all.

    The latter is what a linear on a strided 3-D input decomposes to.
    """
    return _batched(node, roots, _argument(node, 0, "input", "self"), _argument(node, 1, "mat2"))


def _baddbmm(node: fx.Node, roots: frozenset[fx.Node]) -> Operands | str | None:
    bias = _argument(node, 0, "input", "self")
    found = _batched(node, roots, _argument(node, 1, "batch1"), _argument(node, 2, "batch2"))
    if not isinstance(found, Operands):
        return found
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1 or found.x_is_right:
        return "baddbmm with alpha or beta other than 1, or with the weight on the left"
    return replace(found, bias=bias)


def _batched(
    node: fx.Node, roots: frozenset[fx.Node], left: Any, right: Any
) -> Operands | str | None:
    left_frozen, right_frozen = (frozen_value(x, roots) is not None for x in (left, right))
    if left_frozen and right_frozen:
        return "both operands are frozen: a constant, not a layer"
    if right_frozen:
        return Operands(left, right, weight_is_kn=True, per_group=True)
    if left_frozen:
        return Operands(right, left, x_is_right=True, per_group=True)
    repeats: list[fx.Node] = []
    weight = right
    while isinstance(weight, fx.Node) and weight.target in _REPEATING:
        inner, outer = example(weight.args[0]), example(weight)
        if len(weight.users) != 1 or inner.shape[-2:] != outer.shape[-2:]:
            break
        repeats.insert(0, weight)
        weight = weight.all_input_nodes[0]  # the others are symbolic sizes
        if inner.dim() == 2 and frozen_value(weight, roots) is not None:
            return Operands(left, weight, weight_is_kn=True, repeats=tuple(repeats))
    if any(_is_gathered(operand, roots) for operand in (left, right)):
        return "a weight is gathered for every row; use experts_implementation='grouped_mm'"
    return None  # a product of activations, such as attention scores


def _is_gathered(operand: object, roots: frozenset[fx.Node]) -> bool:
    """Whether ``operand`` is ``W[index]``, or a view of it, with an index computed in the graph."""
    while isinstance(operand, fx.Node) and operand.args:
        if len(operand.all_input_nodes) == 2 and frozen_value(operand.args[0], roots) is not None:
            return operand.target in _GATHERING
        operand = operand.args[0] if len(operand.all_input_nodes) == 1 else None
    return False


def _grouped(node: fx.Node, roots: frozenset[fx.Node]) -> Operands | str | None:
    """``grouped_mm(x [S, K], W [E, K, N], offsets)``, of PyTorch or of Transformers."""
    x, weight = (_argument(node, i, *names) for i, names in enumerate(_GROUPED_NAMES))
    offsets, bias = _argument(node, 2, "offs"), _argument(node, 3, "bias")
    if frozen_value(weight, roots) is None:
        return None if frozen_value(x, roots) is None else "grouped_mm with the weight on the left"
    value = example(x)
    if offsets is None or bias is not None or not isinstance(value, Tensor) or value.dim() != 2:
        return "grouped_mm in another form than one matrix of rows, cut by offsets, without bias"
    if node.kwargs.get("out_dtype") not in (None, value.dtype):
        return f"grouped_mm with out_dtype={node.kwargs['out_dtype']}"
    return Operands(x, weight, weight_is_kn=True, per_group=True, offsets=offsets)


def _reason(reason: str) -> Normaliser:
    def refuse(node: fx.Node, roots: frozenset[fx.Node]) -> str | None:
        return reason if frozen_operands(node, roots) else None

    return refuse


def _einsum(node: fx.Node, roots: frozenset[fx.Node]) -> str | None:
    if not frozen_operands(node, roots):
        return None
    return f"einsum {node.args[0]!r} with a weight is no linear layer of explicit indices"


def _convolution(node: fx.Node, roots: frozenset[fx.Node]) -> str | None:
    weight = example(_argument(node, 1, "weight"))
    if not isinstance(weight, Tensor) or any(size != 1 for size in weight.shape[2:]):
        return None  # a real convolution is no linear layer
    return "a 1×1 convolution with groups or padding is not rewritten"


def frozen_operands(node: fx.Node, roots: frozenset[fx.Node]) -> list[FrozenValue]:
    """The operands of at least two dimensions that are frozen, one per parameter."""
    found: dict[fx.Node, FrozenValue] = {}
    for operand in node.all_input_nodes:
        value = frozen_value(operand, roots)
        if value is not None and getattr(example(operand), "ndim", 2) >= 2:
            found.setdefault(value.root, value)
    return list(found.values())


_ATTENTION = _reason(
    "an attention operator holds its projections inside, and its masks, or that they are "
    "small or trained, keep it from being spelt out"
)
_RECURRENT = _reason("a recurrent operator holds its linear layers inside")
HOLD_SEVERAL = (_ATTENTION, _RECURRENT)
"""Normalisers of operators with more than one weight."""
_BILINEAR = _reason("a bilinear form is no linear layer")
_CHAIN = _reason("a chain of matrices is multiplied in an order of its own; write the products out")
_CONTRACTION = _reason("a contraction over other indices than those of a linear layer")
_ENCODED = _reason("the weight is quantised or packed already")
_aten = torch.ops.aten
_GROUPED_NAMES = (("mat_a", "self", "input"), ("mat_b", "mat2", "weight"))
_GATHERING = (operator.getitem, torch.index_select, _aten.index.Tensor, _aten.index_select.default)
_REPEATING = (_aten.expand.default, _aten.view.default, _aten.unsqueeze.default)

_FUNCTIONS: dict[Any, Normaliser] = {
    F.linear: _linear,
    torch._C._nn.linear: _linear,
    _aten.linear.default: _linear,
    torch.mm: _matmul,
    torch.matmul: _matmul,
    torch.mv: _matmul,
    torch.linalg.matmul: _matmul,
    operator.matmul: _matmul,
    _aten.mm.default: _matmul,
    _aten.matmul.default: _matmul,
    _aten.mv.default: _matmul,
    _aten.linalg_matmul.default: _matmul,
    torch.inner: _inner,
    _aten.inner.default: _inner,
    torch.addmm: _addmm,
    _aten.addmm.default: _addmm,
    torch.addmv: _addmv,
    _aten.addmv.default: _addmv,
    torch.bmm: _bmm,
    torch.baddbmm: _baddbmm,
    _aten.bmm.default: _bmm,
    _aten.baddbmm.default: _baddbmm,
    torch.addbmm: _CONTRACTION,
    _aten.addbmm.default: _CONTRACTION,
    torch.tensordot: _CONTRACTION,
    _aten.tensordot.default: _CONTRACTION,
    torch.linalg.vecdot: _CONTRACTION,
    _aten.linalg_vecdot.default: _CONTRACTION,
    torch.chain_matmul: _CHAIN,
    _aten.chain_matmul.default: _CHAIN,
    torch.linalg.multi_dot: _CHAIN,
    _aten.linalg_multi_dot.default: _CHAIN,
    torch.einsum: _einsum,
    torch.functional.einsum: _einsum,
    _aten.einsum.default: _einsum,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    _aten.conv1d.default: _convolution,
    _aten.conv2d.default: _convolution,
    _aten.conv3d.default: _convolution,
    _aten.convolution.default: _convolution,
    torch._grouped_mm: _grouped,
    _aten._grouped_mm.default: _grouped,
    F.multi_head_attention_forward: _ATTENTION,
    torch._transformer_encoder_layer_fwd: _ATTENTION,
    torch._native_multi_head_attention: _ATTENTION,
    _aten._transformer_encoder_layer_fwd.default: _ATTENTION,
    _aten._native_multi_head_attention.default: _ATTENTION,
    _aten.lstm.input: _RECURRENT,
    _aten.gru.input: _RECURRENT,
    _aten.rnn_tanh.input: _RECURRENT,
    _aten.rnn_relu.input: _RECURRENT,
    F.bilinear: _BILINEAR,
    _aten.bilinear.default: _BILINEAR,
    _aten._trilinear.default: _BILINEAR,
}
_ENCODED_NAMES = (
    "_int_mm",
    "_scaled_mm",
    "_scaled_grouped_mm",
    "_weight_int4pack_mm",
    "_weight_int4pack_mm_for_cpu",
    "_weight_int8pack_mm",
)
for _name in _ENCODED_NAMES:  # some are newer than the oldest supported torch
    if hasattr(torch, _name):
        _FUNCTIONS[getattr(torch, _name)] = _ENCODED
    if hasattr(_aten, _name):
        _FUNCTIONS[getattr(_aten, _name).default] = _ENCODED
if hasattr(F, "grouped_mm"):  # newer than the oldest supported torch
    _FUNCTIONS[F.grouped_mm] = _grouped
_METHODS: dict[str, Normaliser] = {
    "mm": _matmul,
    "matmul": _matmul,
    "mv": _matmul,
    "__matmul__": _matmul,
    "inner": _inner,
    "addmm": _addmm,
    "addmv": _addmv,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "addbmm": _CONTRACTION,
}


_CUSTOM = _reason("a custom operator takes it, and what that computes is unknown")


def _custom(target: Any) -> Normaliser | None:
    """For operators that a library registered, such as Transformers' grouped product."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
    elif isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
    else:
        return None
    if namespace in ("aten", "prims", "prim", "ss1"):
        return None
    return _grouped if "grouped_mm" in name else _CUSTOM


def normaliser(node: fx.Node) -> Normaliser | None:
    """The normaliser of the node's target; ``None`` where there is nothing to tell."""
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target) or _custom(node.target)
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return None
