"""The inputs that a rewritten program gains."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from ss1_compile.export.graphs import placeholders
from ss1_compile.learned import Structure
from ss1_compile.passes import Site, WeightSource
from ss1_compile.projection.project import Projection
from ss1_compile.quantization.projection import QuantizedProjection

if TYPE_CHECKING:
    from ss1_compile.export.program import Rewriting

_STATE = (InputKind.PARAMETER, InputKind.BUFFER)


class NewInputs:
    """The inputs that a rewritten graph gains: z, sketch and, if need be, bias."""

    def __init__(self, rewriting: Rewriting) -> None:
        self.rewriting = rewriting
        self.specs, self.tensors = rewriting.specs, rewriting.tensors
        self.taken = set(self.tensors)
        fakes = [node.meta.get("val") for node in rewriting.graph.nodes]
        self.fake_mode = torch._guards.detect_fake_mode(fakes)
        self.pending: dict[int, tuple[InputKind, str, fx.Node]] = {}  # by id of the tensor
        self.z: dict[Any, Tensor] = {}
        self.scales: dict[Any, Tensor] = {}
        self.sketches: dict[Any, Tensor] = {}

    def source(
        self, site: Site, name: str, structure: Structure, projection: Projection
    ) -> WeightSource:
        """The tensors of a site. A corrected bias that is its alone keeps its input."""
        root = site.weight.root
        target = self.rewriting.names[root]
        stem = f"{target}_"
        if f"{name}.weight" in self.taken:
            stem = f"{name}."
        elif target == "weight":
            stem = ""
        kind = self.specs[root].kind
        # A bias centres the statistics; otherwise z is the same for all layers of one weight.
        centred = projection.error_of == "output" and site.bias is not None
        key = (root, site.weight.key, site.operands.weight_is_kn, structure, centred)
        quantized = projection if isinstance(projection, QuantizedProjection) else None
        if key not in self.z:
            z_kind = kind if quantized is None else InputKind.BUFFER  # frozen
            self.z[key] = self._add(projection.z, z_kind, f"{stem}z", root)
            if quantized is not None:
                self.scales[key] = self._add(
                    quantized.scale, InputKind.BUFFER, f"{stem}scale", root
                )
        sketch, sketch_kind = projection.sketch, InputKind.BUFFER
        sketch_key: Any
        if structure.kind == "learned":  # fitted together with z
            sketch_key, sketch_kind = key, kind
        else:
            sketch_key = (sketch.cpu().numpy().tobytes(), sketch.shape, sketch.device)
        if sketch_key not in self.sketches:
            self.sketches[sketch_key] = self._add(sketch, sketch_kind, f"{stem}sketch", root)
        bias = None
        if projection.bias is not None and site.bias is not None:
            bias_root = site.bias.root
            if site.bias.path or set(bias_root.users) != {site.node}:
                kind = self.specs[bias_root].kind
                bias = self._add(projection.bias, kind, f"{stem}bias", bias_root)
            else:
                value = _like(projection.bias, self.rewriting.old_tensor(bias_root))
                for alias in self.rewriting.own_names(bias_root):
                    self.tensors[alias] = value
        dynamic = quantized is not None and quantized.quantization.dynamic
        return WeightSource(
            self.sketches[sketch_key], self.z[key], bias, self.scales.get(key), dynamic
        )

    def _add(self, value: Tensor, kind: InputKind, name: str, root: fx.Node) -> Tensor:
        kind = InputKind.PARAMETER if kind is InputKind.PARAMETER else InputKind.BUFFER
        value = _like(value, self.rewriting.old_tensor(root), kind)
        unique = name
        for i in itertools.count(1):
            if not any(t == unique or t.startswith(f"{unique}.") for t in self.taken):
                break
            unique = f"{name}_{i}"
        self.taken.add(unique)
        self.tensors[unique] = value
        self.pending[id(value)] = (kind, unique, root)
        return value

    def make(self, graph: fx.Graph, _: str, value: Tensor) -> fx.Node:
        """A placeholder: parameters next to the dense weight, buffers after all other state."""
        kind, name, root = self.pending[id(value)]
        letter, place = ("p", graph.inserting_before(root))
        if kind is InputKind.BUFFER:
            letter = "b"
            state = [n for n in placeholders(graph) if self.specs[n].kind in _STATE]
            place = graph.inserting_after(state[-1]) if state else place
        with place:
            node = graph.placeholder(f"{letter}_{name.replace('.', '_')}")
        assert self.fake_mode is not None  # the placeholders of an exported program are fake
        node.meta["val"] = self.fake_mode.from_tensor(value, static_shapes=True)
        persistent = True if kind is InputKind.BUFFER else None
        self.specs[node] = InputSpec(kind, TensorArgument(node.name), name, persistent)
        return node


def _like(value: Tensor, old: Tensor, kind: InputKind | None = None) -> Tensor:
    """``value`` as a parameter if ``old`` is one (and ``kind`` allows it)."""
    if isinstance(old, nn.Parameter) and kind in (None, InputKind.PARAMETER):
        return nn.Parameter(value, old.requires_grad)
    return value
