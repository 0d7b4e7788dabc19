"""What becomes of each linear layer of a graph, and its row of the report.

Shared by the doors that work on graphs (:mod:`ss1_compile.backend`, :mod:`ss1_compile.export`), so
that a configuration means the same in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ss1_compile.config import SS1Config
from ss1_compile.errors import ConfigError, UnhandledLinearError
from ss1_compile.kernels import cuda
from ss1_compile.kernels.lowering import Choice
from ss1_compile.learned import Structure
from ss1_compile.passes import Site, Skipped
from ss1_compile.passes.frozen import example
from ss1_compile.projection.project import Projection
from ss1_compile.quantization.projection import QuantizedProjection, report_of
from ss1_compile.report import LayerReport, Report, tensor_bytes


@dataclass
class Decisions:
    """Decides site by site and keeps the report.

    Attributes:
        config: the compression.
        structures: name → structure, for weights that are known to have one.
        report: a row per site and skipped node, in the order they were decided.
    """

    config: SS1Config
    structures: Mapping[str, Structure] = field(default_factory=dict)
    report: Report = field(default_factory=Report)

    def structure(self, site: Site, name: str, calibrated: bool) -> Structure | None:
        """The structure of a site; ``None`` (and a row) if the configuration leaves it dense.

        ``calibrated`` says that there are statistics of its inputs.

        Raises:
            ConfigError: the structure given for ``name`` does not fit the weight.
        """
        n, k = site.shape
        structure = self.structures.get(name) or self.config.structure_for(
            name, k, n, calibrated=calibrated
        )
        if isinstance(structure, str):
            self._row(site, name, reason=structure)
            return None
        if (structure.out_features, structure.in_features) != (n, k):
            raise ConfigError(
                f"{name}: its structure is for {structure.out_features} × "
                f"{structure.in_features} and its weight is {n} × {k}"
            )
        return structure

    def accept(self, site: Site, name: str, structure: Structure, projection: Projection) -> bool:
        """Whether the projection is good enough (``max_error``). Adds the site's row."""
        reason = self.config.why_too_lossy(projection.error)
        if reason is not None:
            self._row(site, name, reason=reason, projection=projection)
            return False
        self._row(site, name, projection=projection, structure=structure)
        return True

    def leave(self, entry: Site | Skipped, name: str, reason: str) -> None:
        """Leave a linear dense that cannot be handled, with a row.

        Raises:
            UnhandledLinearError: ``strict`` is on, and the configuration does not leave the layer
                dense anyway.
        """
        weight = _value(entry.weight.node) if entry.weight else None
        shape = tuple(weight.shape) if weight is not None and weight.dim() == 2 else (2**62, 2**62)
        choice = self.config.reduction_for(name, *reversed(shape))
        if isinstance(choice, str):
            self._row(entry, name, reason=choice)
            return
        if self.config.strict:
            raise UnhandledLinearError(f"{name}: {reason} (strict=True)")
        self._row(entry, name, reason=reason)

    def _row(
        self,
        entry: Site | Skipped,
        name: str,
        *,
        reason: str | None = None,
        projection: Projection | None = None,
        structure: Structure | None = None,
    ) -> None:
        weight = _value(entry.weight.node) if entry.weight else None
        bias = _value(entry.bias.node) if isinstance(entry, Site) and entry.bias else None
        before = after = tensor_bytes([weight, bias])
        choice: Choice | None = None
        if projection is not None and structure is not None:
            scale = projection.scale if isinstance(projection, QuantizedProjection) else None
            after = tensor_bytes([projection.z, scale, bias, projection.sketch])
            choice = _expected(entry, structure, projection)
        shape: tuple[int, int] | None = None
        if isinstance(entry, Site):
            shape = entry.shape
        elif weight is not None and weight.dim() == 2:
            shape = (weight.shape[0], weight.shape[1])
        self.report.layers.append(
            LayerReport(
                name=name,
                op=operator_name(entry.node),
                shape=shape,
                bytes_before=before,
                bytes_after=after,
                reduction=structure.reduction if structure else None,
                error=projection.error if projection else None,
                error_of=projection.error_of if projection else None,
                projection=projection.method if projection else None,
                **(report_of(projection) if projection and structure else {}),
                reason=reason,
                lowering=choice.lowering if choice else None,
                speedup=choice.speedup if choice else None,
            )
        )


def in_order(
    graph: fx.Graph, sites: Iterable[Site], skipped: Iterable[Skipped]
) -> list[Site | Skipped]:
    """Sites and skipped nodes in the order of the graph."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: list[Site | Skipped] = [*sites, *skipped]
    return sorted(found, key=lambda entry: order[entry.node])


def operator_name(node: fx.Node) -> str:
    """The name of the node's operator, for people."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket)
    return getattr(node.target, "__name__", str(node.target))


def _expected(entry: Site | Skipped, structure: Structure, projection: Projection) -> Choice | None:
    """What a GPU will run for the site; symbolic sizes count as in the example inputs."""
    x = _value(entry.operands.x) if isinstance(entry, Site) else None
    if x is None or not projection.z.is_cuda or projection.z.dim() != 2:
        return None
    if isinstance(projection, QuantizedProjection):  # the table is of floating z
        return None
    sizes = [size if isinstance(size, int) else size.node.hint for size in x.shape]
    if None in sizes:
        return None
    rows = math.prod(sizes) // structure.in_features
    bias = projection.bias if isinstance(entry, Site) and entry.bias else None
    return cuda.expected(rows, structure.in_features, projection.sketch, projection.z, bias)


def _value(node: fx.Node) -> Any:
    value = example(node)
    return value if isinstance(value, Tensor) else None
