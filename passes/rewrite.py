"""Rewrite linear layers to the SS1 operator.

    F.linear(x, W, b)            ->  ss1::linear(x, sketch, z, b)
                                     or ss1::linear_quantized(x, sketch, z, scale, b, dynamic)
    bmm(x, W)                    ->  ss1::batched_linear(x, sketch, z)
    grouped_mm(x, W, offsets)    ->  ss1::grouped_linear(x, sketch, z, offsets)

``sketch`` and ``z`` become graph inputs: whoever calls the compiled graph supplies them, so that
weights that change later are not baked in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import ss1_compile.kernels.experts  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.passes.frozen import example
from ss1_compile.passes.sites import Site


@dataclass(frozen=True)
class WeightSource:
    """Where a rewritten site gets its tensors: example values, real or fake.

    Attributes:
        sketch: int32 ``[J, G, c]``.
        z: ``[N, K_c]``, or ``[E, N, K_c]`` of a matrix per group.
        bias: the corrected bias ``[N]``, or ``None`` to keep the node's own bias operand.
        scale: float32 ``[N, groups]`` of a quantised z, else ``None``.
        dynamic: whether activations are quantised with it.
    """

    sketch: Tensor
    z: Tensor
    bias: Tensor | None
    scale: Tensor | None = None
    dynamic: bool = False


@dataclass(frozen=True)
class Rewrite:
    """What became of one site: the new inputs, as placeholder nodes."""

    site: Site
    sketch: fx.Node
    z: fx.Node
    bias: fx.Node | None
    output: fx.Node
    """The node that took the place of ``site.node``."""


MakeInput = Callable[[fx.Graph, str, Tensor], fx.Node]


def rewrite_sites(
    graph: fx.Graph, sources: dict[Site, WeightSource], make_input: MakeInput
) -> list[Rewrite]:
    """Replace every site in ``sources`` and erase what it leaves unused.

    Args:
        graph: rewritten in place; linted.
        sources: the tensors of each site.
        make_input: creates a graph input (placeholder) of a given name and example value. Equal
            tensors (the sketch of several sites, say) are created once.
    """
    inputs: dict[int, fx.Node] = {}

    def graph_input(name: str, value: Tensor) -> fx.Node:
        if id(value) not in inputs:
            inputs[id(value)] = make_input(graph, f"{name}_{len(inputs)}", value)
        return inputs[id(value)]

    rewrites = []
    replaced: dict[fx.Node, fx.Node] = {}
    for site, source in sources.items():
        stem = str(site.weight.root.name)
        sketch = graph_input("ss1_sketch", source.sketch)
        z = graph_input(f"{stem}_z", source.z)
        bias = None if source.bias is None else graph_input(f"{stem}_bias", source.bias)
        scale = None if source.scale is None else graph_input(f"{stem}_scale", source.scale)
        quantized = None if scale is None else (scale, source.dynamic)
        replaced[site.node] = _replace(graph, site, sketch, z, bias, quantized, replaced)
        rewrites.append(Rewrite(site, sketch, z, bias, replaced[site.node]))
    for site in sources:
        bias_path = site.bias.path if site.bias else ()
        for node in reversed((*bias_path, *site.weight.path, *site.operands.repeats)):
            if not node.users and not node._erased:
                graph.erase_node(node)
    graph.lint()
    return rewrites


def _replace(
    graph: fx.Graph,
    site: Site,
    sketch: fx.Node,
    z: fx.Node,
    new_bias: fx.Node | None,
    quantized: tuple[fx.Node, bool] | None,
    replaced: dict[fx.Node, fx.Node],
) -> fx.Node:
    """Replace one site; ``replaced`` maps the sites before it, whose outputs it may read.

    ``quantized`` holds the scale of a quantised z and whether activations are quantised too.
    """
    node, operands = site.node, site.operands

    def call(target: torch._ops.OpOverload, *arguments: fx.Node | int | None) -> fx.Node:
        made = graph.call_function(target, arguments)
        made.meta.update(node.meta)
        if "val" in node.meta:  # an exported graph, which nothing will trace again
            made.meta["val"] = target(*fx.map_arg(arguments, example))
        return made

    with graph.inserting_before(node), torch.no_grad():
        x = replaced.get(operands.x, operands.x)
        bias = new_bias
        added: fx.Node | None = None
        if operands.bias is not None and new_bias is None:
            value = example(operands.bias)
            bias = replaced.get(operands.bias, operands.bias)  # may be another site's output
            alone = isinstance(value, Tensor) and tuple(value.shape) == site.shape[:1]
            if operands.per_group or not alone:
                bias, added = None, bias  # addmm broadcasts it
        if operands.x_is_right:
            x = call(torch.ops.aten.transpose.int, x, -2, -1)
        if operands.offsets is not None:
            offsets = replaced.get(operands.offsets, operands.offsets)
            out = call(torch.ops.ss1.grouped_linear.default, x, sketch, z, offsets)
        elif operands.per_group:
            out = call(torch.ops.ss1.batched_linear.default, x, sketch, z)
        elif quantized is not None:
            scale, dynamic = quantized
            target = torch.ops.ss1.linear_quantized.default
            out = call(target, x, sketch, z, scale, bias, dynamic)
        else:
            out = call(torch.ops.ss1.linear.default, x, sketch, z, bias)
        if operands.x_is_right:
            out = call(torch.ops.aten.transpose.int, out, -2, -1)
        if added is not None:
            out = call(torch.ops.aten.add.Tensor, out, added)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return out
