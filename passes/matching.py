"""What the fusion passes match with: SS1 nodes, nodes that keep rows, comparisons of forms."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ss1_compile.passes.frozen import example

_aten = torch.ops.aten
_ss1 = torch.ops.ss1


# --- results ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fusion:
    """One rewrite.

    Attributes:
        what: for people and reports, such as ``"norm"``, ``"gated silu"`` or ``"residual"``.
        layers: the ``z`` operands of the layers it serves, one node per layer.
    """

    what: str
    layers: tuple[fx.Node, ...]


@dataclass
class PassResult:
    """What one fusion pass did to a graph.

    Attributes:
        name: the pass.
        fusions: one entry per rewrite, in the order of the graph.
        equal: sketches taken for one because their values were equal: ``(other, representative)``.
            Whoever runs the graph has to make sure that they stay so.
    """

    name: str
    fusions: list[Fusion] = field(default_factory=list)
    equal: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.fusions)

    def add(self, what: str, *layers: fx.Node) -> None:
        """Note one rewrite."""
        self.fusions.append(Fusion(what, layers))

    def counts(self) -> dict[str, int]:
        """How often each kind of rewrite was done."""
        found: dict[str, int] = {}
        for fusion in self.fusions:
            found[fusion.what] = found.get(fusion.what, 0) + 1
        return found


# --- SS1 nodes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """An ``ss1::linear`` node and its operands."""

    node: fx.Node
    x: fx.Node
    sketch: fx.Node
    z: fx.Node
    bias: fx.Node | None

    @property
    def reduced_features(self) -> int:
        """K_c."""
        return int(example(self.z).shape[1])

    @property
    def out_features(self) -> int:
        """N."""
        return int(example(self.z).shape[0])


@dataclass(frozen=True)
class Reader:
    """A node that sketches ``x``: an ``ss1::sketch``, or an ``ss1::linear`` with one inside."""

    node: fx.Node
    x: fx.Node
    sketch: fx.Node
    reduced_features: int
    linear: Linear | None

    @property
    def layers(self) -> tuple[fx.Node, ...]:
        """The z operands of the layers that read the sketch."""
        if self.linear is not None:
            return (self.linear.z,)
        return tuple(z for user in self.node.users if is_matmul(user) for z in matmul_weights(user))


def as_linear(node: fx.Node) -> Linear | None:
    """The operands of an ``ss1::linear`` node whose shapes are known; ``None`` for others."""
    if node.target not in (_ss1.linear, _ss1.linear.default):
        return None
    names = ("x", "sketch", "z", "bias")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, sketch, z, bias = (given.get(name) for name in names)
    if not (isinstance(x, fx.Node) and isinstance(sketch, fx.Node) and isinstance(z, fx.Node)):
        return None
    if not isinstance(bias, fx.Node | None):
        return None
    values = [example(n) for n in (node, x, sketch, z)]
    if not all(isinstance(value, Tensor) for value in values) or values[1].dim() < 2:
        return None
    if values[1].dtype != values[3].dtype or values[3].dim() != 2:
        return None
    if not all(isinstance(size, int) for size in (*values[3].shape, values[1].shape[-1])):
        return None
    return Linear(node, x, sketch, z, bias)


def linears(graph: fx.Graph) -> list[Linear]:
    """All ``ss1::linear`` nodes with known shapes, in order."""
    return [found for found in map(as_linear, graph.nodes) if found is not None]


def as_reader(node: fx.Node) -> Reader | None:
    """``node`` as something that sketches an input of known shape; ``None`` for others."""
    if node.target is _ss1.sketch.default and isinstance(example(node.args[0]), Tensor):
        x, sketch, reduced_features = cast(tuple[fx.Node, fx.Node, int], node.args)
        return Reader(node, x, sketch, reduced_features, None)
    linear = as_linear(node)
    if linear is None:
        return None
    return Reader(node, linear.x, linear.sketch, linear.reduced_features, linear)


def readers(graph: fx.Graph) -> list[Reader]:
    """Every node that sketches an input of known shape, in order."""
    return [found for found in map(as_reader, graph.nodes) if found is not None]


def matmul_weights(node: fx.Node) -> tuple[fx.Node, ...]:
    """The z operands of an ``ss1::matmul``."""
    weights: Any = node.args[1]
    return tuple(weights)


def is_matmul(node: fx.Node) -> bool:
    """Whether ``node`` is an ``ss1::matmul``."""
    return node.target is _ss1.matmul.default


# --- nodes that keep rows -----------------------------------------------------------------------

_KEEPING_METHODS = frozenset(
    (
        "view",
        "view_as",
        "reshape",
        "reshape_as",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "contiguous",
        "clone",
        "detach",
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
    )
)
_KEEPING_FUNCTIONS = frozenset(
    {
        torch.reshape,
        torch.flatten,
        torch.unflatten,
        torch.squeeze,
        torch.unsqueeze,
        torch.clone,
        torch.detach,
        _aten.view.default,
        _aten.reshape.default,
        _aten._unsafe_view.default,
        _aten.flatten.using_ints,
        _aten.unflatten.int,
        _aten.contiguous.default,
        _aten.clone.default,
        _aten.detach.default,
        _aten.alias.default,
    }
)
_DROPOUTS = frozenset({F.dropout, torch.dropout, _aten.dropout.default})


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether the node is a dropout that drops nothing."""
    if node.target not in _DROPOUTS:
        return False
    training = argument(node, 2, "training", node.target is F.dropout)
    return training is False or argument(node, 1, "p", 0.5) == 0


