"""The translation table of ``torch.onnx.export`` for ``torch.ops.ss1``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxscript
import torch
from onnxscript import opset18

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.onnx.operators import DOMAIN, VERSION, Operator, register_schemas


def _linear(x: Any, sketch: Any, z: Any, bias: Any = None) -> Any:
    """``ss1::linear``. The dtype of the sketch tells its kind, as it does in PyTorch."""
    if bias is None:
        zero: Any = opset18.Constant(value_float=0.0)
        bias = opset18.CastLike(zero, x)
    operator = Operator("learned" if sketch.dtype.is_floating_point() else "rotation")
    ss1 = onnxscript.values.Opset(DOMAIN, VERSION)
    return getattr(ss1, operator.name)(x, sketch, z, bias, in_features=int(x.shape[-1]))


def onnx_translation_table() -> dict[Any, Callable[..., Any]]:
    """How ``torch.onnx.export(..., custom_translation_table=)`` exports SS1 layers.

    The nodes have no bodies then: call :func:`ss1_compile.onnx.attach_functions` on the program's
    ``model`` before saving it, or register kernels. :func:`ss1_compile.export_onnx` does all that.
    """
    register_schemas()  # onnxscript makes a node only of an operator that has a schema
    return {torch.ops.ss1.linear.default: _linear}
