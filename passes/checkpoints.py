"""Inline ``torch.utils.checkpoint`` regions.

checkpoint(body, *x)  ->  body(*x)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def inline_checkpoints(gm: fx.GraphModule) -> int:
    """Replace ``torch.utils.checkpoint`` regions by their bodies, in place; returns their number.

    Only where no gradients are computed: checkpointing saves nothing there.
    """
    count = 0
    pending = True
    while pending:  # bodies may hold further ones
        pending = False
        for node in list(gm.graph.nodes):
            if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
                continue
            body = gm.get_submodule(node.args[0].target)
            if not isinstance(body, fx.GraphModule):
                continue
            inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
            if len(inputs) != len(node.args) - 1:
                continue
            mapping: dict[fx.Node, Any] = dict(zip(inputs, node.args[1:], strict=True))
            for inner in body.graph.nodes:
                if inner.op == "get_attr":
                    name = f"{node.args[0].target}_{inner.target}".replace(".", "_")
                    gm.register_module(name, body.get_submodule(inner.target))
                    with gm.graph.inserting_before(node):
                        mapping[inner] = gm.graph.get_attr(name)
                    mapping[inner].meta.update(inner.meta)
            with gm.graph.inserting_before(node):
                outputs: Any = gm.graph.graph_copy(body.graph, mapping)
            for user in list(node.users):
                user.replace_all_uses_with(outputs[user.args[1]])
                gm.graph.erase_node(user)
            region = node.args[0]
            gm.graph.erase_node(node)
            if not region.users:
                gm.graph.erase_node(region)
            count += 1
            pending = True
    return count
