"""The order of a graph's nodes, and what is written in place between them.

Dynamo's graphs are not functional, and a fusion moves reads: :class:`Order` answers whether a
tensor is written between two nodes, and whoever moves a read asks it first. Memory is compared by
the storages of the example values, which views share.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ss1_compile.passes.frozen import example
from ss1_compile.passes.matching import argument, is_idle_dropout

_aten = torch.ops.aten
_INPLACE: frozenset[Any] = frozenset(
    {
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.itruediv,
        operator.ifloordiv,
        operator.imod,
        operator.ipow,
        operator.iand,
        operator.ior,
        operator.ixor,
        operator.imatmul,
        operator.ilshift,
        operator.irshift,
        operator.setitem,
    }
)


def written(node: fx.Node) -> list[fx.Node]:
    """The operands that the node may write in place."""
    inputs = list(node.all_input_nodes)
    target = node.target
    if node.op in ("placeholder", "get_attr", "output") or is_idle_dropout(node):
        return []
    if node.op == "call_method":
        name = str(target)
        dunder = name.startswith("__")
        in_place = name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
        return inputs[:1] if in_place or (name.endswith("_") and not dunder) else []
    if node.op != "call_function" or isinstance(target, torch._ops.HigherOrderOperator):
        return inputs
    if isinstance(target, torch._ops.OpOverload):
        return inputs if target._schema.is_mutable else []
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
        return inputs if any(overload._schema.is_mutable for overload in overloads) else []
    if target in _INPLACE:
        return inputs[:1]
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__name__", "")
    if module.partition(".")[0] not in ("torch", "_operator", "builtins", "math", ""):
        return inputs
    out = node.kwargs.get("out")
    if out is not None:
        return [out] if isinstance(out, fx.Node) else inputs
    if (name.endswith("_") and not name.endswith("__")) or _asks_in_place(node):
        return inputs[:1]
    return []


def _asks_in_place(node: fx.Node) -> bool:
    """Whether a function such as ``F.relu`` is called with ``inplace=True``."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if not any(argument is True for argument in node.args[1:]) or not inspect.isfunction(
        node.target
    ):
        return False
    names = list(inspect.signature(node.target).parameters)
    return "inplace" in names and argument(node, names.index("inplace"), "inplace") is True


class Order:
    """The order of a graph's nodes, and the writes in place between them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self._writes: dict[int, list[int]] = {}
        self._unknown: list[int] = []
        self._sharing: dict[int, list[fx.Node]] = {}
        self._kept: list[Tensor] = []  # a storage's address may be used again once it is freed
        self._sizes: dict[Any, fx.Node] = {}
        for i, node in enumerate(graph.nodes):
            for key in self._storages(node):
                self._sharing.setdefault(key, []).append(node)
            for operand in written(node):
                keys = self._storages(operand)
                for key in keys:
                    self._writes.setdefault(key, []).append(i)
                if not keys and example(operand) is None:
                    self._unknown.append(i)
            if node.op == "placeholder" and isinstance(example(node), torch.SymInt):
                self._sizes.setdefault(example(node).node.expr, node)

    def _storages(self, node: fx.Node) -> list[int]:
        value = example(node)
        tensors = [value] if isinstance(value, Tensor) else value
        if not isinstance(tensors, tuple | list):
            return []
        keys = []
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._kept.append(tensor)
                keys.append(tensor.untyped_storage()._cdata)
        return keys

    def place(self, node: fx.Node, like: fx.Node) -> None:
        """Give a new node the place of an old one."""
        self.index[node] = self.index[like]

    def precedes(self, nodes: Iterable[fx.Node | None], node: fx.Node) -> bool:
        """Whether all ``nodes`` (``None`` entries skipped) come before ``node``."""
        return all(self.index[n] < self.index[node] for n in nodes if n is not None)

    def may_move(self, nodes: Iterable[fx.Node | None], start: fx.Node, end: fx.Node) -> bool:
        """Whether ``nodes`` hold the same values at ``start`` as at ``end``."""
        first, last = sorted((self.index[start], self.index[end]))
        if any(first < i < last for i in self._unknown):
            return False
        return not any(
            first < i < last
            for node in nodes
            if node is not None
            for key in self._storages(node)
            for i in self._writes.get(key, ())
        )

    def dies_at(self, value: fx.Node, node: fx.Node) -> bool:
        """Whether nothing after ``node`` reads the memory of ``value`` but through ``node``.

        ``node`` may then leave ``value`` unwritten and return a new tensor.
        """
        last = self.index[node]
        for key in self._storages(value):
            for other in self._sharing.get(key, ()):
                if other.op in ("placeholder", "get_attr"):
                    return False
                if self.index[other] < last and any(self.index[u] > last for u in other.users):
                    return False
        return True

    def leading_sizes(self, like: fx.Node, sources: Iterable[fx.Node | None]) -> list[Any] | None:
        """How to spell all but the last size of ``like`` without reading ``like``.

        Numbers; symbolic sizes as the graph input that holds them, or as ``(node, dimension)`` of
        one of ``sources``; one may be -1. ``None`` if that is not enough.
        """
        shape = example(like).shape[:-1]
        if all(isinstance(size, int) for size in shape):
            return list(shape)
        known: dict[Any, Any] = dict(self._sizes)
        for source in sources:
            for i, size in enumerate(example(source).shape if source is not None else ()):
                if isinstance(size, torch.SymInt):
                    known.setdefault(size.node.expr, (source, i))
        spelt = [known.get(s.node.expr) if isinstance(s, torch.SymInt) else s for s in shape]
        return None if spelt.count(None) > 1 else [-1 if size is None else size for size in spelt]


_ADDS = (operator.add, torch.add, "add", _aten.add.Tensor)
_ADDS_IN_PLACE = (operator.iadd, "add_", _aten.add_.Tensor)


def find_add(node: fx.Node, order: Order) -> tuple[fx.Node, fx.Node] | None:
    """The tensors that ``node`` adds, or ``None``.

    An addition in place counts where nothing else reads what it overwrites.
    """
    in_place = node.target in _ADDS_IN_PLACE
    if not in_place and node.target not in _ADDS:
        return None
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1 or set(node.kwargs) - {"alpha"}:
        return None
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    if in_place and not order.dies_at(a, node):
        return None
    return a, b
