"""Add nodes to a graph, put them in place of others, and erase what that leaves unused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from ss1_compile.passes.frozen import example
from ss1_compile.passes.matching import Reader
from ss1_compile.passes.order import Order, written

_aten = torch.ops.aten
_ss1 = torch.ops.ss1


class Emit:
    """Adds nodes before ``anchor``, with its metadata and their own example values."""

    def __init__(self, order: Order, anchor: fx.Node) -> None:
        self.order, self.anchor, self.graph = order, anchor, anchor.graph
        self._key = "val" if "val" in anchor.meta else "example_value"

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        """Call ``target``."""
        with self.graph.inserting_before(self.anchor):
            made = self.graph.call_function(target, args)
        meta = self.anchor.meta.items()
        made.meta.update({k: v for k, v in meta if k not in ("val", "example_value")})
        with torch.no_grad():
            made.meta[self._key] = target(*fx.map_arg(args, example))
        self.order.place(made, self.anchor)
        return made

    def flatten(self, x: fx.Node) -> fx.Node:
        """``x [..., K]`` as ``[M, K]``."""
        return x if example(x).dim() == 2 else self(_aten.flatten.using_ints, x, 0, -2)

    def restore(self, y: fx.Node, sizes: Sequence[Any]) -> fx.Node:
        """``y [M, N]`` as ``[*sizes, N]``; ``sizes`` from :meth:`Order.leading_sizes`."""
        if len(sizes) == 1:
            return y
        named = [self(_aten.sym_size.int, *s) if isinstance(s, tuple) else s for s in sizes]
        return self(_aten.view.default, y, [*named, int(example(y).shape[1])])


def replace(old: fx.Node, new: fx.Node, but: Collection[fx.Node] = ()) -> None:
    """Let ``new`` take the place of ``old`` for all its users except those in ``but``.

    ``new`` takes the old example value too: what views ``old`` shares memory with that, which is
    how writes in place are found.
    """
    key = "val" if "val" in old.meta else "example_value"
    new.meta[key] = old.meta[key]
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and user not in but)


def erase_unused(nodes: Iterable[fx.Node], replaced: Collection[fx.Node] = ()) -> None:
    """Erase those of ``nodes``, and of what only they read, that nothing uses; inputs stay.

    What writes in place stays too, unless it was ``replaced``.
    """
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node._erased or node.users or node.op in ("placeholder", "get_attr", "output"):
            continue
        if written(node) and node not in replaced:
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        pending.extend(inputs)


# --- what sketches ------------------------------------------------------------------------------


def leading_sizes(reader: Reader, order: Order, *sources: fx.Node | None) -> list[Any] | None:
    """The sizes that :func:`feed` needs; ``None`` if one of them cannot be spelt."""
    return [] if reader.linear is None else order.leading_sizes(reader.x, sources)


def feed(emit: Emit, reader: Reader, sketched: fx.Node, sizes: list[Any]) -> None:
    """Let whatever used the reader use ``sketched``; the reader is erased."""
    if reader.linear is None:
        replace(reader.node, sketched)
    else:
        y = emit(
            _ss1.matmul.default, sketched, [reader.linear.z], [reader.linear.bias], None, "none"
        )
        replace(reader.node, emit.restore(y, sizes))
    reader.node.graph.erase_node(reader.node)
