"""Planning: errors against a float64 reference, budgets, targets, and the plan as a document."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import ss1_compile
from ss1_compile.calibration.statistics import statistics_of
from ss1_compile.errors import CalibrationError, ConfigError, NothingToCompressError
from ss1_compile.planning.measure import compressed_copy, shadow, stored_numbers
from ss1_compile.planning.plans import Plan
from ss1_compile.planning.target import Target


class Uneven(nn.Module):
    """Two wide layers, of which the second's output hardly matters."""

    def __init__(self, width: int = 64, weight: float = 0.05) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned, rolled = x.flip(-1), x.roll(1, -1)  # other tensors: no sketch in common
        mixed = self.attention(turned, turned, turned, need_weights=False)[0]
        return self.first(x).tanh() + self.weight * self.second(rolled).tanh() + 0.3 * mixed


QUIET = ss1_compile.SS1Config(projection="learned", warn_error=10.0)


def batches_of(count, width=64, seed=0, rows=32):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width // 2, width, generator=g)
    return [
        torch.randn(rows, 3, width // 2, generator=g) @ mixing
        + 0.3 * torch.randn(rows, 3, width, generator=g)
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def planned():
    torch.manual_seed(0)
    model = Uneven().eval()
    batches = batches_of(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ss1_compile.calibrate(model, batches[:1], progress=False)
    bound = statistics_of(model.first.weight)
    plan = ss1_compile.plan(
        model, batches[:4], "50%", held_out=batches[4:], choices=(1, 1.5, 2, 4, 8), config=QUIET,
        progress=False,
    )  # fmt: skip
    # planning leaves the model alone, and the statistics that it had
    assert {type(m) for m in model.modules()} == {type(m) for m in Uneven().modules()}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert statistics_of(model.first.weight) is bound
    return model, batches, plan


def test_the_budget_is_kept_and_spent_where_it_matters(planned):
    model, batches, plan = planned
    names = [layer.name for layer in plan.layers]
    assert {"first", "second", "attention.q_proj", "attention.out_proj"} <= set(names)
    assert plan.dense_cost == 64 * 64 * len(names)
    assert plan.fraction <= 0.5
    assert plan["first"].sensitivity > 20 * plan["second"].sensitivity
    assert plan["first"].reduction < plan["second"].reduction
    report = ss1_compile.compress(copy.deepcopy(model), plan.config, batches[:4])
    kept = {row.name: row for row in report}
    for layer in plan.layers:
        if layer.reduction == 1:
            assert not kept[layer.name].compressed
        else:
            assert kept[layer.name].reduction >= layer.reduction


def test_errors_are_those_of_the_outputs_on_held_out_batches(planned):
    model, batches, plan = planned
    work = copy.deepcopy(model)
    ss1_compile.calibrate(work, batches[:4], weigh_outputs=True, progress=False)
    for c in (2, 4):
        alone = replace(plan.base, share_sketches=False)
        made = compressed_copy(work, ["first", "second"], alone, c)
        for name in ("first", "second"):
            x = torch.cat(batches[4:]).flatten(0, 1).double()
            x = x.roll(1, -1) if name == "second" else x
            y = copy.deepcopy(model).double().get_submodule(name)(x)
            z = made.get_submodule(name)
            lost = y - (x @ z.weight.double().t() + z.bias.double())
            wanted = (lost.square().sum() / (y - y.mean(0)).square().sum()).sqrt().item()
            found = next(k.error for k in plan[name].choices if k.reduction == c)
            assert found == pytest.approx(wanted, rel=1e-6)
    assert type(model.first) is nn.Linear


def test_better_than_uniform_at_equal_cost(planned):
    model, batches, plan = planned
    losses = {}
    for name, config in (
        ("plan", plan.config),
        ("uniform", replace(QUIET, reduction=2)),
    ):
        made = copy.deepcopy(model)
        ss1_compile.compress(made, config, batches[:4], progress=False)
        with torch.no_grad():
            x = torch.cat(batches[4:])
            losses[name] = (made(x) - model(x)).square().mean().item()
    assert losses["plan"] < losses["uniform"]


def test_a_plan_solves_other_budgets_and_survives_json(planned, tmp_path):
    _, _, plan = planned
    fractions = [plan.solve(f"{percent}%").fraction for percent in (20, 40, 60, 80, 100)]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    losses = [plan.solve(f"{percent}%").loss for percent in (20, 40, 60, 80, 100)]
    assert losses == sorted(losses, reverse=True)
    absolute = plan.solve(f"parameters <= {plan.dense_cost * 0.4 / 1000:.3f}k")
    assert absolute.fraction <= 0.4 + 1e-6
    with pytest.raises(ConfigError, match="latency"):
        plan.solve("latency <= 3 ms")

    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert str(again) == str(plan)
    edited = json.loads((tmp_path / "plan.json").read_text())
    edited["layers"][0]["reduction"] = 8
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    changed = Plan.load(tmp_path / "plan.json")
    assert changed == plan.with_choice(plan.layers[0].name, 8)
    assert changed.config.overrides[plan.layers[0].name] == 8
    assert changed.config.refit_dense
    with pytest.raises(ConfigError, match=rf"{plan.layers[0].name}.*\[1, 1\.5, 2, 4, 8\]"):
        plan.with_choice(plan.layers[0].name, 5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "x"}, "no plan"),
        ({"version": 9}, "version 9"),
        ({"cost": "time"}, "'time'"),
        ({"layers": [{}]}, "damaged"),
        ({"base": {"reduction": 0}}, "reduction"),
    ],
)
def test_damaged_plans_are_refused(planned, change, said):
    values = {**planned[2].to_dict(), **change}
    with pytest.raises(ConfigError, match=said):
        Plan.from_dict(values)