def _is_whole_slice(node: fx.Node) -> bool:
    """Whether the node is ``x[:, 0:]`` or the like, which keeps all of ``x``."""
    if node.target is not operator.getitem or not same_form(node.args[0], node):
        return False
    index: Any = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is ... or (isinstance(p, slice) and p.step in (None, 1)) for p in parts)


def row_input(node: fx.Node) -> fx.Node | None:
    """The input of a node that has its rows, in order: a view, copy, idle cast or dropout.

    Views count whose last dimension is their input's: in row-major order their rows are the same.
    """
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    keeping = (
        (node.op == "call_method" and node.target in _KEEPING_METHODS)
        or (node.op == "call_function" and node.target in _KEEPING_FUNCTIONS)
        or is_idle_dropout(node)
        or _is_whole_slice(node)
    )
    before, after = example(node.args[0]), example(node)
    if not keeping or not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if before.dtype != after.dtype or before.device != after.device:
        return None
    if before.dim() < 2 or after.dim() < 2 or not same_size(before.shape[-1], after.shape[-1]):
        return None
    return node.args[0]


def row_path(node: fx.Node) -> list[fx.Node]:
    """``node`` and what it has its rows from, up to the node that computes them, which is last."""
    path = [node]
    while (before := row_input(path[-1])) is not None:
        path.append(before)
    return path


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are known to have the same shape, without a guard."""
    return a.dim() == b.dim() and all(map(same_size, a.shape, b.shape))


def same_form(a: object, b: object) -> bool:
    """Whether two nodes hold tensors of the same shape, dtype and device."""
    first, second = example(a), example(b)
    return (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.dtype == second.dtype
        and first.device == second.device
        and same_shape(first, second)
    )


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, or ``None`` if it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def values_of(graph: fx.Graph, inputs: Sequence[Any]) -> Mapping[fx.Node, Tensor]:
    """The real tensors among a graph's inputs, by placeholder; fake ones are left out."""
    from torch._subclasses.fake_tensor import FakeTensor

    def real() -> Iterator[tuple[fx.Node, Tensor]]:
        placeholders = (node for node in graph.nodes if node.op == "placeholder")
        for node, value in zip(placeholders, inputs, strict=True):
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                yield node, value

    return dict(real())
