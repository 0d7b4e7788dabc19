"""ONNX to ONNX: compress the linear layers of a file, for those who have nothing else.

What is a linear layer says :mod:`ss1_compile.onnx.finding`, and how it becomes one SS1 node
:mod:`ss1_compile.onnx.replacing`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ss1_compile.calibration.moments import InputStatistics, Moments
from ss1_compile.config import Quantization, SS1Config
from ss1_compile.errors import CalibrationError, ConfigError
from ss1_compile.onnx import layers as onnx_layers
from ss1_compile.onnx.files import ExternalData, check_target, publish, save_model, staging
from ss1_compile.onnx.finding import FoundLinear, find_linears
from ss1_compile.onnx.quantization import EIGHT_BITS, SEVEN_BITS, check_quantization, quantize
from ss1_compile.onnx.replacing import replace_layers, row_as_it_is, row_of
from ss1_compile.onnx.runner import Runner, to_torch
from ss1_compile.onnx.untrusted import read_model
from ss1_compile.report import Report

_OLDEST_OPSET = 18

Feeds = Mapping[str, "np.ndarray[Any, Any]"]


def compress_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: SS1Config | None = None,
    calibration: Iterable[Feeds] | None = None,
    *,
    quantization: Quantization | None = None,
    reduce_range: bool = True,
    form: onnx_layers.Form = "function",
    external_data: ExternalData = "auto",
    **options: Any,
) -> Report:
    """Compress the linear layers of an ONNX file into another.

    The file is not trusted (see :func:`ss1_compile.onnx.untrusted.read_model`). A model below opset
    18 is converted first. The new file is loaded by ONNX Runtime before it takes its name, and run
    on the first of the calibration feeds.

    Args:
        path: of the file.
        out: of the new one; may be the same.
        config: what to compress and how; or pass its fields as keywords. Layers are called after
            their node, or their weight if the node has no name.
        calibration: inputs of the file by name, a mapping per batch. With them layers get learned
            sketches, as ``config`` says; those that read one input share one. Without them weights
            are averaged, which ruins a pretrained model.
        quantization: see :func:`ss1_compile.export_onnx`.
        reduce_range: see :func:`ss1_compile.export_onnx`.
        form: see :func:`ss1_compile.export_onnx`.
        external_data: see :func:`ss1_compile.export_onnx`.
        **options: fields of :class:`SS1Config`, in place of ``config``.

    Returns:
        A row per linear layer.

    Raises:
        CheckpointError: the file is damaged or tampered with.
        ConfigError: bad options.
        CalibrationError: the feeds are empty, do not fit the file, or give values not finite.
        NothingToCompressError: no layer was compressed and ``allow_empty`` is off.
        VerificationError: ONNX Runtime cannot load or run the result. Nothing is written.
    """
    config = _config(config, options)
    check_quantization(quantization)
    if form not in onnx_layers.FORMS:
        raise ConfigError(f"form must be one of {list(onnx_layers.FORMS)}, got {form!r}")
    target = check_target(out, external_data)
    model = _modern(read_model(path))
    batches = None if calibration is None else list(calibration)
    if config.projection in ("calibrated", "learned") and batches is None:
        raise CalibrationError(f"projection={config.projection!r} needs calibration feeds")
    found = find_linears(model, config, calibrated=batches is not None)
    with staging(target) as stage:
        statistics = {} if batches is None else _calibrate(model, found, batches, stage)
        report = Report(replace_layers(model, found, config, statistics))
        report.require_some(config)
        report.warn_if_ruined(config.warn_error)
        onnx_layers.share_sketches(model)
        if quantization is not None:
            quantize(model, quantization, SEVEN_BITS if reduce_range else EIGHT_BITS)
        rows = [onnx_layers.describe(*node) for node in onnx_layers.ss1_nodes(model)]
        onnx_layers.record(model, rows, config)
        checked = stage / target.name
        if form == "custom":
            save_model(model, checked, external_data)
            checked = stage / f"bodies-{target.name}"
        onnx_layers.attach_functions(model)
        if form == "standard":
            onnx_layers.inline_functions(model)
        save_model(model, checked, external_data)
        runner = Runner(checked)
        if batches:
            runner.run_arrays(batches[0])
        publish(stage, target)
    return report


def estimate_onnx(
    path: str | os.PathLike[str], config: SS1Config | None = None, **options: Any
) -> Report:
    """What :func:`compress_onnx` would compress, with its sizes, without projecting or writing.

    Args:
        path: of the file.
        config: what to compress and how; or pass its fields as keywords.
        **options: fields of :class:`SS1Config`.

    Returns:
        A row per linear layer; ``bytes_after`` is what z, sketch and bias will take. Learned
        sketches (``projection="learned"``) are counted for each layer, shared or not.

    Raises:
        CheckpointError: the file is damaged or tampered with.
        ConfigError: bad options.
    """
    config = _config(config, options)
    report = Report()
    for layer in find_linears(read_model(path), config):
        row = row_as_it_is(layer)
        if layer.structure is not None:
            row = row_of(row, layer, layer.structure)
        report.layers.append(row)
    return report


def _config(config: SS1Config | None, options: Mapping[str, Any]) -> SS1Config:
    if config is not None and options:
        raise ConfigError(f"pass either config or options, not both ({', '.join(options)})")
    return config or SS1Config.from_dict(options)


def _modern(model: ir.Model) -> ir.Model:
    """The model at opset 18 or later, which the bodies need."""
    if int(model.graph.opset_imports.get("", 0)) >= _OLDEST_OPSET:
        return model
    from onnxscript import version_converter

    version_converter.convert_version(model, _OLDEST_OPSET, fallback=True)
    return model


# --- calibrating --------------------------------------------------------------------------------


def _calibrate(
    model: ir.Model, found: list[FoundLinear], batches: list[Feeds], stage: Path
) -> dict[ir.Value, InputStatistics]:
    """Run the model with the inputs of the chosen layers as further outputs."""
    if not batches:
        raise CalibrationError("the calibration data are empty; pass at least one mapping of feeds")
    chosen = {layer.x: layer for layer in found if layer.structure is not None}
    outputs = model.graph.outputs
    probed = [x for x in chosen if not x.is_graph_output() and not x.is_graph_input()]
    count = len(outputs)
    outputs.extend(probed)
    try:
        save_model(model, stage / "calibration.onnx")
    finally:
        del outputs[count:]
    names = [output.name or "" for output in [*outputs, *probed]]
    runner = Runner(stage / "calibration.onnx")
    moments: dict[ir.Value, Moments] = {}
    for feeds in batches:
        missing = [name for name in runner.inputs if name not in feeds]
        if missing or len(feeds) != len(runner.inputs):
            raise CalibrationError(
                f"the file takes {list(runner.inputs)}; the feeds have {list(feeds)}"
            )
        values: dict[str, Any] = {
            **feeds,
            **dict(zip(names, runner.run_arrays(feeds), strict=True)),
        }
        for x, layer in chosen.items():
            rows = to_torch(np.asarray(values[x.name or ""])).reshape(-1, layer.weight.shape[1])
            held = moments.setdefault(x, Moments(rows.shape[1], rows.device))
            held.absorb(rows, layer.name)
    return {x: held.finish() for x, held in moments.items() if held.count}
