"""``compress``: swap the linear layers of a module for SS1 layers, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from rich.progress import track
from torch import nn

from ss1_compile.calibration.sequential import SequentialCalibration, swap
from ss1_compile.calibration.statistics import Statistics, calibrate, statistics_of
from ss1_compile.compression.bare_parameters import bare_parameters
from ss1_compile.compression.layers import Layer, find_layers
from ss1_compile.compression.refitting import refit, refitted_layers
from ss1_compile.compression.replacing import by_input, find_replacements
from ss1_compile.compression.settled import settle
from ss1_compile.compression.stand_ins import stand_ins
from ss1_compile.config import SS1Config
from ss1_compile.errors import CalibrationError, ConfigError, ProjectionError, UnhandledLinearError
from ss1_compile.learned import Structure
from ss1_compile.quantization.projection import (
    check_quantizable,
    missing_statistics,
)
from ss1_compile.report import Report


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
    """Replace linear layers by SS1 layers, in place, freeing the dense weights.

    Handles ``nn.Linear``, Hugging Face's ``Conv1D`` and ``nn.MultiheadAttention``, which becomes an
    :class:`~ss1_compile.compression.attention.SS1MultiheadAttention` with the layers ``q_proj``,
    ``k_proj``, ``v_proj`` and ``out_proj``; and the experts of Transformers' mixture-of-experts
    models (:class:`~ss1_compile.experts.SS1Experts`). The model is unchanged if anything fails.

    Args:
        model: any module; its dtype, devices, training mode and ``requires_grad`` are kept.
        config: what to compress and how; or pass the fields as keywords.
        calibration: batches of inputs (see :func:`calibrate`), or statistics collected earlier.
            Statistics already bound to the weights are used without it.
        structures: qualified name → structure, for weights that are known to have one (a healed
            model that was materialised, say): these are recovered exactly.
        sequential: collect the statistics of each layer from the already compressed prefix, and
            fit it towards the outputs of the *dense* model (``config.asymmetry``). More accurate,
            and slower: every block of a stack is run a few times, dense and compressed, on inputs
            that are kept in memory; a model without such a stack is run as a whole per group of
            layers that share an input. ``calibration`` must be batches then; more of them go on
            helping for longer than without (docs/quality.md).
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
        layers = find_layers(model, config, structures or {}, calibrated=calibration is not None)
        chosen = [layer for layer in layers if layer.structure is not None]
        refitted: list[Layer] = []
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
        _check(chosen, config, calibration)
        if sequential:
            if calibration is None or isinstance(calibration, Statistics):
                raise CalibrationError(
                    "sequential=True runs the model on the calibration batches layer by layer; "
                    "pass them"
                )
            stood_in = [member.module for member in inside.members]
            refitted = refitted_layers(layers, config, stood_in)
            unweighed = _compress_sequentially(
                model, chosen, refitted, config, calibration, progress
            )
        else:
            unweighed = None
            if calibration is not None and not isinstance(calibration, Statistics) and chosen:
                names = [layer.weight_name for layer in chosen]
                collected = calibrate(
                    model,
                    calibration,
                    names=names,
                    held_out=config.damping == "auto",
                    weigh_outputs=_weighed(chosen, config),
                    progress=progress,
                )
                unweighed = collected.unweighed
            groups = by_input(((x, statistics_of(x.weight)) for x in chosen), config)
            for group in track(groups, "projecting", disable=not progress, transient=True):
                find_replacements(group, config)
        report = _report(layers)
        if unweighed is not None:
            report.notes.append(f"outputs counted alike: {unweighed}")
        report.layers += [parameter.row for parameter in bare]
        report.require_some(config)
        report.warn_if_ruined(config.warn_error)
        if not dry_run:
            for layer in (*chosen, *refitted):
                swap(model, layer)
            inside.keep()
            settle(model)
    return report


def _check(
    chosen: list[Layer], config: SS1Config, calibration: Iterable[Any] | Statistics | None
) -> None:
    for layer in chosen:
        if layer.weight.is_meta:
            raise ProjectionError(
                f"{layer.name} is on the meta device and has no values to project; load the dense "
                f"weights first, or load a compressed checkpoint with ss1_compile.load"
            )
        quantization = config.quantization_for(layer.name)
        if quantization is not None and layer.structure is not None:
            check_quantizable(layer.matrices, layer.structure, quantization, layer.name)
            missing = calibration is None and statistics_of(layer.weight) is None
            if quantization.rounding == "calibrated" and missing:
                raise CalibrationError(missing_statistics(layer.name))
    if config.projection == "calibrated" and calibration is None:
        without = [x.name for x in chosen if statistics_of(x.weight) is None]
        if without:
            raise CalibrationError(
                f"projection='calibrated' and no input statistics for {without[0]}"
                f"{f' and {len(without) - 1} more' if len(without) > 1 else ''}; pass "
                f"calibration=..., or run ss1_compile.calibrate(model, data) first"
            )


def _compress_sequentially(
    model: nn.Module,
    chosen: list[Layer],
    refitted: list[Layer],
    config: SS1Config,
    data: Iterable[Any],
    progress: bool,
) -> str | None:
    """Project group by group in order of execution, each on the compressed prefix's inputs.

    Returns:
        Why outputs could not be weighed although the configuration wants it, or ``None``.
    """
    if not chosen:
        return None
    walk = SequentialCalibration(
        model,
        [*chosen, *refitted],
        data,
        paired=config.asymmetry != 0 and config.projection != "average",
        held_out=config.asymmetry == "auto" or config.damping == "auto",
        weigh_outputs=_weighed(chosen, config),
    )
    with walk:
        for group in walk.groups(progress):
            known = [pair for pair in group if pair[0].structure is not None]
            for together in by_input(known, config):
                find_replacements(together, config)
            for layer, statistics in group:
                if layer.structure is None:
                    refit(layer, statistics, config)
    return walk.unweighed


def _weighed(chosen: list[Layer], config: SS1Config) -> bool:
    """Whether gradients are wanted: learned sketches alone can use them."""
    learned = any(layer.structure and layer.structure.kind == "learned" for layer in chosen)
    return config.weigh_outputs and learned


def _report(layers: list[Layer]) -> Report:
    report = Report()
    for layer in layers:
        report.layers.append(layer.row or layer.row_as_it_is())
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
    options: dict[str, Any] = {}  # none of the compression's: what is dense now stays dense
    if mode is not None:
        options["mode"] = mode
    if report is not None:
        options["report"] = report
    compiled = torch.compile(
        model, backend="ss1", dynamic=dynamic, fullgraph=fullgraph, options=options
    )
    return cast(nn.Module, compiled)
