"""Quantised ``SS1Linear``: casts, copies, state dicts, files, gradients, and every door."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ss1_compile
from ss1_compile import SS1Linear
from ss1_compile.backend import BackendOptions
from ss1_compile.errors import CheckpointError, ConfigError, QuantizationError
from ss1_compile.kernels.quantize import dequantize, quantize_rows
from ss1_compile.learned import LearnedStructure
from ss1_compile.serialization.checkpoint import sha256_of
from ss1_compile.structure import SS1Structure

METHODS = ["int8_weight_only", "int8_dynamic", "fp8_dynamic"]
every_method = pytest.mark.parametrize("method", METHODS)
both_kinds = pytest.mark.parametrize("learned", [False, True], ids=["rotation", "learned"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def net():
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 40, bias=False))


def compressed(method, learned=False, **options):
    options = {"projection": "learned"} | options if learned else options
    model = net()
    options = {"reduction": 2, "quantization": method, "progress": False, "warn_error": 2} | options
    ss1_compile.compress(model, **options)
    return model.eval()


def layer(method="int8_dynamic", learned=False):
    structure = LearnedStructure(48, 20, 24, 8) if learned else SS1Structure.create(48, 20, 3)
    dtype = torch.float8_e4m3fn if method == "fp8_dynamic" else torch.int8
    z, scale = quantize_rows(torch.randn(20, structure.reduced_features), dtype=dtype)
    sketch = nn.Parameter(torch.randn(structure.sketch_shape)) if learned else None
    bias = nn.Parameter(torch.randn(20))
    dynamic = method != "int8_weight_only"
    return SS1Linear.from_tensors(structure, z, bias, sketch, scale=scale, dynamic=dynamic)


@every_method
@both_kinds
def test_computes_what_its_dense_weight_does(method, learned):
    made = layer(method, learned)
    assert made.quantization == method
    assert f"quantization={method!r}" in repr(made)
    x = torch.randn(3, 5, 48)
    y = x.double() @ made.weight.double().t() + made.bias.double()
    error = (made(x).double() - y).norm() / y.norm()
    # a step of int8 is 1/127 of the largest value, float8 has three bits of mantissa
    assert error < {"int8_weight_only": 1e-6, "int8_dynamic": 0.02, "fp8_dynamic": 0.06}[method]
    linear = made.to_linear()
    torch.testing.assert_close(linear(x).double(), y, rtol=1e-4, atol=1e-4)


@every_method
@both_kinds
def test_casts_leave_z_and_its_scale_alone(method, learned):
    made = layer(method, learned)
    for cast, dtype in (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.to("cpu", torch.float16), torch.float16),
        (lambda m: m.float(), torch.float32),
    ):
        low = cast(copy.deepcopy(made))
        assert torch.equal(low.z.view(torch.int8), made.z.view(torch.int8))
        assert low.z.dtype == made.z.dtype
        assert torch.equal(low.scale, made.scale)
        assert low.scale.dtype == torch.float32
        assert {low.dtype, low.weight.dtype, low.bias.dtype} == {dtype}
        assert low(torch.randn(2, 48, dtype=dtype)).dtype == dtype
    moved = copy.deepcopy(made).to("meta")
    assert moved.z.is_meta
    assert moved.scale.is_meta
    assert moved.scale.dtype == torch.float32
    assert moved.to_empty(device="cpu").z.dtype == made.z.dtype


@every_method
@both_kinds
def test_copies_and_torch_save(method, learned):
    made = layer(method, learned)
    x = torch.randn(4, 48)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for twin in (copy.deepcopy(made), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), made(x))
        assert twin.z.data_ptr() != made.z.data_ptr()
        assert twin.dtype == made.dtype


def test_layers_pickled_before_there_were_quantised_ones():
    made = SS1Linear(SS1Structure.create(48, 20, 3))
    state = made.__getstate__() if hasattr(made, "__getstate__") else dict(made.__dict__)
    state = copy.deepcopy(state)
    for name in ("dynamic", "_float_dtype"):
        del state[name]
    del state["_buffers"]["scale"]
    old = SS1Linear.__new__(SS1Linear)
    old.__setstate__(state)
    x = torch.randn(4, 48)
    assert torch.equal(old(x), made(x))
    assert old.half().dtype == torch.float16


@every_method
def test_state_dict(method):
    made, other = layer(method), layer(method)
    assert set(made.state_dict()) == {"z", "scale", "bias", "sketch"}
    assert set(dict(made.named_parameters())) == {"bias"}
    x = torch.randn(4, 48)
    other(x)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x))


def test_state_dicts_of_another_kind_or_with_bad_scales_are_refused():
    made = layer("int8_dynamic")
    plain = SS1Linear(SS1Structure.create(48, 20, 3))
    with pytest.raises(QuantizationError, match=r"z in the state dict is not quantised"):
        made.load_state_dict(plain.state_dict(), strict=False)
    with pytest.raises(QuantizationError, match=r"is torch.int8, the layer's is not quantised"):
        plain.load_state_dict(made.state_dict(), strict=False)
    with pytest.raises(QuantizationError, match=r"is torch.float8_e4m3fn, the layer's is"):
        made.load_state_dict(layer("fp8_dynamic").state_dict())
    for scale, match in (
        (made.scale.double(), "must be float32"),
        (-made.scale, "must be positive and finite"),
        (made.scale * float("nan"), "must be positive and finite"),
    ):
        with pytest.raises(QuantizationError, match=rf"^scale in the state dict {match}"):
            made.load_state_dict(made.state_dict() | {"scale": scale})


bad = {
    "must be int8 or float8": {"z": torch.randn(20, 16)},
    "must be float32": {"scale": torch.ones(20)},
    "3 scales per row do not divide 16": {"scale": torch.ones(20, 3), "dynamic": False},
    "a row of z has one scale, got 2": {"scale": torch.ones(20, 2)},
    "not torch.float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("match", bad)
def test_bad_tensors_are_refused(match):
    given = {
        "z": torch.ones(20, 16, dtype=torch.int8),
        "bias": None,
        "scale": torch.ones(20, 1),
        "dynamic": True,
    } | bad[match]
    with pytest.raises(QuantizationError, match=match):
        SS1Linear.from_tensors(SS1Structure.create(48, 20, 3), **given)


# --- gradients ----------------------------------------------------------------------------------


@every_method
@both_kinds
def test_gradients_pass_through_and_z_is_frozen(method, learned):
    made = layer(method, learned)
    x = torch.randn(4, 48, requires_grad=True)
    g = torch.randn(4, 20)
    made(x).backward(g)
    torch.testing.assert_close(x.grad, g @ made.weight.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.bias.grad, g.sum(0))
    assert (made.sketch.grad is not None) == learned
    made.scale.requires_grad_()
    with pytest.raises(RuntimeError, match="z and its scale are frozen"):
        made(x)


# --- the doors ----------------------------------------------------------------------------------


@every_method
@both_kinds
def test_every_door_gives_the_same_layer(method, learned):
    model, options = net().eval(), {"reduction": 2, "quantization": method, "warn_error": 2}
    options |= {"projection": "learned"} if learned else {}
    x = torch.randn(6, 48)
    module = copy.deepcopy(model)
    ss1_compile.compress(module, progress=False, **options)
    expected = module(x)
    program, rows = ss1_compile.compress_exported(torch.export.export(model, (x,)), **options)
    assert torch.equal(program.module()(x), expected)
    assert {n: t.dtype for n, t in program.state_dict.items() if n.endswith((".z", ".scale"))} == {
        name: tensor.dtype
        for name, tensor in module.state_dict().items()
        if name.endswith((".z", ".scale"))
    }
    report = ss1_compile.Report()
    graph_options = {**options, "inner_backend": "eager", "report": report}
    with torch.no_grad():
        compiled = torch.compile(model, backend="ss1", options=graph_options)
        assert torch.equal(compiled(x), expected)
        with torch.no_grad():
            model[0].weight.mul_(2)  # projected and quantised again
        ss1_compile.compress(changed := copy.deepcopy(model), progress=False, **options)
        assert torch.equal(compiled(x), changed(x))
    for table in (rows, report):
        assert [layer.quantization for layer in table] == [method] * 2
        assert [layer.bits for layer in table] == [8, 8]


@pytest.mark.parametrize("method", ["int8_dynamic", "int8_weight_only"])
def test_compiled_and_fused_graphs_leave_quantised_layers_alone(method):
    model = compressed(method, overrides={"2": {"quantization": None}})
    x = torch.randn(6, 48)
    report = ss1_compile.Report()
    options = {"include": (), "allow_empty": True, "fuse": True, "inner_backend": "eager"}
    with torch.no_grad():
        compiled = torch.compile(model, backend="ss1", options=options | {"report": report})
        torch.testing.assert_close(compiled(x), model(x))


def test_tensorrt_takes_weight_only():
    options = {"inner_backend": "torch_tensorrt", "quantization": "int8_dynamic"}
    with pytest.raises(ConfigError, match="int8_weight_only"):
        BackendOptions.parse(options, None)
    options = {**options, "quantization": None, "overrides": {"0": {"quantization": "fp8_dynamic"}}}
    with pytest.raises(ConfigError, match="fp8_dynamic"):
        BackendOptions.parse(options, None)
    BackendOptions.parse({**options, "overrides": {}, "quantization": "int8_weight_only"}, None)


# --- files --------------------------------------------------------------------------------------


@every_method
@both_kinds
def test_save_and_load(method, learned, tmp_path):
    model = compressed(method, learned).bfloat16()
    ss1_compile.save(model, tmp_path)
    document = json.loads((tmp_path / "ss1_config.json").read_text())
    assert document["format_version"] == 4
    assert document["layers"]["0"]["quantization"] == method
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    skeletons = (net(), compressed(None, learned))
    with torch.device("meta"):
        skeletons = (*skeletons, net())
    for skeleton in skeletons:
        loaded = ss1_compile.load(skeleton, tmp_path)
        assert torch.equal(loaded(x), model(x))
        assert loaded[0].quantization == method
        assert loaded[2].dtype == torch.bfloat16


def test_unquantised_models_keep_the_earlier_format(tmp_path):
    ss1_compile.save(compressed(None), tmp_path)
    document = json.loads((tmp_path / "ss1_config.json").read_text())
    assert document["format_version"] == 1
    assert "quantization" not in document["layers"]["0"]


def set_layer(**values):
    return lambda document, tensors: document["layers"]["0"].update(values)


def set_tensor(name, value):
    return lambda document, tensors: tensors.update({name: value(tensors[name])})


tampered = {
    "quantization must be one of": set_layer(quantization="int4"),
    "quantization_groups must be an integer": set_layer(quantization_groups=0),
    "quantization_groups = 5 does not fit": set_layer(quantization_groups=5),
    "quantization_groups = 2 does not fit": set_layer(quantization_groups=2),
    "lacks": lambda document, tensors: document["layers"]["0"].pop("quantization_groups"),
    "experts are never quantised": set_layer(experts=2),
    "float32 or less": set_layer(dtype="float64"),
    "z must be float8_e4m3fn": set_layer(quantization="fp8_dynamic"),
    "z must be int8": set_tensor("0.z", lambda z: z.float()),
    "values outside -127": set_tensor("0.z", lambda z: z.clamp(max=-128)),
    "scale must be float32": set_tensor("0.scale", lambda s: s.double()),
    "not positive": set_tensor("0.scale", lambda s: -s),
    "not finite": set_tensor("0.scale", lambda s: s * float("inf")),
    "scale is missing": lambda document, tensors: tensors.pop("0.scale"),
}


@pytest.mark.parametrize("match", tampered)
def test_tampered_files_are_refused(match, tmp_path):
    ss1_compile.save(compressed("int8_dynamic"), tmp_path)
    config, stored = tmp_path / "ss1_config.json", tmp_path / "model.safetensors"
    document, tensors = json.loads(config.read_text()), load_file(stored)
    tampered[match](document, tensors)
    save_file(tensors, stored, {"ss1_aliases": "{}"})
    document["tensors_sha256"] = sha256_of(stored)
    config.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=match):
        ss1_compile.load(net(), tmp_path)


def test_dequantized_rows_are_the_stored_ones():
    made = compressed("int8_weight_only", quantization_group_size=8)[0]
    z = dequantize(made.z, made.scale)
    assert torch.equal(made.weight, made.structure.materialize(z, made.sketch))
    assert made.scale.shape[1] == made.z.shape[1] // 8
