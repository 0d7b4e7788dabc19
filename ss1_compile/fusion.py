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
from typing import Any, NamedTuple

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
        original, checks = self.original, [_StillEqual(a, b) for a, b in self.equal]
        warned = False

        def run(*args: Any) -> Any:
            nonlocal warned
            for check in checks:
                if not check(args):
                    break
            else:
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
    """Whether two inputs hold equal tensors; compared again only when one was changed.

    Equal blocks of a model run one compiled graph on the tensors of each, so every pair of tensors
    is remembered: comparing them at every call would make the host wait for the GPU.
    """

    def __init__(self, first: int, second: int) -> None:
        self.indices = (first, second)
        self.known: dict[tuple[int, int], _Compared] = {}

    def __call__(self, args: Sequence[Any]) -> bool:
        a: Tensor = args[self.indices[0]]
        b: Tensor = args[self.indices[1]]
        known = self.known.get((id(a), id(b)))
        if known is not None and known.first.holds(a) and known.second.holds(b):
            return known.equal
        equal = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        if a.is_inference() or b.is_inference():
            return equal  # they do not tell when they are written
        if len(self.known) >= _PAIRS:
            self.known.clear()
        self.known[id(a), id(b)] = _Compared(_Stamp(a), _Stamp(b), equal)
        return equal


_PAIRS = 4096


class _Stamp:
    """A tensor as it was: which object, how often written, and where it lies."""

    __slots__ = ("pointer", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.version = tensor._version
        self.pointer = tensor.data_ptr()

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is the same, unchanged."""
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and self.pointer == tensor.data_ptr()
        )


class _Compared(NamedTuple):
    first: _Stamp
    second: _Stamp
    equal: bool


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
