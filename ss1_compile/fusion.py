"""Fusion around the sketch, as the backend runs it: when, what the report says, and its guard.

A compressed model holds one sketch per layer. Layers that read the same input share one where the
values are equal at compile time; :class:`Fused` checks at run time that they still are.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx

from ss1_compile.errors import SS1Warning
from ss1_compile.passes.frozen import example
from ss1_compile.passes.fuse import fuse, why_not
from ss1_compile.passes.matching import PassResult, linears, values_of
from ss1_compile.passes.trace import PassTrace

log = logging.getLogger(__name__)


@dataclass
class Fused:
    """What fusion did to one graph.

    Attributes:
        counts: how often each kind of fusion was done.
        layers: layer name → what was fused around it, in the order of the graph.
        original: the graph before, where the fused one relies on equal sketches.
        equal: pairs of indices of inputs that must hold equal sketches.
    """

    counts: dict[str, int] = field(default_factory=dict)
    layers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    original: fx.GraphModule | None = None
    equal: tuple[tuple[int, int], ...] = ()

    def guard(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the compiled graph so that it runs only while the sketches are equal.

        Once they are not, the graph as it was before fusion runs instead, uncompiled and with one
        :class:`SS1Warning`: the result is right and the model should be compiled again.
        """
        if self.original is None:
            return compiled
        original, still_equal = self.original, _StillEqual(self.equal)
        warned = False

        def run(*args: Any) -> Any:
            nonlocal warned
            if still_equal(args):
                return compiled(*args)
            if not warned:
                warned = True
                warnings.warn(
                    "layers that shared one sketch when the model was compiled hold different "
                    "sketches now, so it runs uncompiled; call torch._dynamo.reset() to compile "
                    "it again",
                    SS1Warning,
                    stacklevel=2,
                )
            return original(*args)

        return run


class _StillEqual:
    """Whether pairs of inputs hold equal tensors; those that were changed are compared again.

    Equal blocks of a model run one compiled graph on the tensors of each, so the tensors of every
    block are remembered: comparing them at every call would make the host wait for the GPU. All
    pairs are looked up at once, since a call of a large model has some 50: 37 µs of the host's time
    for 48 pairs, where pair by pair it was 89.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        positions = sorted({position for pair in pairs for position in pair})
        self._pairs = [(positions.index(a), positions.index(b)) for a, b in pairs]
        self._pick = itemgetter(*positions)
        self.known: dict[tuple[int, ...], _Compared] = {}

    def __call__(self, args: Sequence[Any]) -> bool:
        tensors: tuple[Tensor, ...] = self._pick(args)
        key = tuple(map(id, tensors))
        known = self.known.get(key)
        if known is None:
            return self._first(key, tensors)
        versions = [tensor._version for tensor in tensors]
        pointers = [tensor.data_ptr() for tensor in tensors]
        if versions != known.versions or pointers != known.pointers:
            for i, (a, b) in enumerate(self._pairs):
                if any(
                    versions[j] != known.versions[j] or pointers[j] != known.pointers[j]
                    for j in (a, b)
                ):
                    known.equal[i] = _equal(tensors[a], tensors[b])
            known.versions, known.pointers = versions, pointers
            known.all_equal = all(known.equal)
        return known.all_equal

    def _first(self, key: tuple[int, ...], tensors: tuple[Tensor, ...]) -> bool:
        equal = [_equal(tensors[a], tensors[b]) for a, b in self._pairs]
        if any(tensor.is_inference() for tensor in tensors):
            return all(equal)  # they do not tell when they are written
        if len(self.known) >= _CALLS:
            self.known.clear()
        known = self.known

        def forget(_: object) -> None:
            known.pop(key, None)  # the next tensor may get the address of the one that died

        self.known[key] = _Compared(
            [tensor._version for tensor in tensors],
            [tensor.data_ptr() for tensor in tensors],
            equal,
            all(equal),
            [weakref.ref(tensor, forget) for tensor in tensors],
        )
        return all(equal)


_CALLS = 4096


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@dataclass
class _Compared:
    """Tensors as they were compared: how often written, where they lay, and with what result."""

    versions: list[int]
    pointers: list[int]
    equal: list[bool]
    all_equal: bool
    alive: list[weakref.ref[Tensor]]


def fuse_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    name_of: Callable[[fx.Node], str],
    wanted: bool | None,
    trace: PassTrace | None = None,
) -> Fused:
    """Run the fusion passes over ``gm``, in place, where that is wanted and possible.

    Args:
        gm: the graph, with its linears rewritten to ``ss1::linear``.
        inputs: its example inputs; sketches are compared if they are real tensors.
        name_of: the name of the layer that a graph input holding ``z`` belongs to.
        wanted: ``None`` means on CUDA only. On a CPU Inductor's own producers are vectorised and
            the fused operators are composed of PyTorch functions, so that fusing loses.
        trace: of the passes over ``gm``.
    """
    found = linears(gm.graph)
    if wanted is None:
        wanted = any(example(linear.z).is_cuda for linear in found)
    if not wanted or not found:
        return Fused()
    reason = why_not(gm.graph)
    if reason is not None:
        log.info("nothing was fused: %s", reason)
        return Fused()
    names = {linear.z: name_of(linear.z) for linear in found}
    before = fx.Graph()
    before.output(before.graph_copy(gm.graph, {}))
    results = fuse(gm.graph, values_of(gm.graph, inputs), trace)
    gm.recompile()
    index = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    equal = tuple((index[a], index[b]) for result in results for a, b in result.equal)
    counts: dict[str, int] = {}
    for result in results:
        for what, number in result.counts().items():
            counts[what] = counts.get(what, 0) + number
    original = fx.GraphModule(gm, before) if equal else None
    return Fused(counts, _by_layer(results, names), original, equal)


_OF_SEVERAL = ("shared", "joined")
"""What layers have with one another: a sketch, or a product and the sketch behind it."""


def _by_layer(
    results: Sequence[PassResult], names: Mapping[fx.Node, str]
) -> dict[str, tuple[str, ...]]:
    """What was fused around each layer, each kind once."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        for fusion in result.fusions:
            layers = list(dict.fromkeys(names[z] for z in fusion.layers))
            for name in layers:
                what = fusion.what
                if what in _OF_SEVERAL:
                    others = [_short(other, name) for other in layers if other != name]
                    what = f"{what} with {', '.join(others)}" if others else what
                found.setdefault(name, {})[what] = None
    return {name: tuple(kinds) for name, kinds in found.items()}


def _short(other: str, name: str) -> str:
    """``other`` without the path that it has in common with ``name``."""
    path, last = other.split("."), name.split(".")
    while len(path) > 1 and last and path[0] == last[0]:
        path, last = path[1:], last[1:]
    return ".".join(path)
