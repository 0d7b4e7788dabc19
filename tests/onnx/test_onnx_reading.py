import os

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_support import layer_model, rotation
from torch import nn

from ss1_compile import from_onnx
from ss1_compile.errors import CheckpointError
from ss1_compile.onnx import compress_onnx
from ss1_compile.onnx.operators import Operator

K, N = 72, 34
STRUCTURE = rotation(K, N, 4, 4, 16, 0)
Z, BIAS = torch.randn(N, STRUCTURE.reduced_features), torch.randn(N)


def model(quantization=None, bias=BIAS):
    return layer_model(Operator("rotation", quantization), STRUCTURE.code, Z, bias, K)


def saved(proto, tmp_path, **options):
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, **options)
    return path


@pytest.mark.parametrize("bias", [BIAS, None])
def test_round_trip(bias, tmp_path):
    layer = from_onnx(saved(model(bias=bias), tmp_path))["Z"]
    assert layer.structure == STRUCTURE
    assert torch.equal(layer.z, Z)
    assert layer.bias is None if bias is None else torch.equal(layer.bias, bias)
    assert not layer.training


def test_int8_is_dequantised(tmp_path):
    layer = from_onnx(saved(model("int8_dynamic"), tmp_path))["Z"]
    step = Z.abs().amax(1, keepdim=True) / 63
    assert bool(((layer.z - Z).abs() <= step / 2 + 1e-6).all())


def test_into_a_model(tmp_path):
    proto = model()
    proto.graph.initializer[1].name = proto.graph.node[0].input[2] = "up.z"
    path = saved(proto, tmp_path)
    dense = nn.ModuleDict({"up": nn.Linear(K, N)})
    layer = from_onnx(path, dense)["up"]
    assert dense["up"] is layer
    with pytest.raises(CheckpointError, match="no module called 'up'"):
        from_onnx(path, nn.ModuleDict())
    other = nn.ModuleDict({"up": nn.Linear(K, N + 1)})
    with pytest.raises(CheckpointError, match="of shape"):
        from_onnx(path, other)
    assert isinstance(other["up"], nn.Linear)


def initializer(proto, name):
    return next(i for i in proto.graph.initializer if i.name == name)


def replaced(proto, name, array):
    initializer(proto, name).CopyFrom(numpy_helper.from_array(array, name))


def too_far(proto):
    replaced(proto, "sketch", np.full(STRUCTURE.code.shape, 16, np.int32))


def odd_rotation(proto):
    replaced(proto, "sketch", np.full(STRUCTURE.code.shape, 3, np.int32))


def huge_rotation(proto):
    replaced(proto, "sketch", np.full(STRUCTURE.code.shape, -(2**31), np.int32))


def flat_sketch(proto):
    replaced(proto, "sketch", np.zeros((4, 8), np.int32))


def wide_z(proto):
    replaced(proto, "Z", np.zeros((N, 33), np.float32))


def infinite_z(proto):
    replaced(proto, "Z", np.full((N, STRUCTURE.reduced_features), np.inf, np.float32))


def short_bias(proto):
    replaced(proto, "B", np.zeros(3, np.float32))


def lying_shape(proto):
    initializer(proto, "Z").dims[0] = 2**40


def negative_shape(proto):
    initializer(proto, "Z").dims[0] = -1


def attribute(proto, name):
    return next(a for a in proto.graph.node[0].attribute if a.name == name)


def wrong_features(proto):
    attribute(proto, "in_features").i = 7000


def wrong_block_k(proto):
    attribute(proto, "block_k").i = 8


def huge_block_k(proto):
    attribute(proto, "block_k").i = 2**62


def no_attribute(proto):
    del proto.graph.node[0].attribute[:]


def fewer_inputs(proto):
    del proto.graph.node[0].input[3:]


def no_layers(proto):
    del proto.graph.node[:]
    proto.graph.node.append(helper.make_node("Identity", ["X"], ["Y"]))


def computed_z(proto):
    proto.graph.node.insert(0, helper.make_node("Identity", ["Z"], ["Z2"]))
    proto.graph.node[1].input[2] = "Z2"
    proto.graph.initializer.remove(initializer(proto, "Z"))
    proto.graph.input.append(helper.make_tensor_value_info("Z", 1, [N, STRUCTURE.reduced_features]))


def cyclic_graph(proto):
    proto.graph.node.insert(0, helper.make_node("Add", ["b", "X"], ["a"]))
    proto.graph.node.insert(1, helper.make_node("Identity", ["a"], ["b"]))


def cyclic_functions(proto):
    function = proto.functions[0]
    call = helper.make_node(function.name, list(function.input), ["again"], domain=function.domain)
    function.node.append(call)


def outside(proto):
    tensor = initializer(proto, "Z")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/passwd")


def absolute(proto):
    outside(proto)
    initializer(proto, "Z").external_data[0].value = "/etc/passwd"


def missing_data(proto):
    outside(proto)
    initializer(proto, "Z").external_data[0].value = "nothing.data"


def newer_format(proto):
    proto.metadata_props.add(key="ss1.format", value="99")


TAMPERED = [
    (too_far, "rotation 16"),
    (odd_rotation, "rotation 3"),
    (huge_rotation, "rotation 2147483647"),
    (flat_sketch, "sketch of shape|rank"),
    (wide_z, "does not fit|need"),
    (infinite_z, "Z is not finite"),
    (short_bias, "B has shape"),
    (lying_shape, "'Z' has .* bytes"),
    (negative_shape, "negative dimension"),
    (wrong_features, "need"),
    (wrong_block_k, "block_k = 8 with 2 supergroups does not fit Z with 32 columns"),
    (huge_block_k, "does not fit Z"),
    (no_attribute, "in_features|attribute"),
    (fewer_inputs, "input size 3"),
    (no_layers, "no SS1 layers"),
    (computed_z, "is no initializer"),
    (cyclic_graph, "no valid ONNX model"),
    (cyclic_functions, "calls itself|no valid"),
    (outside, "outside of the model's directory"),
    (absolute, "outside of the model's directory"),
    (missing_data, "is missing"),
    (newer_format, "format version '99'"),
]


@pytest.mark.parametrize(("tamper", "message"), TAMPERED, ids=[t.__name__ for t, _ in TAMPERED])
def test_tampered_files(tamper, message, tmp_path):
    proto = model()
    tamper(proto)
    path = saved(proto, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        from_onnx(path)


@pytest.mark.parametrize("tamper", [lying_shape, cyclic_graph, cyclic_functions, outside])
def test_the_rewriter_writes_nothing_for_them(tamper, tmp_path):
    proto = model()
    tamper(proto)
    path = saved(proto, tmp_path)
    with pytest.raises(CheckpointError):
        compress_onnx(path, tmp_path / "out.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_truncation_at_every_length(tmp_path):
    path = saved(model(), tmp_path)
    content = path.read_bytes()
    for length in range(0, len(content) - 1, 211):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            from_onnx(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        from_onnx(path)


def test_links_out_of_the_directory_and_short_data(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = saved(model(), folder, save_as_external_data=True, location="m.data", size_threshold=64)
    assert torch.equal(from_onnx(path)["Z"].z, Z)
    content = (folder / "m.data").read_bytes()
    (folder / "m.data").write_bytes(content[:100])
    with pytest.raises(CheckpointError, match="do not hold"):
        from_onnx(path)
    (tmp_path / "elsewhere").write_bytes(content)
    (folder / "m.data").unlink()
    (folder / "m.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside of the model's directory"):
        from_onnx(path)
