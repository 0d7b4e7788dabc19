"""Torch-TensorRT's converters for the SS1 operators, registered when this module is imported.

Import it through :func:`ss1_compile.tensorrt.register`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch_tensorrt.dynamo.conversion import ConversionContext, dynamo_tensorrt_converter

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.tensorrt.layers import ITensor, Layers, Operand

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_RANK = 6  # TensorRT has 8 dimensions, the gathered x has two more than x


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a node, wherever it was given."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _value(argument: Any) -> Any:
    """The (fake) tensor that a node computes."""
    return argument.meta.get("val", argument.meta.get("example_value"))


def _fits(node: fx.Node, settings: Any = None) -> bool:
    """Whether x has a dtype and rank that the layers take; float64 stays in PyTorch."""
    x = _value(_argument(node, 0, "x"))
    return x is None or (x.dtype in _DTYPES and x.dim() <= _MAX_RANK)


def _fits_quantized(node: fx.Node, settings: Any = None) -> bool:
    """Weight-only int8. TensorRT cannot quantise activations per row and column block."""
    z = _value(_argument(node, 2, "z"))
    weight_only = not _argument(node, 5, "dynamic", False)
    return _fits(node) and weight_only and (z is None or z.dtype == torch.int8)


def _linear(
    layers: Layers, x: Operand, sketch: Operand, z: Operand, bias: Operand | None = None
) -> ITensor:
    return layers.linear(x, sketch, z, bias)


def _linear_quantized(
    layers: Layers,
    x: Operand,
    sketch: Operand,
    z: Operand,
    scale: Operand,
    bias: Operand | None = None,
    dynamic: bool = False,
) -> ITensor:
    x = layers.tensor(x)
    return layers.linear(x, sketch, layers.dequantized(z, scale, x.dtype), bias)


@dynamo_tensorrt_converter(
    torch.ops.ss1.linear.default, capability_validator=_fits, supports_dynamic_shapes=True
)
def convert_linear(
    ctx: ConversionContext, target: Any, args: Any, kwargs: Any, name: str
) -> ITensor:
    """``ss1::linear`` as the layers of :mod:`ss1_compile.tensorrt.layers`."""
    return _linear(Layers(ctx, name), *args, **kwargs)


@dynamo_tensorrt_converter(
    torch.ops.ss1.linear_quantized.default,
    capability_validator=_fits_quantized,
    supports_dynamic_shapes=True,
)
def convert_linear_quantized(
    ctx: ConversionContext, target: Any, args: Any, kwargs: Any, name: str
) -> ITensor:
    """``ss1::linear_quantized`` with ``dynamic=False``: dequantise z, then as ``linear``."""
    return _linear_quantized(Layers(ctx, name), *args, **kwargs)