def test_a_plan_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Plan.load(tmp_path / "none.json")


def test_quality_targets_take_the_cheapest_plan_that_meets_them(planned):
    model, batches, _ = planned
    sizes = {}
    for bound in (0.9, 0.97):
        plan = ss1_compile.plan(
            model, batches[:4], f"cosine >= {bound}", held_out=batches[4:],
            choices=(1, 1.5, 2, 4, 8), config=QUIET, progress=False,
        )  # fmt: skip
        dense, reached = plan.figures
        assert dense["value"] == pytest.approx(1)
        assert reached["value"] >= bound
        made = copy.deepcopy(model)
        ss1_compile.compress(made, plan.config, batches[:4], progress=False)
        with torch.no_grad():
            x = torch.cat(batches[4:])
            cosine = nn.functional.cosine_similarity(made(x), model(x), dim=-1).mean().item()
        assert cosine == pytest.approx(reached["value"], abs=1e-5)
        sizes[bound] = plan.fraction
    assert sizes[0.9] < sizes[0.97] < 1


def test_the_users_metric_decides(planned):
    model, batches, _ = planned
    x = batches[-1]

    def only_second(m: nn.Module) -> float:
        return -(m.second(x) - model.second(x)).square().mean().item()

    plan = ss1_compile.plan(
        model, batches[:4], 0.5, metric=only_second, held_out=batches[4:],
        choices=(1, 2, 8), config=QUIET, progress=False,
    )  # fmt: skip
    assert plan["first"].sensitivity == 0
    assert plan["second"].sensitivity > 0
    assert plan["second"].reduction == 1
    reached = ss1_compile.plan(
        model, batches[:4], "metric >= -0.1", metric=only_second, held_out=batches[4:],
        choices=(1, 2, 8), config=QUIET, progress=False,
    )  # fmt: skip
    assert reached.figures[1]["value"] >= -0.1
    with pytest.raises(ConfigError, match="metric="):
        ss1_compile.plan(model, batches, "metric >= 1")
    with pytest.raises(ConfigError, match="finite"):
        ss1_compile.plan(
            model, batches, "50%", metric=lambda m: math.nan, choices=(1, 4), progress=False
        )


def test_latency_is_measured_where_the_model_is(planned):
    model, batches, _ = planned
    plan = ss1_compile.plan(model, batches, "latency <= 100%", choices=(1, 4), progress=False)
    assert plan.cost == "latency"
    assert all(layer.dense_cost > 0 for layer in plan.layers)
    assert all(k.cost < layer.dense_cost for layer in plan.layers for k in layer.choices[1:])
    with pytest.raises(ConfigError, match="latency"):
        ss1_compile.plan(model, batches, "latency <= 3 ms", cost="parameters")


def test_a_rotation_plan_and_layers_that_are_fixed_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Linear(64, 64))
    config = ss1_compile.SS1Config(exclude=("0",), overrides={"3": 2})
    batches = [batch.flatten(0, 1) for batch in batches_of(3)]
    plan = ss1_compile.plan(model, batches, 0.7, config=config, progress=False)
    assert [layer.name for layer in plan.layers] == ["2"]
    assert [k.reduction for k in plan["2"].choices] == [1, 2, 3, 4, 6, 8]
    assert "excluded" in plan.left["0"]
    assert "overrides" in plan.left["3"]
    assert plan.config.reduction_for("3", 64, 64) == 2
    with pytest.raises(ConfigError, match=r"1\.5"):
        ss1_compile.plan(model, batches, config=config, choices=(1, 1.5))
    with pytest.raises(NothingToCompressError, match="excluded"):
        ss1_compile.plan(model, batches, config=ss1_compile.SS1Config(exclude=("*",)))
    with pytest.raises(CalibrationError, match="at least two"):
        ss1_compile.plan(model, batches[:1])
    with pytest.raises(CalibrationError, match="iterable of batches"):
        ss1_compile.plan(model, batches[0])
    with pytest.raises(ConfigError, match="above 1"):
        ss1_compile.plan(model, batches, choices=(1,))


