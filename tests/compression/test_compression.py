"""``compress``: exact at c = 1, complete in its report, and harmless when it fails."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from compression_support import D, make_model, poison, quiet, relative
from torch import nn

import ss1_compile
from ss1_compile import (
    CalibrationError,
    ConfigError,
    NothingToCompressError,
    ProjectionError,
    SS1Linear,
    SS1Structure,
    SS1Warning,
    compress,
)


def test_reduction_one_is_exact_and_everything_is_accounted_for():
    model, x = make_model(), torch.randn(5, D)
    expected = model(x)
    report = quiet(model, reduction=1)
    assert relative(model(x), expected) < 1e-5
    assert len(report) == 9
    assert report.left[0].name == "2"
    assert "min_features" in report.left[0].reason
    assert all(row.exact for row in report.compressed)


@pytest.mark.parametrize("reduction", [2, 3, 4, 7])
def test_each_layer_computes_with_its_materialised_weight(reduction):
    model, x = make_model(), torch.randn(5, D)
    quiet(model, reduction=reduction)
    dense = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, SS1Linear):
            dense.set_submodule(name, module.to_linear())
    assert relative(model(x), dense(x)) < 1e-5
    assert sum(isinstance(m, SS1Linear) for m in model.modules()) == 8


def test_parameters_fall_and_dense_weights_are_freed():
    model = make_model()
    dense = weakref.ref(model[0].up.weight)
    before = sum(p.numel() for p in model[0].up.parameters())
    report = quiet(model, reduction=4)
    gc.collect()
    assert dense() is None
    after = sum(p.numel() for p in model[0].up.parameters())
    assert after == (before - 3 * D) / 4 + 3 * D
    row = report["0.up"]
    assert row.bytes_before == before * 4
    assert row.bytes_after == after * 4 + model[0].up.sketch.numel() * 4


def test_keeps_dtype_mode_and_requires_grad():
    model = make_model().bfloat16()
    model[0].q.requires_grad_(False)
    model[1].train()
    quiet(model)
    assert model[0].q.z.dtype == torch.bfloat16
    assert not model[0].q.z.requires_grad
    assert model[0].k.z.requires_grad
    assert model[1].up.training
    assert not model[0].up.training


def test_trains_after_compression():
    model, x = make_model(), torch.randn(32, D)
    target = make_model(1)(x).detach()
    quiet(model, reduction=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_shared_module_is_compressed_once_under_all_its_names():
    model = make_model()
    model[1].q = model[0].q
    report = quiet(model)
    assert model[1].q is model[0].q
    assert isinstance(model[0].q, SS1Linear)
    assert [row.name for row in report].count("0.q") == 1


def test_hugging_face_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model, x = nn.Sequential(conv1d(2 * D, D), nn.Tanh()), torch.randn(2, 3, D)
    expected = model(x)
    report = quiet(model, reduction=1)
    assert relative(model(x), expected) < 1e-5
    assert report["0"].op == "Conv1D"
    assert report["0"].shape == (2 * D, D)


def test_averaging_warns_and_names_the_mend():
    with pytest.warns(SS1Warning, match="calibrate") as caught:
        compress(make_model(), progress=False)
    assert len([w for w in caught if w.category is SS1Warning]) == 1


def test_max_error_keeps_layers_dense():
    model = make_model()
    errors = {row.name: row.error for row in quiet(make_model()).compressed}
    limit = sorted(errors.values())[3]
    report = quiet(model, max_error=limit)
    assert {row.name for row in report.compressed} == {n for n, e in errors.items() if e <= limit}
    assert all(row.error > limit for row in report.left if row.error is not None)


FAILURES = {
    "non-finite weight": (poison, {}, ProjectionError, r"1\.down"),
    "non-finite data": (
        lambda m: m,
        {"calibration": [torch.full((4, D), float("inf"))]},
        CalibrationError,
        r"0\.q",
    ),
    "non-finite data, sequential": (
        lambda m: m,
        {"calibration": [torch.full((4, D), float("nan"))], "sequential": True},
        CalibrationError,
        r"0\.q",
    ),
    "weight fails late, sequential": (
        poison,
        {"calibration": [torch.randn(8, D)], "sequential": True},
        ProjectionError,
        r"1\.down",
    ),
    "no data": (lambda m: m, {"calibration": []}, CalibrationError, "empty|no "),
    "no statistics": (
        lambda m: m,
        {"projection": "calibrated"},
        CalibrationError,
        r"0\.q and 7 more",
    ),
    "sequential without data": (lambda m: m, {"sequential": True}, CalibrationError, "pass them"),
    "everything excluded": (
        lambda m: m,
        {"exclude": ("*",)},
        NothingToCompressError,
        "allow_empty",
    ),
    "unknown option": (lambda m: m, {"reducton": 2}, ConfigError, "did you mean 'reduction'"),
    "unknown structure": (
        lambda m: m,
        {"structures": {"nowhere": SS1Structure.create(D, D)}},
        ConfigError,
        "nowhere",
    ),
    "structure of another size": (
        lambda m: m,
        {"structures": {"0.up": SS1Structure.create(D, D)}},
        ConfigError,
        r"0\.up",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_compress_leaves_the_model_unchanged(name):
    prepare, options, error, message = FAILURES[name]
    model = prepare(make_model())
    modules = list(model.modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        quiet(model, **options)
    assert list(model.modules()) == modules
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), state[key].nan_to_num())


def test_reduction_larger_than_the_layer_is_a_reason_and_then_an_error():
    with pytest.raises(NothingToCompressError, match=f"reduction {D + 1} exceeds"):
        quiet(nn.Sequential(nn.Linear(D, D)), reduction=D + 1)


def test_bare_linear_and_meta_models_are_refused():
    with pytest.raises(ConfigError, match=r"nn\.Sequential"):
        quiet(nn.Linear(D, D))
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(ProjectionError, match="meta"):
        quiet(model)


def test_dry_run_reports_and_changes_nothing():
    model = make_model()
    modules = list(model.modules())
    planned = quiet(model, dry_run=True)
    assert list(model.modules()) == modules
    assert planned.to_dict() == quiet(model).to_dict()


def test_compile_compresses_and_compiles():
    torch._dynamo.reset()
    model, x = make_model(), torch.randn(6, D)
    report = ss1_compile.Report()
    fast = ss1_compile.compile(
        model, ss1_compile.SS1Config(warn_error=2.0), progress=False, report=report
    )
    with torch.no_grad():
        assert relative(fast(x), model(x)) < 1e-5
    assert isinstance(model[0].q, SS1Linear)
    assert len(report.compressed) == 8
    fast(x).sum().backward()  # and it trains
    assert model[0].q.z.grad is not None


LETTERS = ("q", "k", "v", "out")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layers_are_exact_and_compute_with_z(norm_first, activation, monkeypatch):
    def make():
        layer = nn.TransformerEncoderLayer(
            D, 4, 2 * D, 0.0, activation, batch_first=True, norm_first=norm_first
        )
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    torch.manual_seed(1)
    model, x = make(), torch.randn(3, 7, D)
    padding = torch.arange(7) >= torch.tensor([[7], [5], [6]])
    with torch.no_grad():
        expected, masked = model(x), model(x, src_key_padding_mask=padding)
        report = quiet(model, reduction=1, calibration=[x])
        assert {row.name for row in report.compressed} == {
            f"layers.{i}.{name}"
            for i in range(2)
            for name in ("linear1", "linear2", *(f"self_attn.{x}_proj" for x in LETTERS))
        }
        monkeypatch.setattr(SS1Structure, "materialize", None)  # nothing may compute the dense W
        assert relative(model(x), expected) < 1e-5
        kept = ~padding
        assert relative(model(x, src_key_padding_mask=padding)[kept], masked[kept]) < 1e-5


def test_encoder_layers_that_stay_dense_keep_their_fused_operator():
    layer = nn.TransformerEncoderLayer(D, 4, 2 * D, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(D, D)).eval()
    quiet(model, calibration=[torch.randn(2, 7, D)], sequential=True, dry_run=True)
    assert [layer.activation_relu_or_gelu for layer in model[0].layers] == [1, 1]
    quiet(model, exclude=["0.layers.0.*"])
    assert [layer.activation_relu_or_gelu for layer in model[0].layers] == [1, 0]


def test_falcon_linears_are_known_to_be_linear():
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    model, x = nn.Sequential(falcon.FalconLinear(D, 2 * D)), torch.randn(3, D)
    expected = model(x)
    assert not quiet(model, reduction=1).left
    assert relative(model(x), expected) < 1e-5
