"""``compress_exported``: exact at c = 1, equal to ``compress``, loud about bad input."""

import copy

import pytest
import torch
from export_support import (
    D,
    Mlp,
    assert_same,
    assert_unchanged,
    compressed,
    exported,
    kinds,
    mlp_program,
    snapshot,
    ss1,
)
from torch import nn
from torch.export.graph_signature import InputKind

import ss1_compile
from ss1_compile import (
    CalibrationError,
    ConfigError,
    NothingToCompressError,
    ProjectionError,
    SS1Config,
    SS1Structure,
    SS1Warning,
    compress,
    compress_exported,
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- equal to the other doors ---------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("decompose", [False, True])
def test_exact_at_reduction_one_with_a_dynamic_batch(decompose, strict):
    model = Mlp().eval()
    new, report = ss1(mlp_program(model, decompose=decompose, strict=strict), reduction=1)
    new.validate()
    assert [row.name for row in report] == ["up", "down"]
    assert all(row.exact for row in report)
    for rows in (2, 9):
        x = torch.randn(rows, D)
        assert_same(new.module()(x), model(x))


@pytest.mark.parametrize("decompose", [False, True])
def test_equals_compress(decompose):
    model, x = Mlp().eval(), torch.randn(7, D)
    other = compressed(model, reduction=4)
    new, report = ss1(mlp_program(model, decompose=decompose), reduction=4)
    assert_same(new.module()(x), other(x))
    state = other.state_dict()
    for name in ("up.z", "up.sketch", "up.bias", "down.z", "down.sketch", "down.bias"):
        assert torch.equal(new.state_dict[name], state[name])
    rows = compress(copy.deepcopy(model), reduction=4, progress=False, warn_error=2.0)
    for row, expected in zip(report, rows, strict=True):
        assert (row.name, row.shape, row.reduction) == (expected.name, expected.shape, 4)
        assert (row.bytes_before, row.bytes_after) == (expected.bytes_before, expected.bytes_after)
        assert row.error == pytest.approx(expected.error)


def test_dense_weights_are_gone_and_parameters_fall():
    model = Mlp()
    ep = mlp_program(model)
    new, _ = ss1(ep, reduction=4)
    parameters = {name: t.numel() for name, t in new.state_dict.items() if name.endswith(".z")}
    assert parameters == {"up.z": D * 2 * D // 4, "down.z": D * 2 * D // 4}
    assert not [name for name in new.state_dict if name.endswith("weight")]
    assert sum(p.numel() for p in new.parameters()) == 2 * D * 2 * D // 4 + 3 * D
    assert new.state_dict["up.bias"] is ep.state_dict["up.bias"]


def test_signature_order_and_fake_values():
    new, _ = ss1(mlp_program(Mlp()))
    specs = new.graph_signature.input_specs
    order = [InputKind.PARAMETER, InputKind.BUFFER, InputKind.USER_INPUT]
    assert [spec.kind for spec in specs] == sorted((s.kind for s in specs), key=order.index)
    assert kinds(new) == {
        "up.z": InputKind.PARAMETER,
        "up.bias": InputKind.PARAMETER,
        "down.z": InputKind.PARAMETER,
        "down.bias": InputKind.PARAMETER,
        "up.sketch": InputKind.BUFFER,
        "down.sketch": InputKind.BUFFER,
    }
    vals = [node.meta["val"] for node in new.graph.nodes if node.op != "output"]
    assert len({val.fake_mode for val in vals if isinstance(val, torch.Tensor)}) == 1
    assert len(new.range_constraints) == 1
    linears = [n for n in new.graph.nodes if n.target is torch.ops.ss1.linear.default]
    assert [tuple(n.meta["val"].shape)[1:] for n in linears] == [(2 * D,), (D,)]


def text(name):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**small, intermediate_size=120))
    if name == "llama":
        config = transformers.LlamaConfig(**small, intermediate_size=120, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPT2Config(
        vocab_size=97,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


# GPT-2 is not decomposed: PyTorch cannot decompose the dense program either. The strides of
# scaled_dot_product_attention change under it, and Conv1D views its result.
@pytest.mark.parametrize(
    ("name", "decompose"),
    [
        ("bert", True),
        ("gpt2", False),
        ("llama", False),
        pytest.param("bert", False, marks=pytest.mark.slow),
        pytest.param("llama", True, marks=pytest.mark.slow),
    ],
)
def test_architectures(name, decompose):
    model = text(name).eval()
    inputs = {"input_ids": torch.randint(0, 97, (2, 11))}
    if name != "bert":
        inputs["use_cache"] = False
    with torch.no_grad():
        ep = exported(model, decompose=decompose, kwargs=inputs)
        exact, report = ss1(ep, reduction=1)
        assert_same(exact.module()(**inputs)[0], model(**inputs)[0])
        rows = compress(copy.deepcopy(model), reduction=1, progress=False)
        assert [row.name for row in report.left] == ["lm_head"] * (name == "gpt2")
        assert {row.name for row in report.compressed} == {row.name for row in rows.compressed}
        small, _ = ss1(ep, reduction=4)
        assert_same(small.module()(**inputs)[0], compressed(model, reduction=4)(**inputs)[0])


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("decompose", [False, True])
def test_statistics_bound_or_by_name_equal_compress(bound, decompose):
    model, data = Mlp().eval(), [torch.randn(200, D) @ torch.randn(D, D) + 1 for _ in range(2)]
    statistics = ss1_compile.calibrate(model, data)
    expected = compressed(Mlp_like(model), calibration=statistics)(data[0])
    if bound:
        new, report = ss1(mlp_program(model, decompose=decompose))
    else:
        other = Mlp_like(model)
        new, report = ss1(mlp_program(other, decompose=decompose), calibration=statistics)
    assert {row.error_of for row in report} == {"output"}
    assert_same(new.module()(data[0]), expected)
    assert not torch.equal(new.state_dict["up.bias"], model.up.bias)
    assert isinstance(new.state_dict["up.bias"], nn.Parameter)


def Mlp_like(model):
    """Equal weights to which no statistics are bound."""
    other = Mlp().eval()
    other.load_state_dict(model.state_dict())
    return other


def test_a_shared_bias_is_corrected_for_each_layer():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(D, D)
            self.b = nn.Linear(D, D)
            self.b.bias = self.a.bias

        def forward(self, x):
            return self.a(x) * self.b(x)

    model, data = Shared().eval(), torch.randn(300, D) + 1
    ss1_compile.calibrate(model, [data])
    new, _ = ss1(exported(model, data), projection="calibrated")
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    statistics = ss1_compile.calibrate(model, [data])
    for part in (a, b):
        compress(
            part,
            calibration=statistics,
            projection="calibrated",
            progress=False,
            warn_error=2.0,
        )
    assert_same(new.module()(data), a(data))


def test_calibrated_projection_needs_statistics():
    with pytest.raises(CalibrationError, match="up"):
        ss1(mlp_program(Mlp()), projection="calibrated")


# --- configuration and errors ---------------------------------------------------------------------


def test_config_means_what_it_means_elsewhere():
    ep = mlp_program(Mlp())
    _, report = ss1(ep, exclude=("down",))
    assert report["down"].reason == "excluded by 'down'"
    new, report = ss1(ep, overrides={"up": 8, "down": None})
    assert report["up"].reduction == 8
    assert "down.weight" in new.state_dict
    _, report = ss1(ep, max_error=1e-3, allow_empty=True)
    assert "exceeds max_error" in report["up"].reason
    with pytest.warns(SS1Warning, match="2 of 2 projected layers") as caught:
        compress_exported(ep)
    assert caught[0].filename == __file__


def test_structures_recover_a_materialised_layer():
    structure = SS1Structure.create(D, 2 * D, 4, seed=7)
    model, x = Mlp(), torch.randn(3, D)
    z = torch.randn(2 * D, structure.reduced_features)
    model.up.weight = nn.Parameter(structure.materialize(z))
    ep = mlp_program(model)
    new, report = ss1(ep, structures={"up": structure}, overrides={"down": None})
    assert report["up"].exact
    assert_same(new.module()(x), model(x))
    with pytest.raises(ConfigError, match="'upp'"):
        ss1(ep, structures={"upp": structure})
    with pytest.raises(ConfigError, match="down"):
        ss1(ep, structures={"down": structure})


def test_dry_run_reports_and_changes_nothing():
    ep = mlp_program(Mlp())
    before = snapshot(ep)
    new, report = ss1(ep, dry_run=True)
    assert new is ep
    assert len(report.compressed) == 2
    assert_unchanged(before, snapshot(ep))


def test_the_given_program_is_unchanged_and_still_right():
    model, x = Mlp().eval(), torch.randn(5, D)
    ss1_compile.calibrate(model, [torch.randn(100, D)])
    ep = mlp_program(model)
    before = snapshot(ep)
    new, _ = ss1(ep)
    assert_unchanged(before, snapshot(ep))
    ep.validate()
    assert torch.equal(ep.module()(x), model(x))
    assert new is not ep


FAILURES = {
    "unknown option": ({"reductoin": 4}, ConfigError, "did you mean 'reduction'"),
    "nothing": ({"include": ("nobody",)}, NothingToCompressError, "nobody"),
    "two configurations": ({"config": SS1Config(), "seed": 1}, ConfigError, "not both"),
    "batches": ({"calibration": [torch.randn(3, D)]}, CalibrationError, "ss1_compile.calibrate"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_leave_the_program_unchanged(name):
    options, error, message = FAILURES[name]
    ep = mlp_program(Mlp())
    before = snapshot(ep)
    with pytest.raises(error, match=message):
        compress_exported(ep, **options)
    assert_unchanged(before, snapshot(ep))


def test_weights_without_finite_values_are_refused():
    model = Mlp()
    with torch.no_grad():
        model.down.weight[3, 4] = torch.nan
    ep = mlp_program(model)
    before = str(ep.graph)
    with pytest.raises(ProjectionError, match=r"down.*nan"):
        ss1(ep)
    assert str(ep.graph) == before
    with torch._subclasses.FakeTensorMode() as mode:
        fake, x = Mlp(), torch.randn(4, D)
    assert x.fake_mode is mode
    with pytest.raises(ProjectionError, match="up.weight is a fake tensor"):
        ss1(exported(fake, x))


def test_statistics_of_another_model_are_refused():
    other = nn.Sequential(nn.Linear(D, D))
    statistics = ss1_compile.calibrate(other, [torch.randn(50, D)])
    with pytest.raises(CalibrationError, match=r"another model.*0\.weight"):
        ss1(mlp_program(Mlp()), calibration=statistics)


def test_a_module_is_refused_with_the_way_to_go():
    with pytest.raises(ConfigError, match=r"ss1_compile\.compress"):
        compress_exported(Mlp())
