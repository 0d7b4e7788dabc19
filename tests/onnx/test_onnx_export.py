import dataclasses
import json
import os

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx_support import DYNAMIC, LearnedLinear, QuantizedLinear, small_model
from torch import nn
from typer.testing import CliRunner

import ss1_compile
from ss1_compile import SS1Config, export_onnx, from_onnx
from ss1_compile.cli import app
from ss1_compile.errors import ConfigError, ExportError, VerificationError
from ss1_compile.kernels.quantize import dequantize
from ss1_compile.onnx import export, functions, inline, onnx_translation_table, verification
from ss1_compile.onnx.operators import DOMAIN
from ss1_compile.onnx.runner import relative_error

X = torch.randn(2, 5, 72)
AXES = ({0: DYNAMIC, 1: DYNAMIC},)


@pytest.fixture(scope="module")
def program():
    return torch.export.export(small_model(), (X,), dynamic_shapes=AXES)


def domains(path):
    model = onnx.load(path)
    return {node.domain for node in model.graph.node}, {f.name for f in model.functions}


@pytest.mark.parametrize("form", ["function", "standard", "custom"])
def test_forms(program, form, tmp_path):
    path = tmp_path / "model.onnx"
    report = export_onnx(program, (X,), path, form=form)
    assert report.max_error < 1e-5
    assert len(report.shapes) == 4  # the example, larger, about twice, and one row
    assert report.file_bytes == path.stat().st_size
    assert os.listdir(tmp_path) == ["model.onnx"]
    used, bodies = domains(path)
    assert (DOMAIN in used) == (form != "standard")
    assert bodies == ({"SS1Linear"} if form == "function" else set())
    if form == "custom":
        with pytest.raises(Exception, match="SS1Linear"):
            ort.InferenceSession(path)
        onnx.save(inline(onnx.load(path)), path)
        assert domains(path) == ({""}, set())
    found = torch.from_numpy(ort.InferenceSession(path).run(None, {"input": X.numpy()})[0])
    assert relative_error(found, program.module()(X)) < 1e-5


@pytest.mark.parametrize("quantization", ["int8_weight_only", "int8_dynamic"])
def test_int8(program, quantization, tmp_path):
    path = tmp_path / "model.onnx"
    report = export_onnx(program, (X,), path, quantization=quantization)
    assert report.max_error < (1e-2 if quantization == "int8_dynamic" else 1e-5)
    model = onnx.load(path)
    stored = {i.name: i for i in model.graph.initializer}
    assert stored["0.z"].data_type == onnx.TensorProto.INT8
    assert {0.0}.isdisjoint(onnx.numpy_helper.to_array(stored["0.z_scale"]).ravel().tolist())
    codes = onnx.numpy_helper.to_array(stored["0.z"])
    assert np.abs(codes).max() == 63
    assert np.abs(codes.astype(int)).max(axis=1).min() == 63  # a scale per row
    found = torch.from_numpy(ort.InferenceSession(path).run(None, {"input": X.numpy()})[0])
    assert relative_error(found, program.module()(X)) < 0.05  # against the floating model
    full = export_onnx(
        program, (X,), path, quantization="int8_weight_only", reduce_range=False, verify=False
    )
    assert full.max_error is None
    codes = onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[1])
    assert np.abs(codes.astype(int)).max() in (127, 0) or codes.dtype != np.int8


def test_dynamic_int8_compiles_to_the_fused_kernel(program, tmp_path):
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    export_onnx(program, (X,), path, quantization="int8_dynamic", verify=False)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    ort.InferenceSession(path, options)
    ops = [node.op_type for node in onnx.load(optimized).graph.node]
    assert ops.count("MatMulIntegerToFloat") == 8  # two layers of four column blocks
    assert not {"MatMulInteger", "Range", "Equal", "Mod", "Unsqueeze"} & set(ops)  # all folded
    assert ops.count("Transpose") == 2  # each layer's sketch, back to rows


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-3), (torch.bfloat16, 4e-2)])
def test_narrow_dtypes(dtype, limit, tmp_path):
    layer = nn.Sequential(small_model()[0]).to(dtype).eval()
    report = export_onnx(layer, (X.to(dtype),), tmp_path / "m.onnx", dynamic_shapes=AXES)
    assert report.max_error < limit
    assert report.runtime == ("onnxruntime" if dtype == torch.float16 else "onnx.reference")
    assert report.layers[0].dtype == str(dtype).removeprefix("torch.")


def test_learned_sketch_and_exported_programs(tmp_path):
    model = nn.Sequential(LearnedLinear(72, 40, 3, 8), LearnedLinear(40, 34, 2, 8, 2)).eval()
    report = export_onnx(model, (X,), tmp_path / "m.onnx", dynamic_shapes=AXES)
    assert {layer.op for layer in report.layers} == {"SS1LearnedLinear"}
    assert report.max_error < 1e-5
    dense = torch.export.export(nn.Sequential(nn.Linear(64, 48)).eval(), (torch.randn(3, 64),))
    compressed, _ = ss1_compile.compress_exported(dense, min_features=8, warn_error=10)
    report = export_onnx(compressed, (), tmp_path / "m.onnx", opset=23)
    assert report.max_error < 1e-5
    assert report.layers[0].name == "0"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", ["function", "standard"])
