"""``compress``: exact at c = 1, complete in its report, and harmless when it fails."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
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
    UnhandledLinearError,
    compress,
)
from ss1_compile.statistics import statistics_of

D = 64


def quiet(model, **options):
    return compress(model, progress=False, **{"warn_error": 2.0, **options})


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q, self.k = nn.Linear(D, D, bias=False), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 3 * D), nn.Linear(3 * D, D)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.q(h) * torch.sigmoid(self.k(h))
        return x + self.down(F.gelu(self.up(x)))


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block(), nn.Linear(D, 3)).eval()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


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


# --- left alone, with reasons -------------------------------------------------------------------


class Custom(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def with_hook():
    layer = nn.Linear(D, D)
    layer.register_forward_hook(lambda *_: None)
    return layer


def hooked_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(D, D))


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(D, D)
        self.head = nn.Linear(D, D, bias=False)
        self.head.weight = self.embedding.weight


LEFT = {
    "subclass": (lambda: Custom(D, D), "overrides forward"),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D)),
        "parametrised",
    ),
    "old weight norm": (hooked_weight_norm, "parametrised"),
    "hook": (with_hook, "hooks"),
    "tied": (TiedHead, "tied to 0.embedding.weight"),
    "attention subclass": (lambda: Attention(D, 4), "reads its weight directly"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_with_a_reason(name):
    make, reason = LEFT[name]
    model = nn.Sequential(make(), nn.Linear(D, D))
    report = quiet(model)
    assert isinstance(model[1], SS1Linear)
    assert report.left
    assert all(reason in row.reason for row in report.left)
    with pytest.raises(UnhandledLinearError, match="strict"):
        quiet(nn.Sequential(make(), nn.Linear(D, D)), strict=True)


class Adapted(nn.Module):
    """What the libraries of low-rank adapters put in the place of a linear layer."""

    def __init__(self, base, rank):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


def test_the_layer_inside_an_adapter_is_compressed_and_the_adapter_is_named():
    model = nn.Sequential(Adapted(nn.Linear(D, D), 4), nn.Linear(D, D))
    x, dense = torch.randn(3, D), copy.deepcopy(model)
    report = quiet(model, reduction=1)
    assert {row.name for row in report.compressed} == {"0.base_layer", "1"}
    reasons = {row.name: row.reason for row in report.left}
    assert reasons.keys() == {"0.lora_A", "0.lora_B"}
    assert all("smaller than min_features" in reason for reason in reasons.values())
    torch.testing.assert_close(model(x), dense(x))


def test_what_the_config_leaves_dense_is_no_strict_error():
    report = quiet(make_model(), strict=True, exclude=("0.*",), overrides={"1.up": None})
    assert report["0.q"].reason == "excluded by '0.*'"
    assert report["1.up"].reason == "kept dense by overrides['1.up']"


# --- calibration --------------------------------------------------------------------------------


def batches(count=4):
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(D, D, generator=generator)  # correlated features, as in real models
    return [torch.randn(64, D, generator=generator) @ mixing for _ in range(count)]


def test_calibrated_beats_average_and_sequential_does_not_lose():
    x = torch.cat(batches(6)[4:])
    dense = make_model()
    error = {}
    for label, options in {
        "average": {"projection": "average"},
        "calibrated": {"calibration": batches()},
        "sequential": {"calibration": batches(), "sequential": True},
    }.items():
        model = make_model()
        report = quiet(model, reduction=2, **options)
        error[label] = relative(model(x), dense(x))
        assert report.compressed[0].error_of == ("weight" if label == "average" else "output")
        assert all(isinstance(m, SS1Linear) for m in (model[0].q, model[1].down))
    assert error["calibrated"] < 0.9 * error["average"]
    assert error["sequential"] < 1.05 * error["calibrated"]


def test_sequential_reaches_experts_that_only_later_batches_use():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

        def forward(self, x, expert):
            return self.experts[expert](x)

    model = Experts()
    data = [(x, i // 2) for i, x in enumerate(batches())]
    report = quiet(model, projection="calibrated", calibration=data, sequential=True)
    assert len(report.compressed) == 2


def test_sequential_statistics_do_not_outlive_it_on_weights_that_stay_dense():
    model = make_model()
    quiet(model, calibration=batches(), sequential=True, max_error=1e-9, allow_empty=True)
    assert all(statistics_of(p) is None for p in model.parameters())
    with pytest.raises(ProjectionError):
        quiet(poison(model), calibration=[torch.randn(8, D)], sequential=True)
    assert all(statistics_of(p) is None for p in model.parameters())


def test_statistics_are_collected_once_and_used_by_every_door():
    model, x = make_model(), torch.randn(5, D)
    statistics = ss1_compile.calibrate(model, batches(), progress=False)
    with torch.no_grad():
        torch._dynamo.reset()
        options = {"inner_backend": "eager", "warn_error": 2.0, "projection": "calibrated"}
        fast = torch.compile(model, backend="ss1", options=options)(x)
        report = quiet(model, projection="calibrated")
        assert {row.projection for row in report.compressed} == {"calibrated"}
        assert relative(fast, model(x)) < 1e-5
    other = make_model()
    assert quiet(other, calibration=statistics)["0.up"].projection == "learned"


def test_the_projection_left_open_is_learned_where_there_are_statistics():
    def projections(**options):
        return {row.projection for row in quiet(make_model(), **options).compressed}

    assert projections() == {"average"}
    assert projections(calibration=batches()) == {"learned"}
    assert projections(calibration=batches(), sequential=True) == {"learned"}
    for options in ({"block_k": 8}, {"num_hashes": 2}, {"signed": False}):
        assert projections(calibration=batches(), **options) == {"calibrated"}
    model, x = make_model(), torch.randn(5, D)
    ss1_compile.calibrate(model, batches(), progress=False)
    report = ss1_compile.Report()
    with torch.no_grad():
        torch._dynamo.reset()
        options = {"inner_backend": "eager", "warn_error": 2.0, "report": report}
        torch.compile(model, backend="ss1", options=options)(x)
    assert {row.projection for row in report.compressed} == {"learned"}


def test_a_layer_the_data_never_reach_stays_dense_if_calibration_is_asked_for():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            return self.used(x)

    for sequential in (False, True):
        model = nn.Sequential(Half())
        report = quiet(model, projection="calibrated", calibration=batches(), sequential=sequential)
        assert isinstance(model[0].used, SS1Linear)
        assert "never reached" in report["0.unused"].reason


def test_weights_that_have_the_structure_are_recovered_exactly():
    model, x = make_model(), torch.randn(5, D)
    quiet(model, reduction=4, seed=5)
    structures = {n: m.structure for n, m in model.named_modules() if isinstance(m, SS1Linear)}
    expected = model(x)
    dense = copy.deepcopy(model)
    for name in structures:
        dense.set_submodule(name, model.get_submodule(name).to_linear())
    report = compress(dense, structures=structures, progress=False)  # no warning: nothing is lost
    assert all(row.exact for row in report.compressed)
    assert relative(dense(x), expected) < 1e-5


# --- never a silent ruin ------------------------------------------------------------------------


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


def poison(model):
    with torch.no_grad():
        model[1].down.weight[3, 5] = float("nan")
    return model


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


class Bare(nn.Module):
    """Weights outside linear modules, next to parameters that are none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, D, 2 * D))
        self.weight = nn.Parameter(torch.randn(D, D))
        self.positions = nn.Parameter(torch.randn(1, 9, D))
        self.table = nn.Parameter(torch.randn(D, 8))
        self.point, self.real = nn.Conv1d(D, D, 1), nn.Conv1d(D, D, 3)
        self.norm, self.embed = nn.LayerNorm((2, D)), nn.Embedding(40, D)
        self.lstm = nn.LSTM(D, D)
        self.attention = nn.MultiheadAttention(D, 4)
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return self.linear(x @ self.weight)


def test_weights_outside_linear_modules_have_a_row_with_a_reason():
    report = quiet(nn.Sequential(Bare()), exclude=["0.point"])
    parts = {f"0.attention.{name}_proj" for name in ("q", "k", "v", "out")}
    assert {row.name for row in report.compressed} == {"0.linear", *parts}
    reasons = {row.name: row.reason for row in report.left}
    assert "outside any linear module" in reasons.pop("0")
    assert "outside any linear module" in reasons.pop("0.experts")
    assert "min_features" in reasons.pop("0.table")
    assert "excluded" in reasons.pop("0.point")
    assert "LSTM" in reasons.pop("0.lstm.weight_ih_l0")
    assert "LSTM" in reasons.pop("0.lstm.weight_hh_l0")
    assert not reasons


def test_strict_refuses_a_weight_outside_linear_modules_until_it_is_excluded():
    names = ["0", "0.experts", "0.point", "0.lstm.*"]
    model = nn.Sequential(Bare())
    with pytest.raises(UnhandledLinearError, match=r"0\.experts: Bare holds it"):
        quiet(model, strict=True, exclude=["0", "0.point", "0.lstm.*"])
    assert quiet(model, strict=True, exclude=names).compressed


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
