"""Bind projected weights at run time.

A compiled graph outlives the values of its weights: ``load_state_dict``, an in-place update, a new
``Parameter`` or a second instance of the same class all reuse it. So z is not baked in; it is
looked up at every call from the dense weight that the caller passes (about half a microsecond),
and projected again only when that weight has changed.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ss1_compile.calibration.statistics import statistics_of
from ss1_compile.config import LayerQuantization
from ss1_compile.learned import Structure
from ss1_compile.projection.project import Projection
from ss1_compile.quantization.projection import project_layer

_spec_ids = itertools.count()
_specs: dict[tuple[Any, ...], int] = {}
_bound: dict[tuple[int, int], _Bound] = {}
"""(id of the dense weight, id of the recipe) → its projection. Entries die with their weight."""


@dataclass(frozen=True)
class Recipe:
    """How one graph turns a dense weight into an SS1 weight.

    Attributes:
        name: qualified name, for messages.
        structure: the structure to project onto.
        method: see :class:`ss1_compile.SS1Config`, ``projection``.
        damping: see :class:`ss1_compile.SS1Config`.
        weight: maps the graph's input to ``W [N, K]``.
        bias: likewise for the bias ``[N]``, or ``None``.
        key: identifies ``weight`` and ``bias`` across graphs.
        quantization: of z, or ``None``.
    """

    name: str
    structure: Structure
    method: Any
    damping: float | Literal["auto"]
    weight: Callable[[Tensor], Tensor]
    bias: Callable[[Tensor], Tensor] | None
    key: tuple[Any, ...]
    quantization: LayerQuantization | None = None

    @property
    def spec(self) -> int:
        """A small integer that equal recipes share: the look-up hashes no structure."""
        options = (self.method, self.damping, self.quantization)
        key = (self.structure, options, self.bias is not None, self.key)
        return _specs.setdefault(key, next(_spec_ids))


@dataclass(frozen=True)
class _Stamp:
    """Tells whether a tensor still is the object, memory and version it was."""

    ref: weakref.ref[Tensor]
    version: int
    pointer: int

    def matches(self, tensor: Tensor) -> bool:
        return (
            self.ref() is tensor
            and self.version == _version(tensor)
            and self.pointer == tensor.data_ptr()
        )


@dataclass(frozen=True)
class _Bound:
    weight: _Stamp
    bias: _Stamp | None
    statistics: object
    projection: Projection


def _version(tensor: Tensor) -> int:
    # An inference tensor keeps no version; writing to one in place goes unseen.
    return 0 if tensor.is_inference() else tensor._version


def _stamp(tensor: Tensor, callback: Callable[[Any], object] | None = None) -> _Stamp:
    return _Stamp(weakref.ref(tensor, callback), _version(tensor), tensor.data_ptr())


def bind(recipe: Recipe, spec: int, weight: Tensor, bias: Tensor | None) -> Projection:
    """The projection of ``weight`` (and ``bias``), from the cache while both are unchanged."""
    key = (id(weight), spec)
    entry = _bound.get(key)
    if (
        entry is not None
        and entry.weight.matches(weight)
        and (entry.bias is None or (bias is not None and entry.bias.matches(bias)))
    ):
        return entry.projection
    return _project(recipe, key, weight, bias)


def bind_fresh(recipe: Recipe, spec: int, weight: Tensor, bias: Tensor | None) -> Projection:
    """As :func:`bind`, but project again too if the weight was calibrated since."""
    entry = _bound.get((id(weight), spec))
    if entry is not None and entry.statistics is not statistics_of(weight):
        del _bound[id(weight), spec]
    return bind(recipe, spec, weight, bias)


def _project(
    recipe: Recipe, key: tuple[int, int], weight: Tensor, bias: Tensor | None
) -> Projection:
    statistics = statistics_of(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        projection = project_layer(
            recipe.weight(weight.detach()),
            recipe.structure,
            recipe.bias(bias.detach()) if recipe.bias and bias is not None else None,
            statistics=statistics,
            method=recipe.method,
            damping=recipe.damping,
            name=recipe.name,
            quantization=recipe.quantization,
        )
    stamp = _stamp(weight, lambda _: _bound.pop(key, None))
    _bound[key] = _Bound(stamp, None if bias is None else _stamp(bias), statistics, projection)
    return projection


@dataclass(frozen=True)
class Slot:
    """Where one bound weight sits among a graph's arguments.

    Attributes:
        recipe: how to make it.
        weight: index of the dense weight in the original arguments.
        bias: index of its bias, or ``None``.
    """

    recipe: Recipe
    weight: int
    bias: int | None


def bound_call(
    compiled: Callable[..., Any],
    kept: Sequence[int],
    slots: Sequence[Slot],
    layout: Sequence[tuple[int, str]],
    constants: Sequence[Tensor],
) -> Callable[..., Any]:
    """Wrap ``compiled`` so that it takes the dense weights and receives the projected ones.

    Args:
        compiled: takes the kept arguments, then the tensors of ``layout``.
        kept: indices of the original arguments that are still needed, in order.
        slots: the bound weights.
        layout: for every new argument ``(slot index, part)``, the part being ``"z"``, ``"scale"``,
            ``"bias"`` or ``"sketch"``, or ``(index, "constant")``.
        constants: tensors that never change (rotation sketches).
    """
    specs = [(slot.recipe, slot.recipe.spec, slot.weight, slot.bias) for slot in slots]

    def run(*args: Any) -> Any:
        bound = [
            bind(recipe, spec, args[weight], None if bias is None else args[bias])
            for recipe, spec, weight, bias in specs
        ]
        new = [
            constants[i] if part == "constant" else getattr(bound[i], part) for i, part in layout
        ]
        return compiled(*[args[i] for i in kept], *new)

    return run
