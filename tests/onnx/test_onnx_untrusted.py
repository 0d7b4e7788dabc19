"""Files that lie: named errors from both readers, and nothing written."""

import os
import random
import warnings

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_support import float_info, layer_model, rotation

from ss1_compile.errors import CheckpointError, SS1Error
from ss1_compile.onnx import compress_onnx, from_onnx
from ss1_compile.onnx.operators import OPERATORS, Operator

K, N = 72, 34
STRUCTURE = rotation(K, N, 4, 4, 16, 0)


def model(operator=None):
    """An SS1 layer, and a linear one that could be compressed."""
    z, bias = torch.randn(N, STRUCTURE.reduced_features), torch.randn(N)
    proto = layer_model(operator or Operator("rotation"), STRUCTURE.code, z, bias, K)
    weight = np.random.default_rng(0).standard_normal((N, 64), np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    proto.graph.node.append(helper.make_node("MatMul", ["Y", "W"], ["P"], name="dense"))
    proto.graph.output.append(float_info("P", ["batch", "rows", 64]))
    return proto


def external(tensor, **fields):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=value)


def weight(proto):
    return next(i for i in proto.graph.initializer if i.name == "W")


def traversing(proto):
    external(weight(proto), location="../secret")


def hidden_traversal(proto):
    external(weight(proto), location="data/../../secret")


def absolute(proto):
    external(weight(proto), location="/etc/hostname")


def directory(proto):
    external(weight(proto), location=".")


def nowhere(proto):
    external(weight(proto), length=str(4 * N * 64))


def negative_offset(proto):
    external(weight(proto), location="m.onnx", offset="-4096")


def huge_offset(proto):
    external(weight(proto), location="m.onnx", offset=str(2**63))


def no_number(proto):
    external(weight(proto), location="m.onnx", offset="many")


def in_a_branch(proto):
    """A constant of a branch that is never taken."""
    tensor = helper.make_tensor("inner", TensorProto.FLOAT, [1], [0.0])
    external(tensor, location="../secret")
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    branch = helper.make_graph([constant], "branch", [], [float_info("c", [1])])
    proto.graph.initializer.append(numpy_helper.from_array(np.array(False), "never"))
    proto.graph.node.append(
        helper.make_node("If", ["never"], ["chosen"], then_branch=branch, else_branch=branch)
    )


def in_a_function(proto):
    tensor = helper.make_tensor("inner", TensorProto.FLOAT, [1], [0.0])
    external(tensor, location="../secret")
    proto.functions[0].node.insert(0, helper.make_node("Constant", [], ["unused"], value=tensor))


def strings(proto):
    tensor = helper.make_tensor("words", TensorProto.STRING, [1], [b"x"])
    tensor.ClearField("string_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    proto.graph.initializer.append(tensor)


def too_large(proto):
    weight(proto).dims[:] = [2**40, 2**40]


def empty_but_large(proto):
    weight(proto).ClearField("raw_data")
    weight(proto).dims[:] = [2**31, 2**31]


def other_type(proto):
    weight(proto).data_type = TensorProto.DOUBLE


def no_type(proto):
    weight(proto).data_type = 0


def unknown_type(proto):
    weight(proto).data_type = 999


def calls_each_other(proto):
    """A → B → A, neither of which anything calls."""
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("evil", 1)]
    for name, other in (("A", "B"), ("B", "A")):
        node = helper.make_node(other, ["x"], ["y"], domain="evil")
        proto.functions.append(helper.make_function("evil", name, ["x"], ["y"], [node], opset))
    proto.opset_import.append(helper.make_opsetid("evil", 1))


def loops(proto):
    proto.graph.node[0].input[0] = "P"


def twice(proto):
    proto.graph.node.append(proto.graph.node[1])


FILES = [
    (traversing, "outside of the model's directory"),
    (hidden_traversal, "outside of the model's directory"),
    (absolute, "outside of the model's directory"),
    (directory, "is missing|outside"),
    (nowhere, "damaged reference|outside|missing"),
    (negative_offset, "do not hold|non-negative"),
    (huge_offset, "do not hold"),
    (no_number, "damaged reference"),
    (in_a_branch, "outside of the model's directory"),
    (in_a_function, "outside of the model's directory"),
    (strings, "strings, which cannot be external"),
    (too_large, "bytes"),
    (empty_but_large, "values"),
    (other_type, "bytes"),
    (no_type, "unknown type"),
    (unknown_type, "unknown type"),
    (calls_each_other, "calls itself"),
    (loops, "no valid ONNX model"),
    (twice, "no valid ONNX model"),
]


@pytest.mark.parametrize(("lie", "message"), FILES, ids=[lie.__name__ for lie, _ in FILES])
def test_both_readers_refuse(lie, message, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4 * N * 64))
    proto = model()
    lie(proto)
    path, out = folder / "m.onnx", folder / "out.onnx"
    path.write_bytes(proto.SerializeToString())
    out.write_bytes(b"an earlier file")
    with pytest.raises(CheckpointError, match=message):
        from_onnx(path)
    with pytest.raises(CheckpointError, match=message):
        compress_onnx(path, out, min_features=8)
    assert sorted(os.listdir(folder)) == ["m.onnx", "out.onnx"]
    assert out.read_bytes() == b"an earlier file"
    assert sorted(os.listdir(tmp_path)) == ["model", "secret"]


def test_the_rewriter_refuses_truncated_files(tmp_path):
    content = model().SerializeToString()
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    for length in range(0, len(content) - 1, 997):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            compress_onnx(path, out, min_features=8)
    assert os.listdir(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("name", ["SS1Linear", "SS1LinearInt8", "SS1LinearInt8PerToken"])
def test_damaged_bytes_give_layers_or_named_errors(name, tmp_path):
    """One to four bytes changed at random places, many of them in names, shapes and types."""
    rng = random.Random(0)
    proto = model(OPERATORS[name])
    del proto.functions[:]
    content = proto.SerializeToString()
    path = tmp_path / "m.onnx"
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy, on damaged floats
            try:
                layers = from_onnx(path, dequantize=rng.random() < 0.5)
            except SS1Error:
                continue
        for layer in layers.values():
            assert layer(torch.zeros(1, layer.in_features)).shape == (1, layer.out_features)
