"""The learned sketch through every door: compress, the backend, exported programs, files."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn

import ss1_compile
from ss1_compile import SS1Config, calibrate, compress, compress_exported
from ss1_compile.errors import CheckpointError, StructureError
from ss1_compile.experts import SS1ExpertLinear, project_experts
from ss1_compile.kernels import reference
from ss1_compile.learned import LearnedStructure
from ss1_compile.modules import SS1Linear
from ss1_compile.serialization.checkpoint import CONFIG_FILE, read_config

OPTIONS = {"projection": "learned", "reduction": 1.7, "group_size": 32, "warn_error": 1.0}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40, bias=False)).eval()


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(200, 8) @ torch.randn(8, 64) + 0.2 * torch.randn(200, 64)


def compressed(x: torch.Tensor, **options) -> nn.Sequential:
    model = mlp()
    compress(model, calibration=[x], progress=False, **(OPTIONS | options))
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(64, 48, 16, 5, 2), (37, 20, 10, 3, 1)])
def test_the_layer_computes_with_its_sketch(sizes, bias):
    torch.manual_seed(2)
    structure = LearnedStructure(*sizes)
    layer = SS1Linear(structure, bias)
    assert layer.structure == structure
    assert layer.reduction == structure.reduction
    assert set(dict(layer.named_parameters())) == {"z", "sketch"} | ({"bias"} if bias else set())
    x = torch.randn(2, 5, sizes[0])
    expected = reference.linear(x, layer.sketch, layer.z, layer.bias)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.to_linear()(x).double(), expected, rtol=1e-5, atol=1e-5)
    for text in (f"group_size={sizes[2]}", f"rank={sizes[3]}", "block_k"):
        assert (text in repr(layer)) == (text != "block_k")
    assert layer.half().sketch.dtype == torch.float16


def test_a_fresh_layer_starts_like_a_linear():
    torch.manual_seed(3)
    layer = SS1Linear(LearnedStructure.create(256, 256, 2))
    assert layer.weight.std().item() == pytest.approx((1 / 3 / 256) ** 0.5, rel=0.05)


def test_the_blocks_train():
    torch.manual_seed(4)
    layer = SS1Linear(LearnedStructure(24, 16, 8, 3)).double()
    x = torch.randn(6, 24, dtype=torch.float64)
    g = torch.randn(6, 16, dtype=torch.float64)
    operands = (layer.z, layer.sketch, layer.bias)
    ours = torch.autograd.grad(layer(x), operands, g)
    dense = torch.autograd.grad(nn.functional.linear(x, layer.weight, layer.bias), operands, g)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b)


def test_state_dicts_are_validated(x):
    layer = compressed(x)[0]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = SS1Linear(layer.structure)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), layer(x))
    state = dict(layer.state_dict())
    with pytest.raises(StructureError, match="kinds of sketch differ"):
        other.load_state_dict(state | {"sketch": torch.zeros(1, 2, 4, dtype=torch.int32)})
    with pytest.raises(StructureError, match="need 2"):
        other.load_state_dict(state | {"sketch": torch.zeros(1, 3, 32, 8)})


def test_compress_keeps_the_budget_and_the_report_says_so(x):
    dense = mlp()
    model = mlp()
    report = compress(model, calibration=[x], progress=False, **OPTIONS)
    for row, before, after in zip(report, (dense[0], dense[2]), (model[0], model[2]), strict=True):
        stored = after.z.numel() + after.sketch.numel()
        assert stored <= before.weight.numel() / 1.7
        assert row.reduction == pytest.approx(before.weight.numel() / stored)
        assert (row.projection, row.error_of) == ("learned", "output")
        biases = 0 if before.bias is None else before.bias.numel()
        assert row.bytes_after == 4 * (stored + biases)
        assert after.sketch.requires_grad
    # the reported errors hold
    y, y_hat = dense[0](x), model[0](x)
    measured = ((y_hat - y).norm() / (y - y.mean(0)).norm()).item()
    assert report["0"].error == pytest.approx(measured, rel=1e-3)


def test_frozen_weights_stay_frozen(x):
    model = mlp().requires_grad_(False)
    compress(model, calibration=[x], progress=False, **OPTIONS)
    assert not any(p.requires_grad for p in model.parameters())


def test_it_is_better_than_the_rotation_at_equal_parameters(x):
    learned, rotation = mlp(), mlp()
    ours = compress(learned, calibration=[x], progress=False, **(OPTIONS | {"reduction": 2}))
    theirs = compress(
        rotation,
        calibration=[x],
        projection="calibrated",
        progress=False,
        reduction=2,
        warn_error=1.0,
    )
    assert ours.bytes_after <= theirs.bytes_after
    assert ours["0"].error < 0.9 * theirs["0"].error


def test_c_1_is_exact(x):
    dense = mlp()
    model = compressed(x, reduction=1)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)


def test_a_known_structure_is_recovered(x):
    healed = compressed(x)
    dense = nn.Sequential(healed[0].to_linear(), nn.GELU(), healed[2].to_linear())
    structures = {"0": healed[0].structure, "2": healed[2].structure}
    report = compress(dense, structures=structures, progress=False)
    assert all(row.error < 1e-5 for row in report)
    torch.testing.assert_close(dense(x), healed(x), rtol=1e-4, atol=1e-4)


def test_the_backend_binds_the_blocks_and_follows_the_weights(x):
    model, by_hand = mlp(), compressed(x)
    calibrate(model, [x], weigh_outputs=True, progress=False)
    options = OPTIONS | {"inner_backend": "eager"}
    compiled = torch.compile(model, backend="ss1", options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), by_hand(x))
        model[0].weight.copy_(torch.randn(96, 64) / 8)
        model[0].bias.zero_()
        after = mlp()
        after.load_state_dict(model.state_dict())
        # the gradients were those of the weight before
        options = OPTIONS | {"include": ("0",), "weigh_outputs": False}
        compress(after, calibration=[x], progress=False, **options)
        y = compiled(x)
        after[2] = by_hand[2]
        torch.testing.assert_close(y, after(x), rtol=1e-4, atol=1e-4)


def test_exported_programs_carry_the_blocks(x):
    model, by_hand = mlp(), compressed(x)
    statistics = calibrate(model, [x], weigh_outputs=True, progress=False)
    program, report = compress_exported(
        torch.export.export(model, (x,)), calibration=statistics, **OPTIONS
    )
    assert {"0.z", "0.sketch", "2.z", "2.sketch"} <= set(program.state_dict)
    assert "0.weight" not in program.state_dict
    assert isinstance(program.state_dict["0.sketch"], nn.Parameter)
    torch.testing.assert_close(program.module()(x), by_hand(x))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), by_hand(x))
    assert report["0"].projection == "learned"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded(x, tmp_path, dtype):
    model = compressed(x).to(dtype)
    config = SS1Config(**OPTIONS)
    ss1_compile.save(model, tmp_path, config=config)
    saved = read_config(tmp_path)
    assert saved.config == config
    assert saved.format_version == 2
    assert saved.layers["0"].rank == model[0].structure.rank
    loaded = ss1_compile.load(mlp().to("meta"), tmp_path)
    assert torch.equal(loaded(x.to(dtype)), model(x.to(dtype)))
    assert isinstance(loaded[0].sketch, nn.Parameter)
    assert loaded[0].structure == model[0].structure


def test_models_of_rotations_are_written_for_earlier_readers(tmp_path):
    model = mlp()
    compress(model, reduction=2, warn_error=1.0, progress=False)
    ss1_compile.save(model, tmp_path)
    document = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert document["format_version"] == 1
    assert "kind" not in document["layers"]["0"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 5, "rank is 5"),
        ("group_size", 64, "group_size is 64"),
        ("kind", "rotation", "lacks"),
        ("kind", "other", "kind must be one of"),
        ("dtype", "float16", "must be float16"),
        ("num_hashes", 0, "num_hashes"),
    ],
)
def test_tampered_sizes_are_found(x, tmp_path, field, value, message):
    ss1_compile.save(compressed(x), tmp_path)
    document = json.loads((tmp_path / CONFIG_FILE).read_text())
    document["layers"]["0"][field] = value
    (tmp_path / CONFIG_FILE).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        ss1_compile.load(mlp(), tmp_path)


def test_blocks_that_are_not_finite_are_not_saved(x, tmp_path):
    model = compressed(x)
    with torch.no_grad():
        model[0].sketch[0, 0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="sketch has values that are not finite"):
        ss1_compile.save(model, tmp_path)


@pytest.mark.parametrize("hashes", [1, 2])
def test_experts_share_blocks_fitted_to_all_of_them(hashes):
    torch.manual_seed(5)
    experts, n, k = 3, 10, 24
    structure = LearnedStructure(k, n, 12, 4, hashes)
    blocks = torch.randn(structure.sketch_shape, dtype=torch.float64)
    z = torch.randn(experts, n, structure.reduced_features, dtype=torch.float64)
    w = torch.stack([structure.materialize(each, blocks) for each in z])
    exact = project_experts(w, structure)
    assert exact.error < 1e-5
    layer = SS1ExpertLinear(structure, nn.Parameter(exact.z), exact.sketch)
    torch.testing.assert_close(layer.weight, w)
    assert layer.structure == structure
    x = torch.randn(7, k, dtype=torch.float64)
    y = layer(x, torch.tensor([2, 2, 7]))
    torch.testing.assert_close(y[:2], x[:2] @ w[0].T)
    torch.testing.assert_close(y[2:], x[2:] @ w[2].T)
    rough = project_experts(torch.randn_like(w), structure)
    shared = torch.stack([structure.materialize(each, rough.sketch) for each in rough.z])
    assert shared.shape == w.shape
    assert 0 < rough.error < 1
