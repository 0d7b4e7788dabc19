"""The translation table of ``torch.onnx.export`` for ``torch.ops.ss1``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnxscript import opset18

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.errors import ExportError
from ss1_compile.onnx.operators import (
    BLOCK_K,
    DOMAIN,
    IN_FEATURES,
    VERSION,
    Arithmetic,
    Operator,
    register_schemas,
)


def _linear(x: Any, sketch: Any, z: Any, bias: Any = None) -> Any:
    """``ss1::linear``."""
    return _node(None, x, sketch, z, bias)


def _linear_quantized(
    x: Any, sketch: Any, z: Any, scale: Any, bias: Any = None, dynamic: bool = False
) -> Any:
    """``ss1::linear_quantized`` with int8 z."""
    if z.dtype != ir.DataType.INT8:
        raise ExportError(
            f"z is {z.dtype}: ONNX Runtime multiplies no float8 matrices; quantise to int8"
        )
    return _node("int8_per_token" if dynamic else "int8_weight_only", x, sketch, z, scale, bias)


def _node(arithmetic: Arithmetic | None, x: Any, sketch: Any, *operands: Any) -> Any:
    """The dtype of the sketch tells its kind, as it does in PyTorch."""
    z, *scale, bias = operands
    if bias is None:
        zero: Any = opset18.Constant(value_float=0.0)
        bias = opset18.CastLike(zero, x)
    operator = Operator("learned" if sketch.dtype.is_floating_point() else "rotation", arithmetic)
    ss1 = onnxscript.values.Opset(DOMAIN, VERSION)
    attributes = {IN_FEATURES: int(x.shape[-1])}
    if operator.kind == "rotation":
        attributes[BLOCK_K] = int(z.shape[1]) // int(sketch.shape[1])
    return getattr(ss1, operator.name)(x, sketch, z, *scale, bias, **attributes)


def onnx_translation_table() -> dict[Any, Callable[..., Any]]:
    """How ``torch.onnx.export(..., custom_translation_table=)`` exports SS1 layers.

    The nodes have no bodies then: call :func:`ss1_compile.onnx.attach_functions` on the program's
    ``model`` before saving it, or register kernels. :func:`ss1_compile.export_onnx` does all that.
    """
    register_schemas()  # onnxscript makes a node only of an operator that has a schema
    return {
        torch.ops.ss1.linear.default: _linear,
        torch.ops.ss1.linear_quantized.default: _linear_quantized,
    }
