"""``export_onnx``: a compressed PyTorch model as one ONNX file."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.export import ExportedProgram

from ss1_compile.config import Quantization, SS1Config
from ss1_compile.errors import CheckpointError, ConfigError, ExportError
from ss1_compile.onnx import layers as onnx_layers
from ss1_compile.onnx.files import ExternalData, check_target, publish, save_model, staging
from ss1_compile.onnx.layers import FORMS, Form
from ss1_compile.onnx.operators import register_schemas
from ss1_compile.onnx.quantization import EIGHT_BITS, SEVEN_BITS, check_quantization, quantize
from ss1_compile.onnx.surroundings import tune_for_cpu
from ss1_compile.onnx.translation import onnx_translation_table
from ss1_compile.onnx.verification import ExportReport, verify_export

OPSETS = range(18, 26)


def export_onnx(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    form: Form = "function",
    opset: int = 20,
    dynamic_shapes: Any = None,
    external_data: ExternalData = "auto",
    verify: bool = True,
    tolerance: float | None = None,
    quantization: Quantization | None = None,
    reduce_range: bool = True,
    tune_for: Literal["cpu"] | None = "cpu",
    config: SS1Config | None = None,
    dense: str | os.PathLike[str] | None = None,
) -> ExportReport:
    """Export a compressed model to ONNX and check the file against PyTorch.

    The file appears under ``path`` only after it has passed the check.

    Args:
        model: a module with SS1 layers in eval mode, or a program that has ``ss1::linear`` (see
            :func:`ss1_compile.compress_exported`).
        args: example inputs: a tuple of positional, or a mapping of keyword arguments.
        path: of the ``.onnx`` file. External data go beside it, to ``<name>.data``.
        form: ``"function"``: a node per layer, with its body as a local function, so that any
            runtime runs the file and one that has a kernel for the operator uses it.
            ``"standard"``: standard operators only, for tools that know no local functions.
            ``"custom"``: nodes without bodies, for runtimes that have the kernels.
        opset: 18 … 25. From 23 on attention is one operator, which ONNX Runtime runs faster than
            its parts; older runtimes and some converters do not know it.
        dynamic_shapes: as ``torch.export.export`` takes them; not with an ``ExportedProgram``.
        external_data: whether weights go to a file of their own. ``"auto"``: if they would not fit
            one file (2 GiB).
        verify: run the file in ONNX Runtime on several sizes of its dynamic dimensions and compare
            it with PyTorch (see :class:`ExportReport`).
        tolerance: relative error ``‖Δy‖ / ‖y‖`` of an output up to which the file passes; ``None``
            means 1e-5 in float32 and float64, 5e-3 in float16, 4e-2 in bfloat16 and 1e-2 with
            quantised activations.
        quantization: ``"int8_weight_only"`` or ``"int8_dynamic"``: store z as int8 with a scale per
            row. Dynamic also quantises the sketched input, per tensor: an output then depends on
            the rows it is batched with.
        reduce_range: quantise to ±63 and not to ±127. x86 CPUs without VNNI add pairs of 8-bit
            products in 16 bits, which overflow with ±127 (measured: outputs off by 5 %). Layers
            that are int8 already (``ss1::linear_quantized``) keep their ±127; where they quantise
            activations too, z is multiplied in two parts, which is exact on every CPU.
        tune_for: ``"cpu"`` spells residuals and attention so that ONNX Runtime's CPU kernels run
            them fastest (see :mod:`ss1_compile.onnx.surroundings`); other providers may then
            not fuse residuals into their normalisation. ``None`` leaves the graph alone.
        config: what the model was compressed with, to be recorded in the file.
        dense: an ONNX file of the uncompressed model, to compare speed with.

    Raises:
        ConfigError: an argument is out of range, or the model is in training mode.
        ExportError: PyTorch cannot export the model, or it has no SS1 layer.
        VerificationError: the file computes something else. Nothing is written.
    """
    _check(model, form, opset, dynamic_shapes)
    check_quantization(quantization)
    if tune_for not in (None, "cpu"):
        raise ConfigError(f"tune_for must be 'cpu' or None, got {tune_for!r}")
    target = check_target(path, external_data)
    program = _program(model, args, dynamic_shapes)
    converted = _convert(program, opset, dynamic_shapes)
    if not any(True for _ in onnx_layers.ss1_nodes(converted)):
        raise ExportError(
            "the program has no SS1 layer; compress the model first (ss1_compile.compress, or "
            "ss1_compile.compress_exported)"
        )
    onnx_layers.strip(converted)
    onnx_layers.share_sketches(converted)
    if tune_for == "cpu":
        tune_for_cpu(converted)
    levels = SEVEN_BITS if reduce_range else EIGHT_BITS
    if quantization is not None:
        quantize(converted, quantization, levels)
    layers = [onnx_layers.describe(*found) for found in onnx_layers.ss1_nodes(converted)]
    onnx_layers.record(converted, layers, config)
    report = ExportReport(target, form, opset, quantization, layers)
    with staging(target) as stage:
        checked = stage / target.name
        if form == "custom":
            save_model(converted, checked, external_data)
            checked = stage / f"bodies-{target.name}"  # a bare node runs nowhere yet
        onnx_layers.attach_functions(converted, reduce_range)
        if form == "standard":
            onnx_layers.inline_functions(converted)
        save_model(converted, checked, external_data)
        if verify:
            verify_export(report, checked, program, levels, tolerance, dense)
        report.file_bytes = publish(stage, target)
    return report


def export_file(
    program: str | os.PathLike[str], path: str | os.PathLike[str], **options: Any
) -> ExportReport:
    """:func:`export_onnx` of a program that ``torch.export.save`` wrote; what ``ss1 export`` does.

    Raises:
        CheckpointError: ``program`` is no such file.
        SS1Error: as :func:`export_onnx`.
    """
    try:
        loaded = torch.export.load(os.fspath(program))
    except Exception as error:
        raise CheckpointError(
            f"{os.fspath(program)} is no program that torch.export.save wrote: {error}"
        ) from error
    return export_onnx(loaded, (), path, **options)


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all local functions replaced by their bodies: standard operators only.

    SS1 nodes without a body (``form="custom"``) are given one first.

    Raises:
        CheckpointError: an SS1 node lacks an operand, or one that has to be constant is not.
    """
    loaded = ir.from_proto(model)
    assert isinstance(loaded, ir.Model)
    onnx_layers.attach_functions(loaded)
    onnx_layers.inline_functions(loaded)
    return ir.to_proto(loaded)