def test_quantised_layers(dynamic, form, tmp_path):
    """A model that has ``ss1::linear_quantized``, of either kind of sketch."""
    model = nn.Sequential(
        QuantizedLinear(small_model()[0], dynamic),
        nn.GELU(),
        QuantizedLinear(LearnedLinear(96, 34, 3, 8, 2), dynamic),
    ).eval()
    path = tmp_path / "m.onnx"
    report = export_onnx(model, (X,), path, form=form, dynamic_shapes=AXES)
    assert report.max_error < (1e-2 if dynamic else 1e-5)
    suffix = "Int8PerToken" if dynamic else "Int8"
    assert [r.op for r in report.layers] == [f"SS1Linear{suffix}", f"SS1LearnedLinear{suffix}"]
    assert report.linear_bytes < report.linear_bytes_dense / 3
    if form == "function":
        layer = from_onnx(path)["0"]
        assert torch.equal(layer.z, dequantize(model[0].z, model[0].scale))


def test_float8_layers_are_refused_with_the_mend(tmp_path):
    model = nn.Sequential(QuantizedLinear(small_model()[0], True, torch.float8_e4m3fn)).eval()
    with pytest.raises(ExportError, match="quantise to int8"):
        export_onnx(model, (X,), tmp_path / "m.onnx", dynamic_shapes=AXES)


def test_metadata_and_no_local_paths(program, tmp_path):
    path = tmp_path / "m.onnx"
    config = SS1Config(reduction=4, seed=7)
    export_onnx(program, (X,), path, config=config)
    props = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(props["ss1.config"])["seed"] == 7
    rows = json.loads(props["ss1.layers"])
    assert [(r["name"], r["reduction"], r["block_k"], r["num_hashes"]) for r in rows] == [
        ("0", 4, 16, 4),
        ("2", 4, 16, 4),
    ]
    content = path.read_bytes()
    for needle in (torch.__file__, ss1_compile.__file__, __file__, os.getcwd(), "stack_trace"):
        assert os.path.dirname(needle).encode() not in content or needle == "stack_trace"
        assert needle.encode() not in content


def test_external_data(program, tmp_path):
    path = tmp_path / "m.onnx"
    report = export_onnx(program, (X,), path, external_data=True)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert report.file_bytes == sum((tmp_path / f).stat().st_size for f in os.listdir(tmp_path))
    again = ort.InferenceSession(path).run(None, {"input": X.numpy()})[0]
    assert relative_error(torch.from_numpy(again), program.module()(X)) < 1e-5
    export_onnx(program, (X,), path)
    assert os.listdir(tmp_path) == ["m.onnx"]  # no stale data left


def test_equal_sketches_are_stored_once(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.q(x) * self.k(x)

    model = Attention().eval()
    ss1_compile.compress(model, warn_error=10, progress=False)
    path = tmp_path / "m.onnx"
    export_onnx(model, (torch.randn(3, 64),), path)
    assert sum(i.name.endswith("sketch") for i in onnx.load(path).graph.initializer) == 1


def test_speed_and_size_against_the_dense_file(program, tmp_path):
    dense = tmp_path / "dense.onnx"
    model = nn.Sequential(nn.Linear(72, 96), nn.GELU(), nn.Linear(96, 34, False)).eval()
    torch.onnx.export(model, (X,), dense, dynamo=True, opset_version=20, verbose=False)
    report = export_onnx(program, (X,), tmp_path / "m.onnx", dense=dense)
    assert report.speedup > 0
    assert report.linear_bytes_dense == 4 * (72 * 96 + 96 + 96 * 34)
    assert report.linear_bytes < report.linear_bytes_dense / 2
    assert "speed of the dense file" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["linear_bytes"] == report.linear_bytes


def test_a_wrong_body_is_caught_and_nothing_is_written(program, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"an earlier file")
    wrong = [
        line.replace("Where (negative, any, one)", "Where (negative, one, any)")
        for line in functions._ROTATION
    ]
    assert wrong != functions._ROTATION
    monkeypatch.setattr(functions, "_ROTATION", wrong)
    with pytest.raises(VerificationError, match="output 0 differs from PyTorch"):
        export_onnx(program, (X,), path)
    assert path.read_bytes() == b"an earlier file"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_models_that_amplify_rounding_pass_by_their_own_sensitivity(program, tmp_path, monkeypatch):
    """Where PyTorch's own output moves as far, no runtime can come closer."""
    path = tmp_path / "m.onnx"
    report = export_onnx(program, (X,), path, quantization="int8_dynamic")
    assert report.sensitivity < 5e-2  # two layers amplify nothing: a code or two that flip
    assert export_onnx(program, (X,), path).sensitivity is None  # rounding in float32 alone
    real = verification.oracle_of

    def far(program, quantization, levels, *, jitter=0.0):
        return real(program, quantization, levels, jitter=1e5 * jitter)

    monkeypatch.setattr(verification, "oracle_of", far)
    monkeypatch.setattr(verification, "INT8_TOLERANCE", 0.0)
    report = export_onnx(program, (X,), path, quantization="int8_dynamic")
    assert report.sensitivity > report.max_error


def test_saturating_products_are_caught(tmp_path, monkeypatch):
    """The verification is against exact integers, so a kernel that overflows cannot pass."""
    real = ort.InferenceSession.run

    def saturated(self, names, feeds, options=None):
        return [y * np.float32(0.95) for y in real(self, names, feeds, options)]

    monkeypatch.setattr(ort.InferenceSession, "run", saturated)
    with pytest.raises(VerificationError, match="5.00e-02"):
        export_onnx(small_model(), (X,), tmp_path / "m.onnx", quantization="int8_dynamic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "plain"}, "form must be one of"),
        ({"opset": 17}, "opset must be one of 18 … 25"),
        ({"opset": 26}, "opset must be one of 18 … 25"),
        ({"quantization": "int4"}, "quantization must be one of"),
        ({"external_data": "yes"}, "external_data must be"),
        ({"path": "/nowhere/m.onnx"}, "there is no directory"),
        ({"dynamic_shapes": AXES}, "the program has its own"),
        ({"model": "m"}, "must be an nn.Module or an ExportedProgram"),
        ({"model": nn.Linear(3, 3)}, "call model.eval"),
    ],
)
def test_bad_arguments(program, change, message, tmp_path):
    given = {"model": program, "args": (X,), "path": tmp_path / "m.onnx", **change}
    with pytest.raises(ConfigError, match=message):
        export_onnx(**given)
    assert not os.listdir(tmp_path)


