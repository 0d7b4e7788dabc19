"""``from_onnx``: the SS1 layers of an ONNX file, back in PyTorch."""

from __future__ import annotations

import os

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ss1_compile.errors import CheckpointError, StructureError
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


def from_onnx(path: str | os.PathLike[str], model: nn.Module | None = None) -> dict[str, SS1Linear]:
    """Read the SS1 layers of an ONNX file back into PyTorch.

    The file is not trusted: see :func:`ss1_compile.onnx.untrusted.read_model`; and every structure,
    shape and value is validated before it can reach a kernel. Int8 z is dequantised, to float32.

    Args:
        path: a file of ``form="function"`` or ``"custom"``.
        model: if given, the layers take their places in it (by name; it may be the dense model).

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
            layers[name] = _layer(node, operator, name).eval()
    if not layers:
        raise CheckpointError(
            f"{path} has no SS1 layers; form='standard' keeps none: export as form='function'"
        )
    if model is not None:
        _check_places(model, layers)
        for name, layer in layers.items():
            put_layer(model, name, layer)
    return layers


def _layer(node: ir.Node, operator: Operator, name: str) -> SS1Linear:
    arrays = {
        which: to_torch(np.array(constant(node, operator, which).numpy()))
        for which in operator.operands
        if which != "X"
    }
    in_features = in_features_of(node)
    sketch, z, bias = arrays["sketch"], arrays["Z"], arrays["B"]
    if z.dim() != 2 or 0 in z.shape:
        raise CheckpointError(f"{name}: Z has shape {list(z.shape)}, not [N, K_c]")
    if operator.quantization is not None:
        z = _dequantize(name, z, arrays["scale"])
    out_features = z.shape[0]
    for which, tensor in (("Z", z), ("B", bias), ("sketch", sketch)):
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name}: {which} is not finite")
    if bias.dim() == 0 and bias.item() == 0:
        parameter = None
    elif bias.shape == (out_features,):
        parameter = nn.Parameter(bias.to(z.dtype))
    else:
        raise CheckpointError(f"{name}: B has shape {list(bias.shape)}, not [{out_features}]")
    try:
        if operator.kind == "rotation":
            if sketch.dim() == 3:
                check_block_k(node, operator, sketch.shape[1], z.shape[1])
            return SS1Linear.from_tensors(
                _rotation(in_features, z, sketch), nn.Parameter(z), parameter
            )
        return _learned(in_features, z, sketch, parameter)
    except StructureError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _rotation(in_features: int, z: torch.Tensor, sketch: torch.Tensor) -> SS1Structure:
    if sketch.dim() != 3 or 0 in sketch.shape or z.shape[1] % sketch.shape[1]:
        raise StructureError(
            f"a sketch of shape {list(sketch.shape)} does not fit Z of shape {list(z.shape)}"
        )
    block_k = z.shape[1] // sketch.shape[1]
    return SS1Structure.from_code(in_features, z.shape[0], block_k, sketch)


def _learned(
    in_features: int, z: torch.Tensor, sketch: torch.Tensor, bias: nn.Parameter | None
) -> SS1Linear:
    from ss1_compile.learned import structure_of

    if sketch.dim() != 4 or sketch.dtype != z.dtype:
        raise StructureError(
            f"a learned sketch must be {z.dtype} [J, G, gsize, r], got {sketch.dtype} "
            f"{list(sketch.shape)}"
        )
    structure = structure_of(in_features, z.shape[0], None, sketch)
    return SS1Linear.from_tensors(structure, nn.Parameter(z), bias, sketch)


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
