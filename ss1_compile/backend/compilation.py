"""``torch.compile(model, backend="ss1")``: one line, no change to the model.

Every linear layer of the captured graph with a frozen weight becomes ``ss1::linear``; the rest goes
to the inner backend (Inductor) as it is. The dense weights stay with the model and are projected
on the way in (:mod:`ss1_compile.binding`); use :func:`ss1_compile.compress` to free them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from ss1_compile import tensorrt
from ss1_compile.backend.captured import (
    copy_graph,
    fake_mode_of,
    is_static,
    is_whole_model,
    layer_name,
    module_name,
)
from ss1_compile.backend.options import BackendOptions
from ss1_compile.binding import Recipe, Slot, bind_fresh, bound_call
from ss1_compile.calibration.statistics import statistics_of
from ss1_compile.compression.settled import is_settled
from ss1_compile.decision import Decisions, in_order
from ss1_compile.errors import ConfigError, TrainingError
from ss1_compile.fusion import fuse_graph
from ss1_compile.kernels import lowering
from ss1_compile.nested import nested_linears
from ss1_compile.passes import (
    PassTrace,
    Site,
    WeightSource,
    expand_linears,
    find_sites,
    inline_checkpoints,
    rewrite_sites,
)
from ss1_compile.projection.project import Projection
from ss1_compile.quantization.projection import QuantizedProjection

log = logging.getLogger(__name__)

_SS1_LINEARS = tuple(
    target
    for packet in (torch.ops.ss1.linear, torch.ops.ss1.linear_quantized)
    for target in (packet, packet.default)
)


def ss1(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend, registered as ``"ss1"``.

    Args:
        gm: the captured graph; not modified.
        example_inputs: its inputs; parameters are real tensors.
        options: fields of :class:`SS1Config` and of :class:`BackendOptions`, and ``mode``.
        mode: as in ``torch.compile``; handed to Inductor.

    Raises:
        ConfigError: unknown or bad options.
        TrainingError: gradients are on and a weight that would be rewritten requires them.
        NothingToCompressError: the whole model is one graph and nothing in it was rewritten.
        UnhandledLinearError: ``strict=True`` and a linear layer cannot be handled.
    """
    parsed = BackendOptions.parse(options, mode)
    compilation = _Compilation(copy_graph(gm), example_inputs, parsed)
    compilation.decide(is_whole_model(gm))
    if parsed.dry_run:
        return compilation.inner(copy_graph(gm), example_inputs)
    return compilation.finish()