def test_models_that_cannot_be_exported(tmp_path):
    with pytest.raises(ExportError, match="no SS1 layer"):
        export_onnx(nn.Linear(8, 8).eval(), (torch.randn(2, 8),), tmp_path / "m.onnx")

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="torch.export.export cannot export"):
        export_onnx(Branching().eval(), (torch.randn(2, 8),), tmp_path / "m.onnx")
    assert not os.listdir(tmp_path)


def test_the_translation_table_alone(program, tmp_path):
    """For those who call torch.onnx.export themselves."""
    exported = torch.onnx.export(
        program, dynamo=True, custom_translation_table=onnx_translation_table(), verbose=False
    )
    ss1_compile.onnx.attach_functions(exported.model)
    exported.save(tmp_path / "m.onnx")
    found = ort.InferenceSession(tmp_path / "m.onnx").run(None, {"input": X.numpy()})[0]
    assert relative_error(torch.from_numpy(found), program.module()(X)) < 1e-5


def test_reports_are_plain_data(program, tmp_path):
    report = export_onnx(program, (X,), tmp_path / "m.onnx", verify=False)
    assert "not verified" in str(report)
    assert {f.name for f in dataclasses.fields(report)} <= set(report.to_dict())
    assert tuple(export.OPSETS) == (18, 19, 20, 21, 22, 23, 24, 25)


def test_the_command(program, tmp_path):
    torch.export.save(program, tmp_path / "p.pt2")
    run = CliRunner().invoke(
        app, ["export", str(tmp_path / "p.pt2"), "--onnx", str(tmp_path / "m.onnx")]
    )
    assert run.exit_code == 0, run.output
    assert "relative error" in run.output
    assert (tmp_path / "m.onnx").is_file()
    (tmp_path / "p.pt2").write_bytes(b"nonsense")
    run = CliRunner().invoke(
        app, ["export", str(tmp_path / "p.pt2"), "--onnx", str(tmp_path / "n.onnx")]
    )
    assert run.exit_code == 2
    assert "CheckpointError" in run.output


@pytest.mark.parametrize("quantization", ["int8_weight_only", "int8_dynamic"])
def test_models_that_compress_quantised(quantization, tmp_path):
    """``compress(…, quantization=…)``: codes and scales as they are in PyTorch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(72, 96), nn.GELU(), nn.Linear(96, 34, False)).eval()
    ss1_compile.compress(
        model, block_k=16, min_features=8, warn_error=10, progress=False, quantization=quantization
    )
    assert model[0].quantization == quantization
    path = tmp_path / "m.onnx"
    report = export_onnx(model, (X,), path, dynamic_shapes=AXES)
    assert report.max_error < (1e-2 if "dynamic" in quantization else 1e-5)
    suffix = "Int8PerToken" if "dynamic" in quantization else "Int8"
    assert [layer.op for layer in report.layers] == [f"SS1Linear{suffix}"] * 2
    assert report.linear_bytes < report.linear_bytes_dense / 7
    layers = from_onnx(path)
    for name, layer in layers.items():
        original = model.get_submodule(name)
        assert layer.structure == original.structure
        assert torch.equal(layer.z, dequantize(original.z, original.scale, torch.float32))
    expected = model(X)
    from_onnx(path, model, dequantize=False)
    assert model[0].quantization == quantization
    assert torch.equal(model(X), expected)
