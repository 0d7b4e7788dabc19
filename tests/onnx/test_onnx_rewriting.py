import os

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ss1_compile import SS1Warning
from ss1_compile.errors import CalibrationError, ConfigError, NothingToCompressError
from ss1_compile.onnx import compress_onnx, estimate_onnx, from_onnx
from ss1_compile.onnx.operators import DOMAIN
from ss1_compile.onnx.runner import Runner, relative_error

K, N = 120, 50  # ragged: no multiple of 64, nor of c·B_K


@pytest.fixture
def dense(tmp_path):
    """MatMul + Add, Gemm with transB, MatMul by a transposed weight, at opset 17."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((K, N)),
        "b": rng.standard_normal(N),
        "g": rng.standard_normal((64, N)),
        "gb": rng.standard_normal(64),
        "t": rng.standard_normal((40, 64)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="up"),
        helper.make_node("Add", ["b", "m"], ["a"], name="up_bias"),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Gemm", ["r", "g", "gb"], ["h"], name="middle", transB=1),
        helper.make_node("Transpose", ["t"], ["tt"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "tt"], ["y"], name="down"),
    ]
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 40])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "dense.onnx"
    onnx.save(proto, path)
    return path


def feeds(count=4, rank=24):
    rng = np.random.default_rng(1)
    basis = rng.standard_normal((rank, K))
    return [
        {"x": (rng.standard_normal((64, rank)) @ basis).astype(np.float32)} for _ in range(count)
    ]


def error(a, b, x):
    first, second = (Runner(path).run_arrays(x)[0] for path in (a, b))
    return relative_error(torch.from_numpy(second), torch.from_numpy(first))


def test_lossless_at_reduction_1(dense, tmp_path):
    out = tmp_path / "out.onnx"
    report = compress_onnx(dense, out, reduction=1)
    assert [row.name for row in report.compressed] == ["up", "middle", "down"]
    assert error(dense, out, feeds()[0]) < 1e-5
    stored = onnx.load(out)
    assert [n.op_type for n in stored.graph.node] == ["SS1Linear", "Relu", "SS1Linear", "SS1Linear"]
    assert {i.name for i in stored.graph.initializer}.isdisjoint({"w", "g", "t"})
    assert set(from_onnx(out)) == {"up", "middle", "down"}


def test_weights_in_constant_nodes_go_too(dense, tmp_path):
    """As Paddle's converter writes them."""
    proto = onnx.load(dense)
    for tensor in list(proto.graph.initializer):
        proto.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del proto.graph.initializer[:]
    path, out = tmp_path / "constants.onnx", tmp_path / "out.onnx"
    onnx.save(proto, path)
    compress_onnx(path, out, reduction=1)
    assert error(dense, out, feeds()[0]) < 1e-5
    assert "Constant" not in {node.op_type for node in onnx.load(out).graph.node}


@pytest.mark.filterwarnings("ignore::ss1_compile.SS1Warning")
def test_calibration_lowers_the_error(dense, tmp_path):
    data, unseen = feeds(), feeds(5)[4]
    average, calibrated, learned = (tmp_path / f"{name}.onnx" for name in "acl")
    compress_onnx(dense, average, reduction=2)
    compress_onnx(dense, calibrated, None, data, reduction=2, projection="calibrated")
    report = compress_onnx(dense, learned, None, data, reduction=2)
    assert {(row.projection, row.error_of) for row in report.compressed} == {("learned", "output")}
    assert error(dense, calibrated, unseen) < 0.7 * error(dense, average, unseen)
    assert error(dense, learned, unseen) < 0.7 * error(dense, average, unseen)
    assert {node.op_type for node in onnx.load(learned).graph.node} == {"SS1LearnedLinear", "Relu"}


