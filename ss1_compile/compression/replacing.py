"""What takes the place of the layers that read one input, and their rows of the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.compression.layers import Layer
from ss1_compile.config import SS1Config
from ss1_compile.experts import ExpertLinear, SS1ExpertLinear
from ss1_compile.learned import LearnedStructure
from ss1_compile.modules import SS1Linear
from ss1_compile.projection.learned_fit import SWEEPS
from ss1_compile.projection.project import Projection, check_finite
from ss1_compile.projection.shared_sketch import SharedSketch, fit_sketch
from ss1_compile.quantization.balancing import balance
from ss1_compile.quantization.projection import layer_of, project_layer, report_of
from ss1_compile.report import tensor_bytes

Known = tuple[Layer, InputStatistics | None]
"""A layer with the statistics of its input."""


def by_input(layers: Iterable[Known], config: SS1Config) -> list[list[Known]]:
    """The layers grouped by equal input, without gradients that the configuration does not want."""
    groups: dict[int, list[Known]] = {}
    for layer, statistics in layers:
        key = id(layer) if statistics is None else statistics.of_inputs
        if statistics is not None and not config.weigh_outputs:
            statistics = replace(statistics, gradients=None)
        groups.setdefault(key, []).append((layer, statistics))
    return list(groups.values())


def find_replacements(layers: Sequence[Known], config: SS1Config, *, sweeps: int = SWEEPS) -> None:
    """Project layers that read the same input: fill in ``replacement``, ``row`` and ``reason``.

    Learned sketches are fitted together and shared if the configuration says so.

    Args:
        layers: with structures, and with statistics that differ in their gradients at most.
        config: says how.
        sweeps: of the fit of a learned sketch of one hash, at most.

    Raises:
        ProjectionError: a weight cannot be projected; the layer is named.
    """
    sharing: dict[object, list[Known]] = {}
    for layer, statistics in layers:
        key = _sharing_key(layer, config, statistics)
        sharing.setdefault(key, []).append((layer, statistics))
    for key, together in sharing.items():
        if key is None:
            for layer, statistics in together:
                _find_replacement(layer, config, statistics)
        else:
            for members in [together] if config.share_sketches else [[x] for x in together]:
                _find_shared(members, config, sweeps)


def _sharing_key(layer: Layer, config: SS1Config, statistics: InputStatistics | None) -> object:
    """What layers with a sketch in common have in common; ``None`` if its sketch is its own.

    Experts share blocks already, and blocks of their own for each of J column blocks are wanted
    for themselves.
    """
    structure = layer.structure
    free = isinstance(structure, LearnedStructure) and structure.num_hashes == 1
    if statistics is None or not free or layer.given or isinstance(layer.module, ExpertLinear):
        return None
    weight = layer.weight
    reduction = config.reduction_for(layer.name, *reversed(layer.shape))
    return reduction, weight.dtype, weight.device, layer.bias is None


def _find_shared(members: Sequence[Known], config: SS1Config, sweeps: int) -> None:
    layers = [layer for layer, _ in members]
    first, statistics = members[0]
    assert statistics is not None
    gradients = [s.gradients for _, s in members if s is not None and s.gradients is not None]
    reduction = config.reduction_for(first.name, *reversed(first.shape))
    assert not isinstance(reduction, str)
    for layer in layers:
        check_finite(layer.matrices.detach(), "weight", layer.name)
    shared = fit_sketch(
        [layer.matrices.detach() for layer in layers],
        statistics,
        reduction,
        centred=first.bias is not None,
        gradients=gradients if len(gradients) == len(members) else None,
        group_size=config.group_size,
        damping=config.damping,
        asymmetry=config.asymmetry,
        sweeps=sweeps,
        name=first.name,
    )
    for layer in layers:
        layer.structure = shared.structure(layer.matrices)
    if any(config.quantization_for(layer.name) is not None for layer in layers):
        plain = [_project(layer, config, statistics, shared, quantized=False) for layer in layers]
        blocks, _ = balance([p.z for p in plain], shared.blocks, statistics.second_moment)
        shared = replace(shared, blocks=blocks)
    for layer, known in members:
        _find_replacement(layer, config, known, shared)
    replaced = [layer for layer in layers if isinstance(layer.replacement, SS1Linear)]
    for layer in replaced:
        assert isinstance(layer.replacement, SS1Linear)
        assert isinstance(replaced[0].replacement, SS1Linear)
        assert layer.row is not None
        layer.replacement.sketch = replaced[0].replacement.sketch
        part = layer.shape[0] / sum(other.shape[0] for other in replaced)
        own = layer.replacement.z.numel() + shared.blocks.numel() * part
        stored = layer.row.bytes_after
        if layer is not replaced[0]:
            stored -= tensor_bytes([layer.replacement.sketch])
        layer.row = replace(layer.row, reduction=layer.weight.numel() / own, bytes_after=stored)


def _find_replacement(
    layer: Layer,
    config: SS1Config,
    statistics: InputStatistics | None,
    shared: SharedSketch | None = None,
) -> None:
    assert layer.structure is not None
    module = layer.module
    row = layer.row_as_it_is()
    if config.projection == "calibrated" and statistics is None:
        reason = "the calibration data never reached it"
        layer.row, layer.reason = replace(row, reason=reason), reason
        return
    projection = _project(layer, config, statistics, shared)
    row = replace(
        row,
        error=projection.error,
        error_of=projection.error_of,
        projection=projection.method,
    )
    layer.reason = config.why_too_lossy(projection.error)
    if layer.reason is not None:
        layer.row = replace(row, reason=layer.reason)
        return
    trained = layer.weight.requires_grad
    bias: nn.Parameter | None = None
    replacement: SS1Linear | SS1ExpertLinear
    sketch = projection.sketch if layer.structure.kind == "learned" else None
    if isinstance(module, ExpertLinear):
        z = nn.Parameter(projection.z, trained)
        replacement = SS1ExpertLinear(layer.structure, z, sketch)
    else:
        if projection.bias is not None and layer.bias is not None:
            bias = nn.Parameter(projection.bias, layer.bias.requires_grad)
        replacement = layer_of(projection, layer.structure, bias, trained, layer.weight.dtype)
    layer.replacement = replacement.train(module.training)
    scale = getattr(replacement, "scale", None)
    after = tensor_bytes([replacement.z, scale, bias, replacement.sketch])
    layer.row = replace(
        row,
        bytes_after=after,
        reduction=layer.structure.reduction,
        **report_of(projection),
    )


def _project(
    layer: Layer,
    config: SS1Config,
    statistics: InputStatistics | None,
    shared: SharedSketch | None,
    *,
    quantized: bool = True,
) -> Projection:
    """The projection of a layer with a structure, its z rounded if that is asked for."""
    assert layer.structure is not None
    return project_layer(
        layer.matrices.detach(),
        layer.structure,
        None if layer.bias is None else layer.bias.detach(),
        quantization=config.quantization_for(layer.name) if quantized else None,
        statistics=statistics,
        method=config.projection,
        damping=config.damping if shared is None else shared.damping,
        asymmetry=config.asymmetry if shared is None else shared.asymmetry,
        sketch=None if shared is None else shared.blocks,
        name=layer.name,
    )