class _Compilation:
    """One graph on its way through the backend."""

    def __init__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions
    ) -> None:
        self.gm, self.inputs, self.options = gm, list(example_inputs), options
        self.config = options.config
        self.placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.index = {node: i for i, node in enumerate(self.placeholders)}
        self.decisions = Decisions(options.config, options.structures)
        self.projections: dict[Site, tuple[Slot, Projection]] = {}
        self.trace = PassTrace(gm.graph, gm, options.debug_dir)

    # --- deciding -----------------------------------------------------------------------------

    def decide(self, whole_model: bool) -> None:
        """Project or leave every linear layer, and report."""
        with self.trace("inline_checkpoints") as did:
            did["regions"] = 0 if torch.is_grad_enabled() else inline_checkpoints(self.gm)
        frozen = {n: layer_name(n) for n in self.placeholders if is_static(n)}
        with self.trace("expand_linears") as did:
            did["expanded"] = expand_linears(self.gm.graph, frozen, self._wanted)
        with self.trace("find_sites") as did:
            sites, skipped = find_sites(self.gm.graph, frozen)
            did.update(sites=len(sites), skipped=len(skipped))
        already = any(node.target in _SS1_LINEARS for node in self.gm.graph.nodes) or any(
            is_settled(self.inputs[self.index[node]]) for node in frozen
        )
        with self.trace("project") as did:
            for entry in in_order(self.gm.graph, sites, skipped):
                if isinstance(entry, Site):
                    self._consider(entry, already)
                else:
                    name = frozen[entry.weight.root] if entry.weight else module_name(entry.node)
                    self.decisions.leave(entry, name, entry.reason)
            for node in self.gm.graph.nodes:
                for inner, name in nested_linears(self.gm, node, frozen):
                    self.decisions.leave(inner, name, inner.reason)
            report = self.decisions.report
            did.update(projected=len(report.compressed), left=len(report.left))
        self.trace.write("report.txt", str(report))
        if self.options.report is not None:
            for row in report:
                self.options.report.record(row)
        if whole_model and not already:
            report.require_some(self.config)
        report.warn_if_ruined(self.config.warn_error)
        log.info("graph of %d nodes: %s", len(self.gm.graph.nodes), report.summary())

    def finish(self) -> Callable[..., Any]:
        """Rewrite what was projected and compile the graph."""
        compiled = self._rewrite() if self.projections else self._compile(self.inputs, {})
        if self.options.lowering is None:
            return compiled

        def run(*args: Any) -> Any:
            with lowering.override(self.options.lowering):
                return compiled(*args)

        return run

    def _wanted(self, root: fx.Node, n: int, k: int) -> bool:
        return not isinstance(self.config.reduction_for(layer_name(root), k, n), str)

    def _consider(self, site: Site, already: bool) -> None:
        """Project the site's weight, or leave it with a reason.

        ``already`` says that the model was compressed before.
        """
        name = layer_name(site.weight.root)
        if already and not self.options.chosen:
            reason = (
                "dense since the model was compressed; pass options, a reduction say, to change it"
            )
            self.decisions.leave(site, name, reason)
            return
        weight = self.inputs[self.index[site.weight.root]]
        calibrated = weight.dim() == 2 and statistics_of(weight) is not None
        structure = self.decisions.structure(site, name, calibrated)
        if structure is None:
            return
        if torch.is_grad_enabled() and weight.requires_grad and not self.options.dry_run:
            raise TrainingError(
                f"{name} requires gradients: backend='ss1' computes with a projection of it, so it "
                f"would not train. Compile under torch.no_grad() for inference, or call "
                f"ss1_compile.compress(model, ...) first and train the compressed model"
            )
        slot = self._slot(site, name, structure)
        bias = None if slot.bias is None else self.inputs[slot.bias]
        projection = bind_fresh(slot.recipe, slot.recipe.spec, weight, bias)
        if self.decisions.accept(site, name, structure, projection):
            self.projections[site] = (slot, projection)

    def _slot(self, site: Site, name: str, structure: Any) -> Slot:
        weight, transposed = site.weight.function(), site.operands.weight_is_kn
        return Slot(
            Recipe(
                name=name,
                structure=structure,
                method=self.config.projection,
                damping=self.config.damping,
                weight=(lambda w: weight(w).mT) if transposed else weight,
                bias=site.bias.function() if site.bias else None,
                key=(site.weight.key, transposed, site.bias.key if site.bias else None),
                quantization=self.config.quantization_for(name),
            ),
            weight=self.index[site.weight.root],
            bias=self.index[site.bias.root] if site.bias else None,
        )

    # --- rewriting ----------------------------------------------------------------------------

    def _rewrite(self) -> Callable[..., Any]:
        graph = self.gm.graph
        fake_mode = torch._guards.detect_fake_mode(self.inputs)
        context = torch._guards.TracingContext.try_get()
        if fake_mode is None and context is not None:
            fake_mode = context.fake_mode
        captured_mode: Any = fake_mode_of(self.placeholders) or fake_mode
        slots: list[Slot] = []
        layout: dict[int, tuple[int, str]] = {}  # id of a new input's tensor → where it comes from
        constants: list[Tensor] = []
        sketches: dict[Any, Tensor] = {}
        sources: dict[Site, WeightSource] = {}
        for site, (slot, projection) in self.projections.items():
            sketch = projection.sketch
            if slot.recipe.structure.kind == "learned":  # changes with the weight, as z does
                layout.setdefault(id(sketch), (len(slots), "sketch"))
            else:
                code = (sketch.cpu().numpy().tobytes(), sketch.shape, sketch.device)
                sketch = sketches.setdefault(code, sketch)
                if id(sketch) not in layout:
                    layout[id(sketch)] = (len(constants), "constant")
                    constants.append(sketch)
            layout.setdefault(id(projection.z), (len(slots), "z"))
            if projection.bias is not None:
                layout.setdefault(id(projection.bias), (len(slots), "bias"))
            slots.append(slot)
            bias = projection.bias if slot.bias is not None else None
            quantized: dict[str, Any] = {}
            if isinstance(projection, QuantizedProjection):
                layout.setdefault(id(projection.scale), (len(slots) - 1, "scale"))
                dynamic = projection.quantization.dynamic
                quantized = {"scale": projection.scale, "dynamic": dynamic}
            sources[site] = WeightSource(sketch, projection.z, bias, **quantized)
        new_inputs: list[tuple[Any, tuple[int, str]]] = []
        last = self.placeholders[-1]

        def make_input(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
            nonlocal last
            with graph.inserting_after(last):
                last = graph.placeholder(name)
            fake = fake_mode.from_tensor(value, static_shapes=True) if fake_mode else value
            # AOTAutograd reads these: a static input is neither guarded nor copied by CUDA graphs.
            last._dynamo_source = None
            last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            # Dynamo hands the backend another mode than that of the graph's example values.
            last.meta["example_value"] = (
                fake
                if captured_mode is fake_mode
                else captured_mode.from_tensor(value, static_shapes=True)
            )
            new_inputs.append((fake, layout[id(value)]))
            return last

        with self.trace("rewrite_sites") as did:
            rewrites = rewrite_sites(graph, sources, make_input)
            did["rewritten"] = len(rewrites)
            kept = [i for i, node in enumerate(self.placeholders) if node.users]
            for node in self.placeholders:
                if not node.users:
                    graph.erase_node(node)
        self.gm.recompile()
        inputs = [*(self.inputs[i] for i in kept), *(fake for fake, _ in new_inputs)]
        names = {r.z: self.projections[r.site][0].recipe.name for r in rewrites}
        compiled = self._compile(inputs, names)
        return bound_call(compiled, kept, slots, [where for _, where in new_inputs], constants)

    def _compile(self, inputs: Sequence[Any], names: Mapping[fx.Node, str]) -> Callable[..., Any]:
        """Fuse and compile the graph; ``names`` holds the layers of the ``z`` that are new."""

        def name_of(z: fx.Node) -> str:
            return names.get(z) or layer_name(z).removesuffix(".z")

        # TensorRT fuses the layers it is given itself, and takes ss1::linear only.
        wanted = False if self.options.for_tensorrt else self.options.fuse
        fused = fuse_graph(self.gm, inputs, name_of, wanted, self.trace)
        if self.options.report is not None:
            self.options.report.note_fused(fused.layers)
        return fused.guard(self.inner(self.gm, inputs))

    def inner(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Hand ``gm`` to the inner backend."""
        with self.trace(self.options.inner_backend):
            return self._inner(gm, inputs)

    def _inner(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.options.inner_backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            patches = dict(self.options.inductor) if self.options.inductor else None
            compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
            return cast(Callable[..., Any], compiled)
        if self.options.inductor:
            raise ConfigError(
                f"mode and inductor settings need inner_backend='inductor', "
                f"not {self.options.inner_backend!r}"
            )
        settings: dict[str, Any] = {}
        if self.options.for_tensorrt:
            tensorrt.register()
            settings = {"options": dict(self.options.tensorrt or {})}
        backend = torch._dynamo.lookup_backend(self.options.inner_backend)
        inner: Callable[..., Any] = backend(gm, list(inputs), **settings)
        return inner
