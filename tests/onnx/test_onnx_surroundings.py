import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import ss1_compile
from ss1_compile import export_onnx
from ss1_compile.errors import ConfigError
from ss1_compile.onnx.surroundings import tune_for_cpu

ROWS, WIDTH = 6, 64


class Block(nn.Module):
    """Masked attention whose q, k and v read one input, and a residual before the norm."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, mask):
        q, k, v = (f(x).unflatten(-1, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.norm(x + y.transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = Block().eval()
    ss1_compile.compress(model, warn_error=10, progress=False)
    mask = torch.ones(2, ROWS, dtype=torch.bool)
    mask[0, 4:] = False
    args = torch.randn(2, ROWS, WIDTH), mask
    return torch.export.export(model, args), args


def optimized(path):
    """Operators of the graph that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    ort.InferenceSession(path, options)
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return [node.op_type for node in nodes]


@pytest.mark.parametrize("quantization", [None, "int8_dynamic"])
def test_q_k_and_v_share_one_sketch(case, quantization, tmp_path):
    program, args = case
    path = tmp_path / "m.onnx"
    report = export_onnx(program, args, path, quantization=quantization)
    assert len(report.layers) == 3
    ops = optimized(path)
    assert ops.count("Split") == 1
    assert ops.count("DynamicQuantizeLinear") == (quantization is not None)
    if quantization:
        assert ops.count("MatMulIntegerToFloat") == 12  # three layers of four column blocks
    assert "Concat" in ops
    assert ops.count("Add") == 1  # the mask: biases are in the products


def test_tuned_files_run_the_faster_kernels(case, tmp_path):
    program, args = case
    tuned, plain = tmp_path / "tuned.onnx", tmp_path / "plain.onnx"
    assert export_onnx(program, args, tuned).max_error < 1e-5
    assert export_onnx(program, args, plain, tune_for=None).max_error < 1e-5
    before, after = optimized(plain), optimized(tuned)
    assert "SkipLayerNormalization" in before
    assert "SkipLayerNormalization" not in after
    assert "LayerNormalization" in after
    with pytest.raises(ConfigError, match="tune_for must be"):
        export_onnx(program, args, tuned, tune_for="gpu")


def guarded(axis=-1, value=0.0, extra_use=False):
    """``Where (IsNaN (P), value, P) @ V`` with ``P = Softmax (S)``."""
    nodes = [
        helper.make_node("Softmax", ["S"], ["P"], axis=axis),
        helper.make_node("IsNaN", ["P"], ["bad"]),
        helper.make_node("Where", ["bad", "zero", "P"], ["G"]),
        helper.make_node("MatMul", ["G", "V"], ["Y"]),
    ]
    info = helper.make_tensor_value_info
    outputs = [info("Y", TensorProto.FLOAT, ["b", "t", 3])]
    if extra_use:
        outputs.append(info("G", TensorProto.FLOAT, ["b", "t", "s"]))
    graph = helper.make_graph(
        nodes,
        "guarded",
        [
            info("S", TensorProto.FLOAT, ["b", "t", "s"]),
            info("V", TensorProto.FLOAT, ["b", "s", 3]),
        ],
        outputs,
        [numpy_helper.from_array(np.float32(value), "zero")],
        value_info=[info("P", TensorProto.FLOAT, ["b", "t", "s"])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(proto)


def run(model, feeds):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return ort.InferenceSession(proto.SerializeToString()).run(["Y"], feeds)[0]


def test_rows_that_see_nothing_stay_zero():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2, 4, 5), np.float32)
    scores[0, 1] = -np.inf
    scores[1, :, 2:] = -np.inf
    feeds = {"S": scores, "V": rng.standard_normal((2, 5, 3), np.float32)}
    expected = run(guarded(), feeds)
    model = guarded()
    tune_for_cpu(model)
    assert [node.op_type for node in model.graph] == [
        "Softmax",
        "Slice",
        "IsNaN",
        "MatMul",
        "Where",
    ]
    found = run(model, feeds)
    assert np.array_equal(found, expected)
    assert not found[0, 1].any()


@pytest.mark.parametrize(
    "change", [{"axis": 1}, {"value": 1.0}, {"extra_use": True}], ids=["axis", "value", "use"]
)
def test_other_guards_stay(change):
    model = guarded(**change)
    before = [node.op_type for node in model.graph]
    tune_for_cpu(model)
    assert [node.op_type for node in model.graph] == before


def test_attention_reads_and_writes_rows(case, tmp_path):
    """With batch and tokens dynamic, and a mask that is for all queries."""
    _, args = case
    torch.manual_seed(0)
    model = Block().eval()
    ss1_compile.compress(model, warn_error=10, progress=False)
    axis = torch.export.Dim.DYNAMIC
    shapes = ({0: axis, 1: axis}, {0: axis, 1: axis})
    path = tmp_path / "m.onnx"
    assert export_onnx(model, args, path, dynamic_shapes=shapes, opset=23).max_error < 1e-5
    nodes = {node.op_type: node for node in onnx.load(path).graph.node}
    assert not {"Transpose", "Reshape"} & set(nodes)
    counts = {a.name: a.i for a in nodes["Attention"].attribute if a.name.endswith("num_heads")}
    assert counts == {"q_num_heads": 4, "kv_num_heads": 4}


def attention(swap="0,2,1,3", back="0,2,1,3", heads="H", output="Y"):
    """Two query heads share one of the keys and values."""
    shape = "b, t, 8" if output == "Y" else "b, 2, t, 4"
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    rows (float[b, t, 8] q, float[b, s, 4] k, float[b, s, 4] v, int64[4] H, bool[t, s] mask)
      => (float[{shape}] {output})
    <int64[4] split = {{0, 0, 2, 4}}, int64[4] one = {{0, 0, 1, 4}}, int64[3] rows = {{0, 0, 8}}>
    {{
      q4 = Reshape ({"q, split" if heads == "split" else "q, H"})
      k4 = Reshape (k, one)
      v4 = Reshape (v, one)
      qt = Transpose <perm = [0,2,1,3]> (q4)
      kt = Transpose <perm = [{swap}]> (k4)
      vt = Transpose <perm = [{swap}]> (v4)
      each = Attention (qt, kt, vt, mask)
      back = Transpose <perm = [{back}]> (each)
      Y = Reshape (back, rows)
    }}"""
    inferred = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)
    return ir.from_proto(inferred)


def test_heads_may_share_keys():
    rng = np.random.default_rng()
    feeds = {
        "q": rng.standard_normal((3, 5, 8), np.float32),
        "k": rng.standard_normal((3, 6, 4), np.float32),
        "v": rng.standard_normal((3, 6, 4), np.float32),
        "H": np.array([0, 0, 2, 4]),
        "mask": rng.random((5, 6)) < 0.5,
    }
    feeds["mask"][:, 0] = True
    expected = onnx.reference.ReferenceEvaluator(ir.to_proto(attention(heads="split"))).run(
        ["Y"], feeds
    )[0]
    model = attention(heads="split")
    tune_for_cpu(model)
    assert [node.op_type for node in model.graph] == ["Attention"]
    assert np.allclose(run(model, feeds), expected, atol=1e-5)
    found = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(["Y"], feeds)[0]
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"heads": "H"}, {"swap": "0,2,3,1"}, {"back": "1,2,0,3"}, {"output": "each"}],
    ids=["heads unknown", "keys transposed", "another order", "heads are the output"],
)
def test_other_attention_stays(change):
    model = attention(**{"heads": "split", **change})
    before = [node.op_type for node in model.graph]
    tune_for_cpu(model)
    assert [node.op_type for node in model.graph] == before