@pytest.mark.filterwarnings("ignore::ss1_compile.SS1Warning")
@pytest.mark.parametrize("share", [True, False])
def test_layers_that_read_one_value_share_a_sketch(share, tmp_path):
    """Their sketch is stored once, and counted once; what is stored is what was projected."""
    rng = np.random.default_rng()
    wide = {name: rng.standard_normal((K, N)).astype(np.float32) for name in ("q", "k", "v")}
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("MatMul", ["x", name], [f"{name}_"], name=name) for name in wide]
    nodes.append(helper.make_node("Sum", [f"{name}_" for name in wide], ["y"]))
    graph = helper.make_graph(
        nodes,
        "attention",
        [info("x", TensorProto.FLOAT, ["rows", K])],
        [info("y", TensorProto.FLOAT, ["rows", N])],
        [numpy_helper.from_array(value, name) for name, value in wide.items()],
    )
    dense, out = tmp_path / "dense.onnx", tmp_path / "out.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), dense
    )
    data = feeds()
    report = compress_onnx(dense, out, None, data, reduction=2, share_sketches=share)
    stored = onnx.load(out).graph
    assert len({node.input[1] for node in stored.node if node.name in wide}) == (1 if share else 3)
    layers = from_onnx(out)
    sketches = sum(
        i.data_type == TensorProto.FLOAT and len(i.dims) == 4 for i in stored.initializer
    )
    assert sketches == (1 if share else 3)
    weights = sum(4 * np.prod(i.dims) for i in stored.initializer if i.dims)
    assert report.bytes_after == weights <= report.bytes_before / 2
    x = torch.from_numpy(np.concatenate([batch["x"] for batch in data])).double()
    for row in report:
        wanted = x @ torch.from_numpy(wide[row.name]).double()
        off = layers[row.name].double()(x).detach() - wanted
        assert float(off.norm() / wanted.norm()) == pytest.approx(row.error, rel=1e-3)


@pytest.mark.filterwarnings("ignore::ss1_compile.SS1Warning")
@pytest.mark.parametrize("form", ["function", "standard", "custom"])
def test_int8_and_forms(dense, form, tmp_path):
    out = tmp_path / "out.onnx"
    report = compress_onnx(dense, out, reduction=2, quantization="int8_dynamic", form=form)
    assert sorted(os.listdir(tmp_path)) == ["dense.onnx", "out.onnx"]
    used = {node.domain for node in onnx.load(out).graph.node}
    assert (DOMAIN in used) == (form != "standard")
    assert report.bytes_after < report.bytes_before


@pytest.mark.filterwarnings("ignore::ss1_compile.SS1Warning")
def test_estimates_are_what_compression_gives(dense, tmp_path):
    options = {"reduction": 2, "projection": "learned", "group_size": 40}
    learned = estimate_onnx(dense, **options)
    report = compress_onnx(dense, tmp_path / "out.onnx", None, feeds(), **options)
    assert [(r.name, r.bytes_after) for r in learned] == [(r.name, r.bytes_after) for r in report]
    estimate = estimate_onnx(dense, reduction=2, overrides={"middle": None})
    with pytest.warns(SS1Warning, match="lose more than"):
        report = compress_onnx(
            dense, tmp_path / "out.onnx", reduction=2, overrides={"middle": None}
        )
    assert [(r.name, r.bytes_after) for r in estimate] == [(r.name, r.bytes_after) for r in report]
    assert estimate["middle"].reason == "kept dense by overrides['middle']"


def test_bad_arguments(dense, tmp_path):
    out = tmp_path / "out.onnx"
    with pytest.raises(CalibrationError, match="are empty"):
        compress_onnx(dense, out, None, [])
    with pytest.raises(CalibrationError, match="the file takes"):
        compress_onnx(dense, out, None, [{"wrong": np.zeros((1, K), np.float32)}])
    for projection in ("calibrated", "learned"):
        with pytest.raises(CalibrationError, match="needs calibration feeds"):
            compress_onnx(dense, out, projection=projection)
    with pytest.raises(NothingToCompressError):
        compress_onnx(dense, out, min_features=10_000)
    with pytest.raises(ConfigError, match="form must be"):
        compress_onnx(dense, out, form="plain")
    assert os.listdir(tmp_path) == ["dense.onnx"]
