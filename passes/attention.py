"""Spell out the attention operators that hold linear layers inside.

    F.multi_head_attention_forward(q, k, v, …)      ->  linear(s), attention, linear
    torch._native_multi_head_attention(x, x, x, …)  ->  the same
    torch._transformer_encoder_layer_fwd(x, …)      ->  attention, norms and a feed-forward

The first is traced through PyTorch's own Python, so whatever its arguments are, the result is what
it computes. The other two are kernels for inference: theirs is written here with the same parts.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ss1_compile.passes.frozen import example, frozen_value

Wanted = Callable[[fx.Node, int, int], bool]


def spell_out_attention(
    node: fx.Node, roots: frozenset[fx.Node], wanted: Wanted, key: str
) -> list[Any] | None:
    """The outputs of ``node`` as nodes of smaller operators, inserted at the insertion point.

    ``None`` if none of its weights is wanted, or if no equivalent is known (masks in the kernels
    for inference, which treat the rows that are all masked in their own way).

    Args:
        node: a call of one of the three.
        roots: the nodes of the parameters.
        wanted: ``(root of a weight, N, K)`` → whether the layer is to be rewritten.
        key: where example values go in ``node.meta``.
    """
    if not any(_is_wanted(operand, roots, wanted) for operand in node.all_input_nodes):
        return None
    function = _FUNCTIONS[node.target]
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    for i, leaf in enumerate(leaves):  # with dynamic=True even the number of heads is symbolic
        if isinstance(value := example(leaf), torch.SymInt | torch.SymFloat):
            leaves[i] = int(value) if isinstance(value, torch.SymInt) else float(value)
    inputs = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
    values = [example(node) for node in inputs]
    if not all(isinstance(value, Tensor) and not value.is_nested for value in values):
        return None

    def call(*tensors: Tensor) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        filled = [given[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return function(*args, **kwargs)

    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    mode: Any = modes[0] if modes else contextlib.nullcontext()
    try:
        with torch.no_grad(), mode:  # tensors that are made on the way are fake too
            traced = make_fx(call, pre_dispatch=True)(*values)
    except _Unknown:
        return None
    return _inline(node, traced.graph, inputs, key)


def _is_wanted(operand: fx.Node, roots: frozenset[fx.Node], wanted: Wanted) -> bool:
    weight, value = example(operand), frozen_value(operand, roots)
    if value is None or not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    return wanted(value.root, int(weight.shape[0]), int(weight.shape[1]))


def _inline(node: fx.Node, body: fx.Graph, inputs: list[fx.Node], key: str) -> list[Any]:
    """Copy ``body`` in front of ``node``; its outputs."""
    meta = {k: v for k, v in node.meta.items() if k not in ("val", "example_value")}
    placeholders = [n for n in body.nodes if n.op == "placeholder"]
    mapping: dict[fx.Node, fx.Node] = dict(zip(placeholders, inputs, strict=True))
    outputs: Any = node.graph.graph_copy(body, mapping)
    for old, new in mapping.items():
        if old.op != "placeholder":
            new.meta = {**meta, key: old.meta.get("val")}
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def replace_outputs(node: fx.Node, outputs: list[Any]) -> None:
    """Let the users of ``node``'s outputs use ``outputs``, and erase it."""
    value = example(node)
    if isinstance(value, Tensor):
        node.replace_all_uses_with(outputs[0])
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise AssertionError(f"{user} takes the tuple {node} as a whole")
        replacement = outputs[user.args[1]]  # type: ignore[index]
        user.replace_all_uses_with(replacement)
        user.graph.erase_node(user)
    node.graph.erase_node(node)


# --- the kernels for inference ------------------------------------------------------------------


class _Unknown(Exception):
    """What the kernel computes is not known to the letter."""


def _native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``aten::_native_multi_head_attention`` of ``[B, L, embed_dim]``."""
    if mask is not None or query is not key or key is not value:
        raise _Unknown
    x = query.transpose(0, 1)
    out, weights = F.multi_head_attention_forward(
        *(x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, None, None, False, 0.0),
        *(proj_weight, proj_bias),
        training=False,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
    )
    return out.transpose(0, 1).contiguous(), weights


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``aten::_transformer_encoder_layer_fwd`` of ``[B, L, embed_dim]``."""

    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: Tensor) -> Tensor:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return _native_attention(x, x, x, embed_dim, num_heads, *weights, mask, False)[0]

    def feed_forward(x: Tensor) -> Tensor:
        h = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(h) if use_gelu else F.relu(h), ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attend(norm1(src))
        return x + feed_forward(norm2(x))
    x = norm1(src + attend(src))
    return norm2(x + feed_forward(x))


_aten = torch.ops.aten
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: F.multi_head_attention_forward,
    torch._native_multi_head_attention: _native_attention,
    _aten._native_multi_head_attention.default: _native_attention,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
    _aten._transformer_encoder_layer_fwd.default: _encoder_layer,
}
ATTENTION_OPERATORS = tuple(_FUNCTIONS)
"""The targets that :func:`spell_out_attention` knows."""