def test_layers_that_are_compressed_already():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    batches = [batch.flatten(0, 1) for batch in batches_of(2)]
    options = {"quantization": "int8_dynamic", "warn_error": 2.0, "progress": False}
    ss1_compile.compress(model, reduction=2, include=("0",), **options)
    plan = ss1_compile.plan(model, batches, 0.6, choices=(1, 2), progress=False)
    assert [layer.name for layer in plan.layers] == ["2"]
    assert plan.left["0"] == "compressed already (c = 2, int8_dynamic); plan the dense model"
    ss1_compile.compress(model, reduction=2, **options)
    with pytest.raises(NothingToCompressError, match=r"0: compressed already .* plan the dense"):
        ss1_compile.plan(model, batches)


def test_a_plan_of_quantised_layers():
    """Their errors are those of the quantised layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    batches = [batch.flatten(0, 1) for batch in batches_of(4)]
    errors = []
    for quantization in (None, "int8_dynamic"):
        config = ss1_compile.SS1Config(projection="average", quantization=quantization)
        plan = ss1_compile.plan(model, batches, 0.5, config=config, choices=(2,), progress=False)
        errors.append([choice.error for choice in plan["2"].choices])
        made = copy.deepcopy(model)
        ss1_compile.compress(made, replace(plan.config, warn_error=2.0), batches, progress=False)
        assert {made[0].quantization, made[2].quantization} == {quantization}
    assert errors[0] != errors[1]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_perplexity_of_a_language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [
        {"input_ids": ids, "attention_mask": (torch.arange(12) < 9).long().expand(4, 12)}
        for ids in torch.randint(40, (6, 4, 12))
    ]
    plan = ss1_compile.plan(model, batches, "perplexity <= +4%", choices=(1, 2, 8), progress=False)
    dense, reached = plan.figures
    with torch.no_grad():
        nll = []
        for batch in (batches[3],):
            logp = model(**batch).logits[:, :8].log_softmax(-1)
            nll.append(-logp.gather(-1, batch["input_ids"][:, 1:9, None]).mean())
    assert dense["value"] == pytest.approx(math.exp(torch.stack(nll).mean().item()), rel=1e-5)
    assert reached["value"] <= dense["value"] * 1.04
    assert "tied" in plan.left["lm_head"]


def test_targets():
    assert Target.parse(0.3) == Target.parse("30%") == Target.parse("30.0 %")
    assert Target.parse("latency <= 3 ms").value == 3000
    assert Target.parse("parameters <= 1.5M").value == 1.5e6
    change = Target.parse("perplexity <= +3%")
    assert change.met_by(10.3, 10) is True
    assert change.met_by(10.31, 10) is False
    assert Target.parse("cosine ≥ 0.98").met_by(0.981, 1)
    assert Target.parse("metric >= -1%").met_by(0.99, 1)
    for bad in ("", "rolled", "0%", "120%", 0, 2.0, True, None, "cosine <= 0.9", "accuracy >= 1",
                "latency >= 3 ms", "latency <= 3", "parameters <= 3 ms", "3M", "cosine >= 3 ms",
                "latency <= 0 ms"):  # fmt: skip
        with pytest.raises(ConfigError):
            Target.parse(bad)


def test_a_shadow_shares_the_tensors_and_nothing_else():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    copied = shadow(model)
    assert copied[0] is not model[0]
    assert copied[0].weight is model[0].weight
    assert copied[1].running_mean is model[1].running_mean
    copied[0] = nn.Identity()
    assert type(model[0]) is nn.Linear


def test_costs_count_a_shared_sketch_once():
    torch.manual_seed(0)

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(64, 64)

        def forward(self, x):
            return self.a(x) + self.b(x)[..., :64] + self.c(x)

    model = Three()
    batches = [batch.flatten(0, 1) for batch in batches_of(4)]
    plan = ss1_compile.plan(model, batches, "50%", choices=(1, 4), config=QUIET, progress=False)
    assert [layer.group for layer in plan.layers] == [0, 0, 0]
    costs = [layer.shared[0].cost for layer in plan.layers]
    assert costs[1] == pytest.approx(2 * costs[0])
    ss1_compile.calibrate(model, batches[:3], progress=False)
    made = compressed_copy(model, ["a", "b", "c"], QUIET, 4)
    assert made.a.sketch is made.b.sketch
    assert stored_numbers(made) == pytest.approx(sum(costs))
    assert stored_numbers(made) == sum(m.z.numel() for m in (made.a, made.b, made.c)) + (
        made.a.sketch.numel()
    )
    for layer in plan.layers:  # more room for z, hence less error
        assert layer.shared[0].error < layer.choices[1].error
    together = plan.with_choice("a", 4).with_choice("b", 4).with_choice("c", 4)
    assert all(layer.sharing for layer in together.layers)
    assert together.planned_cost == pytest.approx(sum(costs))
    mixed = together.with_choice("c", 1)
    assert not any(layer.sharing for layer in mixed.layers)
    assert Plan.from_dict(mixed.to_dict()) == mixed
