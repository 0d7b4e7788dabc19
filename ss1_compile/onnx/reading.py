"""Reading ONNX files that are not trusted: everything is checked before anything is used."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, checker, helper
from onnx.external_data_helper import ExternalDataInfo
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
from ss1_compile.onnx.operators import Operator, register_schemas
from ss1_compile.onnx.verification import to_torch
from ss1_compile.structure import SS1Structure

_PACKED: dict[int, int] = {TensorProto.INT4: 2, TensorProto.UINT4: 2, TensorProto.FLOAT4E2M1: 2}
"""Values to a byte in ``raw_data`` where it is more than one."""


def from_onnx(path: str | os.PathLike[str], model: nn.Module | None = None) -> dict[str, SS1Linear]:
    """Read the SS1 layers of an ONNX file back into PyTorch.

    The file is not trusted: see :func:`read_model`; and every structure, shape and value is
    validated before it can reach a kernel. Int8 z is dequantised, to float32.

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


def read_model(path: str | os.PathLike[str]) -> ir.Model:
    """Read and check an ONNX file; weights beside it stay on disk until they are used.

    Checked: it is a whole protobuf; every tensor has as many bytes as its shape and type say;
    external data are regular files in the directory of the model or below it, and long enough;
    functions do not call themselves; nodes are in topological order; and what ``onnx.checker``
    checks.

    Raises:
        CheckpointError: one of these does not hold.
        FileNotFoundError: there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no ONNX file at {file}")
    try:
        proto = onnx.load(file, format="protobuf", load_external_data=False)
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read, it is truncated or no ONNX file: {error}"
        ) from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise CheckpointError(f"{file} has no graph or no opset; it is truncated or no ONNX file")
    for tensor in _tensors(proto):
        _check_tensor(file, tensor)
    _check_calls(file, proto)
    register_schemas()
    try:
        checker.check_model(str(file))
        model = ir.from_proto(proto)
    except Exception as error:
        raise CheckpointError(f"{file} is no valid ONNX model: {error}") from error
    assert isinstance(model, ir.Model)
    ir.external_data.set_base_dir(model.graph, file.parent)
    return model


# --- layers -------------------------------------------------------------------------------------


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


# --- files --------------------------------------------------------------------------------------


def _tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the graph, its subgraphs and the functions, in any attribute."""
    graphs: list[onnx.GraphProto] = [proto.graph]
    nodes: list[onnx.NodeProto] = [n for f in proto.functions for n in f.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)


def _check_tensor(file: Path, tensor: TensorProto) -> None:
    where = f"{file}: tensor {tensor.name!r:.80}"
    if tensor.data_type not in TensorProto.DataType.values() or not tensor.data_type:
        raise CheckpointError(f"{where} has the unknown type {tensor.data_type}")
    if any(d < 0 for d in tensor.dims):
        raise CheckpointError(f"{where} has a negative dimension: {list(tensor.dims)}")
    if tensor.data_type == TensorProto.STRING:
        return
    count = math.prod(tensor.dims)
    itemsize = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    packed = _PACKED.get(tensor.data_type)
    wanted = -(-count // packed) if packed else count * itemsize
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_external(file, tensor, where, wanted)
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != wanted:
            raise CheckpointError(
                f"{where} has {len(tensor.raw_data)} bytes, its shape {list(tensor.dims)} needs "
                f"{wanted}"
            )
    else:
        stored = sum(
            len(getattr(tensor, values))
            for values in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
        )
        factor = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
        if stored != -(-count * factor // (packed or 1)):
            raise CheckpointError(
                f"{where} has {stored} values, its shape {list(tensor.dims)} needs {count}"
            )


def _check_external(file: Path, tensor: TensorProto, where: str, wanted: int) -> None:
    try:
        info = ExternalDataInfo(tensor)
        offset, length = int(info.offset or 0), int(wanted if info.length is None else info.length)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: damaged reference to external data: {error}") from error
    base = file.parent.resolve()
    location = Path(info.location)
    data = (base / location).resolve()
    if not info.location or location.is_absolute() or not data.is_relative_to(base):
        raise CheckpointError(
            f"{where}: its data are said to be in {info.location!r:.120}, outside of the model's "
            f"directory"
        )
    if not data.is_file():
        raise CheckpointError(f"{where}: its data file {info.location!r:.120} is missing")
    if length != wanted or offset < 0 or offset + length > data.stat().st_size:
        raise CheckpointError(
            f"{where}: bytes {offset} … {offset + length} of {info.location!r:.120} "
            f"({data.stat().st_size} bytes) do not hold its shape {list(tensor.dims)}, {wanted} "
            f"bytes"
        )


def _check_calls(file: Path, proto: onnx.ModelProto) -> None:
    """Refuse functions that call themselves, which inliners would follow for ever."""
    calls: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for function in proto.functions:
        nodes, called = list(function.node), set()
        while nodes:
            node = nodes.pop()
            called.add((node.domain, node.op_type))
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    nodes.extend(graph.node)
        calls[function.domain, function.name] = called
    done: set[tuple[str, str]] = set()
    for start in calls:
        path: list[tuple[tuple[str, str], Iterator[tuple[str, str]]]] = []
        if start not in done:
            path.append((start, iter(calls[start])))
        active = {start}
        while path:
            key, rest = path[-1]
            following = next((c for c in rest if c in calls and c not in done), None)
            if following is None:
                done.add(key)
                active.discard(key)
                path.pop()
            elif following in active:
                raise CheckpointError(f"{file}: the function {following[1]!r} calls itself")
            else:
                active.add(following)
                path.append((following, iter(calls[following])))
