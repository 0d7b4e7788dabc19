"""``compress_exported``: the same compression on a ``torch.export.ExportedProgram``.

The exported graph, its state dict and its signature are rewritten together, so that what starts
from the program (AOTInductor, ONNX, TensorRT, ``torch.export.save``) starts from a small one.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec

from ss1_compile.calibration.statistics import InputStatistics, Statistics, statistics_of
from ss1_compile.config import SS1Config
from ss1_compile.decision import Decisions
from ss1_compile.errors import CalibrationError, ConfigError, ProjectionError
from ss1_compile.export.graphs import copy_graph, memory_of, placeholders
from ss1_compile.export.inputs import NewInputs
from ss1_compile.learned import Structure
from ss1_compile.nested import nested_linears
from ss1_compile.passes import (
    PassTrace,
    Site,
    Skipped,
    expand_linears,
    find_sites,
    rewrite_sites,
)
from ss1_compile.projection.project import Projection
from ss1_compile.quantization.projection import project_layer
from ss1_compile.report import Report

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def compress_exported(
    ep: ExportedProgram,
    config: SS1Config | None = None,
    calibration: Statistics | None = None,
    *,
    structures: Mapping[str, Structure] | None = None,
    dry_run: bool = False,
    debug_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[ExportedProgram, Report]:
    """Replace the linear layers of an exported program by ``ss1::linear``.

    Works on what ``torch.export.export`` returns and on it after ``run_decompositions()``. Layers
    are called as in :func:`ss1_compile.compress`, by the module that holds the weight. Where that
    is ``layer``, the new program holds ``layer.z`` in place of ``layer.weight`` (a parameter if the
    weight was one, else a buffer), ``layer.bias`` with new values if statistics correct it, and a
    buffer ``layer.sketch``, which layers of equal structure share. A learned sketch is one layer's
    own, and of the kind of z. A quantised z is a buffer, and so is its ``layer.scale``.

    ``ep`` is left unchanged. The new program shares with it the tensors that stay as they are.

    Args:
        ep: the program; its weights have values (it was not exported from fake tensors).
        config: what to compress and how; or pass the fields as keywords.
        calibration: input statistics by parameter name, collected on the module before it was
            exported (see :func:`ss1_compile.calibrate`). Statistics bound to the parameters that
            the program holds are used without it.
        structures: qualified name → structure, for weights that are known to have one: these are
            recovered exactly.
        dry_run: project and report, and return ``ep`` itself.
        debug_dir: a folder to write the graph to, before and after each pass, with a table of what
            the passes did and how long they took (:mod:`ss1_compile.passes.trace`).
        **options: fields of :class:`SS1Config`, in place of ``config``.

    Returns:
        The new program, validated, and a row per linear layer.

    Raises:
        ConfigError: bad options, or a structure of an unknown layer or of another size.
        CalibrationError: the statistics are of another model, or missing where needed.
        ProjectionError: a weight has no values or is not finite.
        NothingToCompressError: no layer was compressed and ``allow_empty`` is off.
        UnhandledLinearError: ``strict`` is on and a layer cannot be handled.
    """
    if not isinstance(ep, ExportedProgram):
        raise ConfigError(
            f"ep must be a torch.export.ExportedProgram, got {type(ep).__name__}; use "
            f"ss1_compile.compress for a module"
        )
    if config is not None and options:
        raise ConfigError(f"pass either config or options, not both ({', '.join(options)})")
    config = config or SS1Config.from_dict(options)
    _check_calibration(ep, calibration)
    with torch.no_grad():
        rewriting = Rewriting(ep, config, calibration, structures or {}, debug_dir)
        rewriting.decide()
        report = rewriting.decisions.report
        report.require_some(config)
        report.warn_if_ruined(config.warn_error)
        return ep if dry_run else rewriting.rewrite(), report


def _check_calibration(ep: ExportedProgram, calibration: object) -> None:
    if calibration is None:
        return
    if not isinstance(calibration, Statistics):
        raise CalibrationError(
            f"calibration must be ss1_compile.Statistics, got {type(calibration).__name__}: run "
            f"ss1_compile.calibrate(model, data) on the module before torch.export.export"
        )
    missing = [name for name in calibration if name not in ep.state_dict]
    if missing:
        raise CalibrationError(
            f"the statistics are of another model: the program has no parameter called "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
        )


class Rewriting:
    """A copy of a program on its way to the compressed one."""

    def __init__(
        self,
        ep: ExportedProgram,
        config: SS1Config,
        calibration: Statistics | None,
        structures: Mapping[str, Structure],
        debug_dir: str | os.PathLike[str] | None,
    ) -> None:
        self.ep, self.config, self.calibration = ep, config, calibration
        self.decisions = Decisions(config, structures)
        self.graph = copy_graph(ep.graph)
        self.trace = PassTrace(self.graph, ep.graph_module, debug_dir)
        self.tensors: dict[str, Any] = {**ep.constants, **ep.state_dict}
        self.specs: dict[fx.Node, InputSpec] = {
            node: dataclasses.replace(spec, arg=copy.copy(spec.arg))
            for node, spec in zip(
                placeholders(self.graph), ep.graph_signature.input_specs, strict=True
            )
        }
        self.names: dict[fx.Node, str] = {  # of everything that may be a weight
            node: str(spec.target)
            for node, spec in self.specs.items()
            if spec.kind in _WEIGHTS and isinstance(self.tensors.get(str(spec.target)), Tensor)
        }
        self.aliases: dict[Any, list[str]] = {}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, Tensor):
                self.aliases.setdefault(memory_of(tensor), []).append(name)
        self.projections: dict[Site, tuple[str, Structure, Projection]] = {}

    # --- deciding -----------------------------------------------------------------------------

    def decide(self) -> None:
        """Project or leave every linear layer, in the order of the graph."""
        with self.trace("expand_linears") as did:
            did["expanded"] = expand_linears(self.graph, self.names, self._wanted)
        with self.trace("find_sites") as did:
            sites, skipped = find_sites(self.graph, self.names)
            did.update(sites=len(sites), skipped=len(skipped))
        with self.trace("project") as did:
            self._decide_all([*sites, *skipped])
            report = self.decisions.report
            did.update(projected=len(report.compressed), left=len(report.left))
        self.trace.write("report.txt", str(report))
        unknown = set(self.decisions.structures) - {row.name for row in self.decisions.report}
        if unknown:
            raise ConfigError(f"structures names no linear layer of the program: {sorted(unknown)}")

    def _decide_all(self, found: list[Site | Skipped]) -> None:
        entries: dict[fx.Node, list[Site | Skipped]] = {}
        for entry in found:
            entries.setdefault(entry.node, []).append(entry)
        written = {spec.target for spec in self.ep.graph_signature.output_specs}
        for node in self.graph.nodes:
            for entry in entries.get(node, ()):
                self._decide(entry, written)
            if node not in entries:
                for inner, target in nested_linears(self.ep.graph_module, node, self.names):
                    self.decisions.leave(inner, self._layer_name(inner.node, target), inner.reason)

    def _decide(self, entry: Site | Skipped, written: set[str | None]) -> None:
        node = entry.node
        name = self._layer_name(node, self.names[entry.weight.root] if entry.weight else None)
        if isinstance(entry, Skipped):
            self.decisions.leave(entry, name, entry.reason)
            return
        operands = [self.names[v.root] for v in (entry.weight, entry.bias) if v is not None]
        changing = [target for target in operands if target in written]
        tied = [self.names[twin] for twin in self._twins(entry.weight.root) if twin.users]
        if changing:
            self.decisions.leave(entry, name, f"the program writes to {changing[0]}")
        elif tied:
            self.decisions.leave(entry, name, f"the weight is tied to {tied[0]}")
        else:
            self._consider(entry, name)

    def _wanted(self, root: fx.Node, n: int, k: int) -> bool:
        name = self.names[root].removesuffix(".weight")
        return not isinstance(self.config.reduction_for(name, k, n), str)

    def _consider(self, site: Site, name: str) -> None:
        stored = self.tensors[self.names[site.weight.root]]
        statistics = self._statistics(stored)
        known = statistics is not None and stored.dim() == 2
        structure = self.decisions.structure(site, name, known)
        if structure is None:
            return
        weight = self._tensor(site.weight.root, name)
        calibrated = self.config.projection == "calibrated"
        if calibrated and statistics is None and self.calibration is not None:
            self.decisions.leave(site, name, "the calibration data never reached it")
            return
        bias = site.bias.function()(self._tensor(site.bias.root, name)) if site.bias else None
        dense = site.weight.function()(weight.detach())
        with torch.autocast(dense.device.type, enabled=False):
            projection = project_layer(
                dense.mT if site.operands.weight_is_kn else dense,
                structure,
                bias,
                statistics=statistics,
                method=self.config.projection,
                damping=self.config.damping,
                name=name,
                quantization=self.config.quantization_for(name),
            )
        if statistics is None:  # the bias stays as it is
            projection = dataclasses.replace(projection, bias=None)
        if self.decisions.accept(site, name, structure, projection):
            self.projections[site] = (name, structure, projection)

    def _tensor(self, root: fx.Node, name: str) -> Tensor:
        tensor: Tensor = self.tensors[self.names[root]]
        if isinstance(tensor, FakeTensor):
            raise ProjectionError(
                f"{name}: {self.names[root]} is a fake tensor and has no values to project; "
                f"export the model with its weights loaded"
            )
        return tensor

    def _statistics(self, weight: Tensor) -> InputStatistics | None:
        for alias in self.aliases[memory_of(weight)] if self.calibration is not None else ():
            if alias in cast(Statistics, self.calibration):
                return cast(Statistics, self.calibration)[alias]
        return statistics_of(weight)

    def _layer_name(self, node: fx.Node, target: str | None) -> str:
        """The name that ``compress`` uses: of the module that holds the weight and is called."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        module = str(stack[-1][0]) if stack else ""
        if target is None:
            return module or node.name
        if f"{module}.weight" in self.aliases[memory_of(self.tensors[target])]:
            return module
        return target.removesuffix(".weight")

    # --- rewriting ----------------------------------------------------------------------------

    def rewrite(self) -> ExportedProgram:
        """Rewrite graph, signature and tensors, and make a program of them."""
        inputs = NewInputs(self)
        sources = {
            site: inputs.source(site, name, structure, projection)
            for site, (name, structure, projection) in self.projections.items()
        }
        with self.trace("rewrite_sites") as did:
            rewrites = rewrite_sites(self.graph, sources, inputs.make)
            did["rewritten"] = len(rewrites)
            for rewritten in rewrites:
                # Signatures of outputs and of preserved submodules refer to nodes by name.
                rewritten.output.name = rewritten.site.node.name
            for site in sources:
                for value in (site.weight, site.bias):
                    if value is not None and value.root in self.specs and not value.root.users:
                        self._remove(value.root)
        old, signature = self.ep, self.ep.graph_signature
        program = ExportedProgram(
            root=old.graph_module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(
                input_specs=[self.specs[node] for node in placeholders(self.graph)],
                output_specs=[
                    dataclasses.replace(spec, arg=copy.copy(spec.arg))
                    for spec in signature.output_specs
                ],
            ),
            state_dict={
                name: tensor
                for name, tensor in self.tensors.items()
                if name in old.state_dict or name not in old.constants
            },
            range_constraints=dict(old.range_constraints),
            module_call_graph=copy.deepcopy(old.module_call_graph),
            example_inputs=old.example_inputs,
            constants={name: v for name, v in self.tensors.items() if name in old.constants},
            verifiers=list(old.verifiers),
        )
        program._guards_code = list(old._guards_code)
        return program

    def _remove(self, root: fx.Node) -> None:
        """Remove a placeholder and its tensor, under all its names."""
        for placeholder in (root, *(twin for twin in self._twins(root) if not twin.users)):
            names = self.own_names(placeholder)
            del self.specs[placeholder]
            self.graph.erase_node(placeholder)
        for name in names:
            self.tensors.pop(name, None)

    def _twins(self, root: fx.Node) -> list[fx.Node]:
        """The other placeholders of a tied weight. ``torch.export`` uses one of them."""
        memory = memory_of(self.old_tensor(root))
        return [
            node
            for node in self.names
            if node is not root
            and node in self.specs
            and memory_of(self.old_tensor(node)) == memory
        ]

    def own_names(self, root: fx.Node) -> list[str]:
        """The names of a placeholder's tensor, without those that another placeholder has."""
        others = {spec.target for node, spec in self.specs.items() if node is not root}
        aliases = self.aliases[memory_of(self.old_tensor(root))]
        return [alias for alias in aliases if alias not in others]

    def old_tensor(self, root: fx.Node) -> Tensor:
        """The tensor of a placeholder in the given program."""
        name = self.names[root]
        tensor: Tensor = self.ep.state_dict.get(name, self.ep.constants.get(name))
        return tensor
