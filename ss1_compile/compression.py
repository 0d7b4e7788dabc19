"""``compress``: swap the linear layers of a module for SS1 layers, in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ss1_compile.bare_parameters import bare_parameters
from ss1_compile.config import SS1Config
from ss1_compile.errors import CalibrationError, ConfigError, ProjectionError, UnhandledLinearError
from ss1_compile.experts import ExpertLinear, SS1ExpertLinear
from ss1_compile.learned import Structure
from ss1_compile.modules import SS1Linear, put_layer
from ss1_compile.quantized_projection import (
    check_quantizable,
    layer_of,
    missing_statistics,
    project_layer,
    report_of,
)
from ss1_compile.report import LayerReport, Report, tensor_bytes
from ss1_compile.stand_ins import stand_ins
from ss1_compile.statistics import Statistics, calibrate, execution_groups, rebind, statistics_of


@dataclass
class _Layer:
    """One linear module, perhaps registered under several names, and what becomes of it."""

    module: nn.Module
    names: list[str]
    structure: Structure | None = None
    reason: str | None = None
    by_choice: bool = False
    """Whether the configuration asked for it to stay dense."""
    row: LayerReport | None = None
    replacement: SS1Linear | SS1ExpertLinear | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.module.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        return cast("nn.Parameter | None", self.module.bias)

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"


def compress(
    model: nn.Module,
    config: SS1Config | None = None,
    calibration: Iterable[Any] | Statistics | None = None,
    *,
    structures: Mapping[str, Structure] | None = None,
    sequential: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    **options: Any,
) -> Report:
    """Replace linear layers by :class:`SS1Linear`, in place, freeing the dense weights.

    Handles ``nn.Linear``, Hugging Face's ``Conv1D`` and ``nn.MultiheadAttention``, which becomes an
    :class:`~ss1_compile.attention.SS1MultiheadAttention` with the layers ``q_proj``, ``k_proj``,
    ``v_proj`` and ``out_proj``; and the experts of Transformers' mixture-of-experts models
    (:class:`~ss1_compile.experts.SS1Experts`). The model is unchanged if anything fails.

    Args:
        model: any module; its dtype, devices, training mode and ``requires_grad`` are kept.
        config: what to compress and how; or pass the fields as keywords.
        calibration: batches of inputs (see :func:`calibrate`), or statistics collected earlier.
            Statistics already bound to the weights are used without it.
        structures: qualified name → structure, for weights that are known to have one (a healed
            model that was materialised, say): these are recovered exactly.
        sequential: collect the statistics of each layer from the already compressed prefix. Slower
            (one pass over the data per group of layers that share an input), and more accurate.
        dry_run: project and report, but leave the model as it is.
        progress: show progress bars.
        **options: fields of :class:`SS1Config`, in place of ``config``.

    Returns:
        A row per linear module, then one per parameter that may be a linear layer's weight but
        that no linear module holds (they stay dense); print it.

    Raises:
        ConfigError: bad options.
        CalibrationError: the calibration data are empty, not finite, or missing where needed.
        ProjectionError: a weight is not finite, or on the meta device.
        NothingToCompressError: no layer was compressed and ``allow_empty`` is off.
        UnhandledLinearError: ``strict`` is on and a layer cannot be handled.
    """
    if config is not None and options:
        raise ConfigError(f"pass either config or options, not both ({', '.join(options)})")
    config = config or SS1Config.from_dict(options)
    if isinstance(calibration, Statistics):
        calibration.bind(model)
    with stand_ins(model) as inside:
        layers = _find_layers(model, config, structures or {})
        chosen = [layer for layer in layers if layer.structure is not None]
        for layer in layers:
            if config.strict and layer.reason is not None and not layer.by_choice:
                raise UnhandledLinearError(f"{layer.name}: {layer.reason} (strict=True)")
        bare = bare_parameters(model, config, [layer.module for layer in layers])
        for parameter in bare:
            if config.strict and not parameter.by_choice:
                raise UnhandledLinearError(
                    f"{parameter.row.name}: {parameter.row.reason} (strict=True; exclude it if it "
                    f"is no linear layer's weight)"
                )
        _check(chosen, config, calibration, sequential)
        if sequential:
            _compress_sequentially(model, chosen, config, calibration, progress)
        else:
            if calibration is not None and not isinstance(calibration, Statistics) and chosen:
                names = [layer.weight_name for layer in chosen]
                calibrate(model, calibration, names=names, progress=progress)
            for layer in track(chosen, "projecting", disable=not progress, transient=True):
                _project(layer, config)
        report = _report(layers)
        report.layers += [parameter.row for parameter in bare]
        report.require_some(config)
        report.warn_if_ruined(config.warn_error)
        if not dry_run:
            for layer in chosen:
                _swap(model, layer)
            inside.keep()
    return report


# --- finding ------------------------------------------------------------------------------------


def _find_layers(
    model: nn.Module, config: SS1Config, structures: Mapping[str, Structure]
) -> list[_Layer]:
    by_module: dict[int, _Layer] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False):
            owner = f"{name}.{attribute}" if name else attribute
            if owner not in owners.setdefault(id(parameter), []):
                owners[id(parameter)].append(owner)
        if _is_linear_like(module):
            if not name:
                raise ConfigError(
                    f"the model is itself a {type(module).__name__}; wrap it in nn.Sequential so "
                    f"that it can be replaced"
                )
            by_module.setdefault(id(module), _Layer(module, [])).names.append(name)
    unknown = set(structures) - {name for layer in by_module.values() for name in layer.names}
    if unknown:
        raise ConfigError(f"structures names no linear layer of the model: {sorted(unknown)}")
    layers = list(by_module.values())
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in layers:
        reason = _unhandled(layer, modules)
        if reason is None:
            own = {f"{name}.weight" for name in layer.names}
            tied = [o for o in owners[id(layer.weight)] if o not in own]
            if tied:
                reason = f"the weight is tied to {tied[0]}"
        if reason is not None:
            layer.reason = reason
            continue
        n, k = _shape(layer)
        structure: Structure | str
        given = next((structures[name] for name in layer.names if name in structures), None)
        structure = given or config.structure_for(layer.name, k, n)
        if isinstance(structure, str):
            layer.reason, layer.by_choice = structure, True
        elif (structure.out_features, structure.in_features) != (n, k):
            raise ConfigError(
                f"{layer.name}: its structure is for {structure.out_features} × "
                f"{structure.in_features} and its weight is {n} × {k}"
            )
        else:
            layer.structure = structure
    return layers


def _is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's ``Conv1D`` (GPT-2): a linear layer whose weight is ``[K, N]``."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _computes_linear(module: nn.Linear) -> bool:
    """Whether ``forward`` is that of ``nn.Linear``, or known to compute the same (Falcon's)."""
    kind = type(module)
    falcon = (kind.__name__, kind.__module__.rpartition(".")[2]) == (
        "FalconLinear",
        "modeling_falcon",
    )
    return falcon or kind.forward is nn.Linear.forward


def _is_linear_like(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | ExpertLinear) or _is_conv1d(module)


def _shape(layer: _Layer) -> tuple[int, int]:
    """``(N, K)``."""
    rows, columns = _matrices(layer).shape[-2:]
    return int(rows), int(columns)


def _matrices(layer: _Layer) -> Tensor:
    """``[N, K]``, or ``[E, N, K]`` of experts."""
    if isinstance(layer.module, ExpertLinear):
        return layer.module.matrices
    return layer.weight.t() if _is_conv1d(layer.module) else layer.weight


def _unhandled(layer: _Layer, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the module cannot be swapped, or ``None`` if it can."""
    module = layer.module
    if isinstance(module, nn.Linear) and not _computes_linear(module):
        return f"{type(module).__name__} overrides forward"
    if "forward" in vars(module):
        return "its forward was replaced (by accelerate, say): compress before dispatching"
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "the weight is parametrised (weight norm, LoRA, ...): merge it first"
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)):
        return "the module has hooks, which a replacement would lose"
    dims = 3 if isinstance(module, ExpertLinear) else 2
    if layer.weight.dim() != dims or not layer.weight.is_floating_point():
        return f"the weight is {layer.weight.dtype} {list(layer.weight.shape)}"
    for name in layer.names:
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            return f"{type(parent).__name__} reads its weight directly in a fused operator"
    return None


def _check(
    chosen: list[_Layer],
    config: SS1Config,
    calibration: Iterable[Any] | Statistics | None,
    sequential: bool,
) -> None:
    for layer in chosen:
        if layer.weight.is_meta:
            raise ProjectionError(
                f"{layer.name} is on the meta device and has no values to project; load the dense "
                f"weights first, or load a compressed checkpoint with ss1_compile.load"
            )
        quantization = config.quantization_for(layer.name)
        if quantization is not None and layer.structure is not None:
            check_quantizable(_matrices(layer), layer.structure, quantization, layer.name)
            missing = calibration is None and statistics_of(layer.weight) is None
            if quantization.rounding == "calibrated" and missing:
                raise CalibrationError(missing_statistics(layer.name))
    if sequential and (calibration is None or isinstance(calibration, Statistics)):
        raise CalibrationError(
            "sequential=True runs the model on the calibration batches layer by layer; pass them"
        )
    if config.projection == "calibrated" and calibration is None:
        missing = [x.name for x in chosen if statistics_of(x.weight) is None]
        if missing:
            raise CalibrationError(
                f"projection='calibrated' and no input statistics for {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; pass "
                f"calibration=..., or run ss1_compile.calibrate(model, data) first"
            )


# --- projecting ---------------------------------------------------------------------------------


def _project(layer: _Layer, config: SS1Config) -> None:
    """Make the layer's replacement and its row of the report."""
    assert layer.structure is not None
    module = layer.module
    statistics = statistics_of(layer.weight)
    before = tensor_bytes([layer.weight, layer.bias])
    row = _row(layer, before)
    if config.projection == "calibrated" and statistics is None:
        reason = "the calibration data never reached it"
        layer.row, layer.reason = replace(row, reason=reason), reason
        return
    projection = project_layer(
        _matrices(layer).detach(),
        layer.structure,
        None if layer.bias is None else layer.bias.detach(),
        quantization=config.quantization_for(layer.name),
        statistics=statistics,
        method=config.projection,
        damping=config.damping,
        name=layer.name,
    )
    row = replace(
        row,
        error=projection.error,
        error_of=projection.error_of,
        projection=projection.method,
    )
    if config.max_error is not None and projection.error > config.max_error:
        layer.reason = (
            f"relative error {projection.error:.3f} exceeds max_error = {config.max_error}"
        )
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


def _compress_sequentially(
    model: nn.Module, chosen: list[_Layer], config: SS1Config, data: Any, progress: bool
) -> None:
    """Project group by group in order of execution, each on the compressed prefix's inputs."""
    batches = list(data)
    if not batches:
        raise CalibrationError("the calibration data are empty")
    by_name = {layer.weight_name: layer for layer in chosen}
    groups: list[list[str]] = []
    unreached = list(by_name)
    for batch in batches:  # the first batch reaches everything, but for experts and the like
        groups += execution_groups(model, batch, unreached) if unreached else []
        reached = {name for group in groups for name in group}
        unreached = [name for name in unreached if name not in reached]
    with _restored(model, chosen):
        for group in track(groups, "compressing", disable=not progress, transient=True):
            calibrate(model, batches, names=group, progress=False)
            for name in group:
                _project(by_name[name], config)
            for name in group:
                _swap(model, by_name[name])
        for name in unreached:
            _project(by_name[name], config)


@contextlib.contextmanager
def _restored(model: nn.Module, layers: list[_Layer]) -> Iterator[None]:
    """Put the dense modules back on leaving: nothing is final until everything has succeeded.

    Their earlier statistics come back too: those of a compressed prefix are of no use to a weight
    that stays dense.
    """
    before = [statistics_of(layer.weight) for layer in layers]
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    activations = [encoder.activation_relu_or_gelu for encoder in encoders]
    try:
        yield
    finally:
        for layer, statistics in zip(layers, before, strict=True):
            rebind(layer.weight, statistics)
            for name in layer.names:
                model.set_submodule(name, layer.module)
        for encoder, activation in zip(encoders, activations, strict=True):
            encoder.activation_relu_or_gelu = activation


def _swap(model: nn.Module, layer: _Layer) -> None:
    if layer.replacement is not None:
        for name in layer.names:
            put_layer(model, name, layer.replacement)


# --- reporting ----------------------------------------------------------------------------------


def _row(layer: _Layer, size: int) -> LayerReport:
    return LayerReport(
        name=layer.name,
        op=type(layer.module).__name__,
        shape=_shape(layer) if layer.weight.dim() in (2, 3) else None,
        bytes_before=size,
        bytes_after=size,
        reason=layer.reason,
    )


def _report(layers: list[_Layer]) -> Report:
    report = Report()
    for layer in layers:
        if layer.row is None:
            layer.row = _row(layer, tensor_bytes([layer.weight, layer.bias]))
        report.layers.append(layer.row)
    return report


def compile(
    model: nn.Module,
    config: SS1Config | None = None,
    calibration: Iterable[Any] | Statistics | None = None,
    *,
    sequential: bool = False,
    progress: bool = True,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    report: Report | None = None,
) -> nn.Module:
    """:func:`compress` in place, then ``torch.compile(model, backend="ss1")``.

    Args:
        model: see :func:`compress`.
        config: see :func:`compress`.
        calibration: see :func:`compress`.
        sequential: see :func:`compress`.
        progress: see :func:`compress`.
        mode: see ``torch.compile``.
        dynamic: see ``torch.compile``.
        fullgraph: see ``torch.compile``.
        report: receives the rows of the compression report; once the model has run, they say what
            was fused around each layer.

    Returns:
        The compiled module. It shares its parameters with ``model``.

    Raises:
        SS1Error: as :func:`compress`.
    """
    config = config or SS1Config()
    rows = compress(model, config, calibration, sequential=sequential, progress=progress)
    if report is not None:
        for row in rows:
            report.record(row)
    # What compress left dense it left for a reason: the backend sees nothing but SS1 layers.
    options: dict[str, Any] = {"include": (), "allow_empty": True}
    if mode is not None:
        options["mode"] = mode
    if report is not None:
        options["report"] = report
    compiled = torch.compile(
        model, backend="ss1", dynamic=dynamic, fullgraph=fullgraph, options=options
    )
    return cast(nn.Module, compiled)