def _check(
    model: nn.Module | ExportedProgram, form: object, opset: object, dynamic_shapes: Any
) -> None:
    if form not in FORMS:
        raise ConfigError(f"form must be one of {list(FORMS)}, got {form!r}")
    if opset not in OPSETS:
        raise ConfigError(f"opset must be one of {OPSETS.start} … {OPSETS.stop - 1}, got {opset!r}")
    if isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise ConfigError(
                "dynamic_shapes belong to torch.export.export: the program has its own"
            )
    elif not isinstance(model, nn.Module):
        raise ConfigError(
            f"model must be an nn.Module or an ExportedProgram, got {type(model).__name__}"
        )
    elif model.training:
        raise ConfigError("the model is in training mode; call model.eval() first")


def _program(model: nn.Module | ExportedProgram, args: Any, dynamic_shapes: Any) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        return model
    positional = () if isinstance(args, Mapping) else tuple(args)
    keywords = dict(args) if isinstance(args, Mapping) else None
    try:
        with _quiet():
            return torch.export.export(
                getattr(model, "_orig_mod", model),
                positional,
                keywords,
                dynamic_shapes=dynamic_shapes,
                strict=False,
            )
    except Exception as error:
        raise ExportError(f"torch.export.export cannot export the model: {error}") from error


def _convert(program: ExportedProgram, opset: int, dynamic_shapes: Any) -> ir.Model:
    register_schemas()
    try:
        with _quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                custom_translation_table=onnx_translation_table(),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"torch.onnx.export cannot convert the program: {error}") from error
    assert converted is not None
    model: ir.Model = converted.model
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that are not installed and the like."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
