"""``from_onnx``: the SS1 layers of an ONNX file, back in PyTorch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ss1_compile.errors import CheckpointError, QuantizationError, StructureError
from ss1_compile.learned import Structure, structure_of
from ss1_compile.modules import SS1Linear, put_layer
from ss1_compile.onnx.layers import (
    FORMAT_KEY,
    FORMAT_VERSION,
    check_block_k,
    constant,
    in_features_of,
    layer_name,
    ss1_nodes,
)
from ss1_compile.onnx.operators import Operator
from ss1_compile.onnx.runner import to_torch
from ss1_compile.onnx.untrusted import read_model
from ss1_compile.structure import SS1Structure

_DYNAMIC = {"int8_weight_only": False, "int8_per_token": True}
"""Whether layers in PyTorch quantise their activations, by the arithmetic that they share."""


def from_onnx(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, dequantize: bool = True
) -> dict[str, SS1Linear]:
    """Read the SS1 layers of an ONNX file back into PyTorch.

    The file is not trusted: see :func:`ss1_compile.onnx.untrusted.read_model`; and every structure,
    shape and value is validated before it can reach a kernel.

    Args:
        path: a file of ``form="function"`` or ``"custom"``.
        model: if given, the layers take their places in it (by name; it may be the dense model).
        dequantize: int8 z comes back as float32, to be trained. ``False`` keeps codes and scales in
            quantised layers; those of ``…Int8Dynamic`` (activations per tensor) come back
            dequantised all the same, since no layer in PyTorch has that arithmetic.

    Returns:
        The layers by the qualified names they had when they were exported, on the CPU, in eval
        mode.

    Raises:
        CheckpointError: the file is damaged or tampered with, has no SS1 layers, or its layers do
            not fit ``model``, which is then unchanged. The message names the layer.
    """
    loaded = read_model(path)
    version = loaded.metadata_props.get(FORMAT_KEY, FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r:.40}, this package reads {FORMAT_VERSION!r}; "
            f"install a newer ss1-compile"
        )
    layers: dict[str, SS1Linear] = {}
    sources: dict[str, tuple[int, ...]] = {}
    for node, operator in ss1_nodes(loaded):
        name = layer_name(node, operator)
        source = tuple(id(value) for value in node.inputs[1:])
        if sources.setdefault(name, source) != source:
            raise CheckpointError(f"{path}: two different layers are called {name!r}")
        if name not in layers:
            layers[name] = _layer(node, operator, name, dequantize).eval()
    if not layers:
        raise CheckpointError(
            f"{path} has no SS1 layers; form='standard' keeps none: export as form='function'"
        )
    if model is not None:
        _check_places(model, layers)
        for name, layer in layers.items():
            put_layer(model, name, layer)
    return layers


def _layer(node: ir.Node, operator: Operator, name: str, dequantize: bool) -> SS1Linear:
    arrays = {
        which: to_torch(np.array(constant(node, operator, which).numpy()))
        for which in operator.operands
        if which != "X"
    }
    sketch, z, bias = arrays["sketch"], arrays["Z"], arrays["B"]
    if z.dim() != 2 or 0 in z.shape:
        raise CheckpointError(f"{name}: Z has shape {list(z.shape)}, not [N, K_c]")
    codes: dict[str, Any] = {}
    if operator.quantization is not None:
        floating = _dequantize(name, z, arrays["scale"])
        if dequantize or operator.quantization not in _DYNAMIC:
            z = floating
            sketch = sketch.float() if sketch.is_floating_point() else sketch
        else:
            codes = {
                "scale": arrays["scale"],
                "dynamic": _DYNAMIC[operator.quantization],
                "dtype": bias.dtype,
            }
    for which, tensor in arrays.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name}: {which} is not finite")
    dtype = codes.get("dtype", z.dtype)
    parameter = None
    if bias.dim() != 0 or bias.item() != 0:
        if bias.shape != z.shape[:1]:
            raise CheckpointError(f"{name}: B has shape {list(bias.shape)}, not [{z.shape[0]}]")
        parameter = nn.Parameter(bias.to(dtype))
    try:
        structure = _structure(node, operator, z, sketch, dtype)
        return SS1Linear.from_tensors(
            structure,
            z if codes else nn.Parameter(z),
            parameter,
            None if operator.kind == "rotation" else sketch,
            **codes,
        )
    except (StructureError, QuantizationError) as error:
        raise CheckpointError(f"{name}: {error}") from error


def _structure(
    node: ir.Node, operator: Operator, z: torch.Tensor, sketch: torch.Tensor, dtype: torch.dtype
) -> Structure:
    """The layer's structure; learned blocks must have the dtype of its floating tensors."""
    in_features, shape = in_features_of(node), list(sketch.shape)
    if operator.kind == "rotation":
        if len(shape) != 3 or 0 in shape or z.shape[1] % shape[1]:
            raise StructureError(
                f"a sketch of shape {shape} does not fit Z of shape {list(z.shape)}"
            )
        check_block_k(node, operator, shape[1], z.shape[1])
        return SS1Structure.from_code(in_features, z.shape[0], z.shape[1] // shape[1], sketch)
    if len(shape) != 4 or sketch.dtype != dtype:
        raise StructureError(
            f"a learned sketch must be {dtype} [J, G, gsize, r], got {sketch.dtype} {shape}"
        )
    return structure_of(in_features, z.shape[0], None, sketch)


def _dequantize(name: str, z: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, columns = z.shape
    fits = scale.dim() == 2 and scale.shape[0] == rows and 0 < scale.shape[1] <= columns
    if not fits or columns % scale.shape[1] or z.dtype != torch.int8:
        raise CheckpointError(
            f"{name}: scale of shape {list(scale.shape)} does not fit {z.dtype} Z {list(z.shape)}"
        )
    grouped = z.float().reshape(rows, scale.shape[1], -1) * scale.float().unsqueeze(-1)
    return grouped.reshape(rows, columns)


def _check_places(model: nn.Module, layers: dict[str, SS1Linear]) -> None:
    for name, layer in layers.items():
        try:
            place = model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(f"the model has no module called {name!r}") from error
        weight = getattr(place, "weight", None)
        shape = None if weight is None else tuple(weight.shape)
        n, k = layer.out_features, layer.in_features
        if not name or shape not in ((n, k), (k, n)):
            raise CheckpointError(
                f"{name!r} in the model is a {type(place).__name__} of shape {shape}, the file has "
                f"a layer of {n} × {k}"
            )
