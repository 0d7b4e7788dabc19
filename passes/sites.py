"""Find the linear layers of a graph: ``y = x Wᵀ + b`` with a frozen ``W``, however it is spelt.

A table maps each target to a normaliser, which returns the operands in ``F.linear``'s order or the
reason why the node is no linear layer that can be rewritten. Nothing is passed over in silence.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
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


@dataclass(frozen=True)
class Site:
    """A linear layer that can be rewritten.

    Attributes:
        node: the node that computes it.
        operands: its operands.
        weight: the weight operand as a function of a frozen input; 2-D, or 3-D if per group.
        bias: the bias likewise, or ``None`` if there is none or it is computed in the graph.
        shape: ``(N, K)``.
    """

    node: fx.Node
    operands: Operands
    weight: FrozenValue
    bias: FrozenValue | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class Skipped:
    """A node with a frozen operand that multiplies like a linear layer but is left alone."""

    node: fx.Node
    weight: FrozenValue | None
    reason: str


Normaliser = Callable[[fx.Node, frozenset[fx.Node]], Operands | str | None]
"""Returns operands, a reason, or ``None`` for a node that has nothing to do with weights."""


def find_sites(graph: fx.Graph, frozen: Iterable[fx.Node]) -> tuple[list[Site], list[Skipped]]:
    """All linear layers of ``graph`` whose weight is a view or cast of one of ``frozen``.

    A weight with any other use (an embedding it is tied to, an in-place update) is left alone:
    both uses must see the same values.
    """
    roots = frozenset(frozen)
    sites: list[Site] = []
    skipped: list[Skipped] = []
    for node in graph.nodes:
        normalise = _normaliser(node)
        found = normalise(node, roots) if normalise else None
        if isinstance(found, str):
            weights: list[FrozenValue | None] = [*_frozen_operands(node, roots)]
            count = None if normalise in (_ATTENTION, _RECURRENT) else 1  # these hold several
            skipped.extend(Skipped(node, weight, found) for weight in weights[:count] or [None])
        elif isinstance(found, Operands):
            site = _site(node, found, roots)
            if isinstance(site, Site):
                sites.append(site)
            else:
                skipped.append(Skipped(node, frozen_value(found.weight, roots), site))
    return _without_shared(sites, skipped)


def _site(node: fx.Node, operands: Operands, roots: frozenset[fx.Node]) -> Site | str:
    weight = frozen_value(operands.weight, roots)
    assert weight is not None
    value, x = example(weight.node), example(operands.x)
    if not isinstance(value, Tensor) or not isinstance(x, Tensor):
        return "the graph carries no shapes"
    dims = 3 if operands.per_group else 2
    if value.dim() != dims:
        return f"the weight has {value.dim()} dimensions, not {dims}"
    if not value.is_floating_point() or value.layout != torch.strided:
        return f"the weight is {value.dtype}, {value.layout}"
    n, k = reversed(value.shape[-2:]) if operands.weight_is_kn else value.shape[-2:]
    bias = frozen_value(operands.bias, roots) if operands.bias is not None else None
    if bias is not None and (operands.per_group or tuple(example(bias.node).shape) != (n,)):
        bias = None
    return Site(node, operands, weight, bias, (int(n), int(k)))


def _without_shared(sites: list[Site], skipped: list[Skipped]) -> tuple[list[Site], list[Skipped]]:
    """Move the sites whose weight has other users to ``skipped``."""
    consumers = {((*site.operands.repeats, site.node)[0], site.weight.node) for site in sites}
    kept: list[Site] = []
    for site in sites:
        other = _other_user(site.weight.root, consumers)
        if other is None:
            kept.append(site)
        else:
            reason = f"the weight is also used by {_describe(other)}"
            skipped.append(Skipped(site.node, site.weight, reason))
    order = {node: i for i, node in enumerate(sites[0].node.graph.nodes)} if sites else {}
    skipped.sort(key=lambda entry: order.get(entry.node, 0))
    return kept, skipped


def _other_user(node: fx.Node, consumers: set[tuple[fx.Node, fx.Node]]) -> fx.Node | None:
    for user in node.users:
        if (user, node) in consumers:
            continue
        if frozen_value(user, frozenset({node})) is None:
            return user
        other = _other_user(user, consumers)
        if other is not None:
            return other
    return None


def _describe(node: fx.Node) -> str:
    if node.op == "output":
        return "the graph's output"
    return getattr(node.target, "__name__", str(node.target))


# --- normalisers --------------------------------------------------------------------------------


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
        return reason if _frozen_operands(node, roots) else None

    return refuse


def _einsum(node: fx.Node, roots: frozenset[fx.Node]) -> str | None:
    if not _frozen_operands(node, roots):
        return None
    return f"einsum {node.args[0]!r} with a weight is no linear layer of explicit indices"


def _convolution(node: fx.Node, roots: frozenset[fx.Node]) -> str | None:
    weight = example(_argument(node, 1, "weight"))
    if not isinstance(weight, Tensor) or any(size != 1 for size in weight.shape[2:]):
        return None  # a real convolution is no linear layer
    return "a 1×1 convolution with groups or padding is not rewritten"


def _frozen_operands(node: fx.Node, roots: frozenset[fx.Node]) -> list[FrozenValue]:
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
_BILINEAR = _reason("a bilinear form is no linear layer")
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
    operator.matmul: _matmul,
    _aten.mm.default: _matmul,
    _aten.matmul.default: _matmul,
    _aten.mv.default: _matmul,
    torch.addmm: _addmm,
    _aten.addmm.default: _addmm,
    torch.bmm: _bmm,
    torch.baddbmm: _baddbmm,
    _aten.bmm.default: _bmm,
    _aten.baddbmm.default: _baddbmm,
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
if hasattr(F, "grouped_mm"):  # newer than the oldest supported torch
    _FUNCTIONS[F.grouped_mm] = _grouped
_METHODS: dict[str, Normaliser] = {
    "mm": _matmul,
    "matmul": _matmul,
    "mv": _matmul,
    "__matmul__": _matmul,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
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


def _normaliser(node: fx.Node) -> Normaliser | None:
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target) or _custom(node.target)
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return None
