"""Opening ONNX files that are not trusted: everything is checked before anything is used."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto, checker, helper
from onnx.external_data_helper import ExternalDataInfo

from ss1_compile.errors import CheckpointError
from ss1_compile.onnx.operators import register_schemas

_PACKED: dict[int, int] = {TensorProto.INT4: 2, TensorProto.UINT4: 2, TensorProto.FLOAT4E2M1: 2}
"""Values to a byte in ``raw_data`` where it is more than one."""


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
        if tensor.data_location == TensorProto.EXTERNAL:
            raise CheckpointError(f"{where} holds strings, which cannot be external data")
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
