"""The linear layers of an ONNX graph become SS1 nodes, projected onto their structures.

Layers that read the same value (q, k and v) get one learned sketch in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir
import torch

from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.config import SS1Config
from ss1_compile.learned import LearnedStructure, Structure
from ss1_compile.onnx import layers as onnx_layers
from ss1_compile.onnx.finding import FoundLinear
from ss1_compile.onnx.operators import DOMAIN, VERSION, Operator
from ss1_compile.onnx.runner import to_numpy
from ss1_compile.projection.project import Projection, check_finite, project
from ss1_compile.projection.shared_sketch import SharedSketch, fit_sketch
from ss1_compile.report import LayerReport


def replace_layers(
    model: ir.Model,
    found: Sequence[FoundLinear],
    config: SS1Config,
    statistics: Mapping[ir.Value, InputStatistics],
) -> list[LayerReport]:
    """Project the layers that have structures and put SS1 nodes in their places.

    Args:
        model: that has the layers, changed in place.
        found: its linear layers.
        config: how to project.
        statistics: of the values that layers read; empty without calibration.

    Returns:
        A row per layer, in the order of ``found``.

    Raises:
        ProjectionError: a weight cannot be projected; the layer is named.
    """
    sharing: dict[object, list[FoundLinear]] = {}
    for layer in found:
        key = _sharing_key(layer, config, statistics)
        if key is not None:
            sharing.setdefault(key, []).append(layer)
    rows: dict[FoundLinear, LayerReport] = {}
    for together in sharing.values():
        rows.update(_replace_sharing(model, together, config, statistics[together[0].x]))
    for layer in found:
        if layer not in rows:
            rows[layer] = _replace(model, layer, config, statistics.get(layer.x))
    return [rows[layer] for layer in found]


def row_as_it_is(layer: FoundLinear) -> LayerReport:
    """The row of a layer that stays dense."""
    n, k = layer.weight.shape
    size = layer.bytes
    return LayerReport(layer.name, layer.node.op_type, (n, k), size, size, reason=layer.reason)


def row_of(row: LayerReport, layer: FoundLinear, structure: Structure) -> LayerReport:
    """The row with the bytes of z, sketch and bias."""
    element = layer.weight.element_size()
    after = element * structure.out_features * structure.reduced_features
    if isinstance(structure, LearnedStructure):
        after += element * torch.Size(structure.sketch_shape).numel()
    else:
        after += structure.code.numel() * structure.code.element_size()
    after += 0 if layer.bias is None else layer.bias.numel() * element
    return replace(row, bytes_after=after, reduction=structure.reduction)


def _sharing_key(
    layer: FoundLinear, config: SS1Config, statistics: Mapping[ir.Value, InputStatistics]
) -> object:
    """Equal for layers whose learned sketches are fitted together, ``None`` if it has none."""
    structure = layer.structure
    if not isinstance(structure, LearnedStructure) or layer.x not in statistics:
        return None
    if structure.num_hashes > 1:
        return None
    if not config.share_sketches:
        return id(layer)
    n, k = layer.weight.shape
    reduction = config.reduction_for(layer.name, k, n)
    return id(layer.x), reduction, layer.weight.dtype, layer.bias is None


def _replace_sharing(
    model: ir.Model, layers: list[FoundLinear], config: SS1Config, statistics: InputStatistics
) -> dict[FoundLinear, LayerReport]:
    first = layers[0]
    n, k = first.weight.shape
    reduction = config.reduction_for(first.name, k, n)
    assert not isinstance(reduction, str)  # it has a structure
    for layer in layers:
        check_finite(layer.weight, "weight", layer.name)
    shared = fit_sketch(
        [layer.weight for layer in layers],
        statistics,
        reduction,
        centred=first.bias is not None,
        group_size=config.group_size,
        damping=config.damping,
        asymmetry=config.asymmetry,
        name=first.name,
    )
    rows = {layer: _replace(model, layer, config, statistics, shared) for layer in layers}
    replaced = [layer for layer, row in rows.items() if row.compressed]
    height = sum(layer.weight.shape[0] for layer in replaced)
    for layer in replaced:
        row, (n, k) = rows[layer], layer.weight.shape
        part = n / height
        own = n * shared.structure(layer.weight).reduced_features + shared.blocks.numel() * part
        stored = row.bytes_after
        if layer is not replaced[0]:  # the initializer is the first one's
            stored -= shared.blocks.numel() * shared.blocks.element_size()
        rows[layer] = replace(row, reduction=n * k / own, bytes_after=stored)
    return rows


def _replace(
    model: ir.Model,
    layer: FoundLinear,
    config: SS1Config,
    statistics: InputStatistics | None,
    shared: SharedSketch | None = None,
) -> LayerReport:
    row = row_as_it_is(layer)
    structure = layer.structure if shared is None else shared.structure(layer.weight)
    if structure is None:
        return row
    learned = isinstance(structure, LearnedStructure)
    if statistics is None and (learned or config.projection == "calibrated"):
        return replace(row, reason="the calibration data never reached it")
    projection = project(
        layer.weight,
        structure,
        layer.bias,
        statistics=statistics,
        method=config.projection,
        damping=config.damping if shared is None else shared.damping,
        asymmetry=config.asymmetry if shared is None else shared.asymmetry,
        sketch=None if shared is None else shared.blocks,
        name=layer.name,
    )
    row = replace(
        row,
        error=projection.error,
        error_of=projection.error_of,
        projection=projection.method,
    )
    reason = config.why_too_lossy(projection.error)
    if reason is not None:
        return replace(row, reason=reason)
    _put_node(model, layer, structure, projection)
    return row_of(row, layer, structure)


def _put_node(
    model: ir.Model, layer: FoundLinear, structure: Structure, projection: Projection
) -> None:
    """One SS1 node for the layer's, and the weights that nothing reads any more removed."""
    bias = torch.zeros((), dtype=layer.weight.dtype) if layer.bias is None else projection.bias
    assert bias is not None
    operands = {"sketch": projection.sketch, "z": projection.z, "bias": bias}
    values = [
        onnx_layers.add_initializer(model, f"{layer.name}.{which}", to_numpy(tensor))
        for which, tensor in operands.items()
    ]
    new = ir.Node(
        DOMAIN,
        Operator(structure.kind).name,
        [layer.x, *values],
        onnx_layers.attributes_of(structure),
        version=VERSION,
        name=layer.name,
    )
    last = layer.add or layer.node
    onnx_layers.copy_output(last.outputs[0], new.outputs[0])
    old = [node for node in (layer.add, layer.node) if node is not None]
    dropped = [value for node in old for value in node.inputs]
    graph = layer.node.graph
    assert graph is not None
    ir.convenience.replace_nodes_and_values(
        graph, last, old, [new], [last.outputs[0]], [new.outputs[0]]
    )
    for value in dropped:
        onnx_layers.drop_unused(model, value)
