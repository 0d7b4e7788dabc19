"""Experts of Transformers' models, and products with one matrix per expert in graphs."""

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ss1_compile
from ss1_cli.inspect import _layer_bytes
from ss1_compile import Report, SS1Structure
from ss1_compile.errors import CheckpointError
from ss1_compile.experts import SS1ExpertLinear, SS1Experts, is_experts, project_experts
from ss1_compile.projection.project import project
from ss1_compile.serialization.checkpoint import read_config

transformers = pytest.importorskip("transformers", minversion="5")  # 4 has no such interface
QUIET = {"progress": False, "warn_error": 2.0}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
}


def experts_of(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    model.set_experts_implementation("eager")  # grouped_mm takes no float64
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    found = next(module for module in model.modules() if is_experts(module))
    return model, found


def routed(tokens=11, experts=4):
    torch.manual_seed(1)
    x = torch.randn(tokens, 64, dtype=torch.double)
    index = torch.stack([torch.randperm(experts - 1)[:2] for _ in range(tokens)])
    return x, index, torch.rand(tokens, 2, dtype=torch.double)  # the last expert gets nothing


# Mixtral has a gate; GPT-OSS biases, transposed weights and a gate of its own.
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_stand_in_equals_the_original(name, implementation):
    model, experts = experts_of(name)
    model.float().set_experts_implementation(implementation)
    x, index, weights = routed()
    expected = experts(x.float(), index, weights.float())
    found = SS1Experts(experts)(x.float(), index, weights.float())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_flags_of_the_first_releases(name):
    """Transformers 5.0 marks experts with fewer flags than later releases."""
    _, experts = experts_of(name)
    expected = SS1Experts(experts)(*routed())
    for flag in vars(experts).keys() & {"has_gate", "is_concatenated", "has_post_expert_norm"}:
        delattr(experts, flag)
    assert is_experts(experts)
    assert torch.equal(SS1Experts(experts)(*routed()), expected)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_compress(name):
    model, experts = experts_of(name)
    arguments = routed()
    expected = experts(*arguments)
    path = next(n for n, m in model.named_modules() if m is experts)
    exact = copy.deepcopy(model)
    ss1_compile.compress(exact, reduction=1, **QUIET)
    torch.testing.assert_close(
        exact.get_submodule(path)(*arguments), expected, atol=1e-9, rtol=1e-9
    )
    before = experts.gate_up_proj.numel()
    report = ss1_compile.compress(model, reduction=4, **QUIET)
    rows = {row.name: row for row in report}
    small = model.get_submodule(path)
    assert isinstance(small, SS1Experts)
    assert rows[f"{path}.gate_up_proj"].shape == (192, 64)
    assert rows[f"{path}.gate_up_proj"].compressed
    assert small.gate_up_proj.z.numel() == before // 4
    assert f"{path}.gate_up_proj.z" in model.state_dict()
    dense = copy.deepcopy(small)  # the same experts with their weights written out
    plain = copy.deepcopy(experts)
    for part in ("gate_up_proj", "down_proj"):
        weight = getattr(dense, part).weight
        getattr(plain, part).data = weight.mT if experts.is_transposed else weight
    torch.testing.assert_close(small(*arguments), plain(*arguments), atol=1e-9, rtol=1e-9)


def test_trains_copies_and_moves():
    model, _ = experts_of("Mixtral")
    ss1_compile.compress(model, reduction=4, **QUIET)
    model = copy.deepcopy(model).float()
    ids = torch.randint(97, (2, 6))
    model(ids).logits.sum().backward()
    layers = [m for m in model.modules() if isinstance(m, SS1ExpertLinear)]
    assert len(layers) == 2
    assert all(layer.z.grad is not None and bool(layer.z.grad.any()) for layer in layers)


def test_calibrates():
    experts = experts_of("Mixtral")[1]
    torch.manual_seed(3)
    basis = torch.randn(10, 64, dtype=torch.double)
    _, index, weights = routed(tokens=64)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = copy.deepcopy(experts)

        def forward(self, x):
            return self.experts(x, index, weights)

    base = Holder()
    data = [torch.randn(64, 10, dtype=torch.double) @ basis for _ in range(6)]
    held_out = torch.randn(64, 10, dtype=torch.double) @ basis
    expected = base(held_out)

    def error(**options):
        small = copy.deepcopy(base)
        report = ss1_compile.compress(small, reduction=2, **QUIET, **options)
        assert len(report.compressed) == 2
        return ((small(held_out) - expected).norm() / expected.norm()).item()

    average = error()
    assert error(calibration=data, projection="calibrated") < 0.9 * average
    assert error(calibration=data, sequential=True) < 0.9 * average
    statistics = ss1_compile.calibrate(base, data, progress=False)  # of the original module
    assert set(statistics) == {"experts.gate_up_proj", "experts.down_proj"}
    assert error(calibration=statistics) < 0.9 * average


def test_keeps_experts_that_no_token_reaches():
    """Without calibration every expert is projected by itself."""
    structure = SS1Structure.create(64, 48, 4)
    weight = torch.randn(3, 48, 64)
    found = project_experts(weight, structure, name="experts")
    for expert in range(3):
        alone = project(weight[expert], structure)
        assert torch.equal(found.z[expert], alone.z)
    errors = torch.tensor([project(w, structure).error for w in weight])
    assert found.error == pytest.approx(errors.square().mean().sqrt().item())


class Products(nn.Module):
    """Experts spelt as batched, added, selected and grouped products, and as an einsum."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 64, 96) / 8)
        self.bias = nn.Parameter(torch.randn(4, 1, 96))
        self.added = nn.Parameter(torch.randn(4, 96, 64) / 8)
        self.left = nn.Parameter(torch.randn(4, 64, 64) / 8)
        self.chosen = nn.Parameter(torch.randn(3, 64, 64) / 8)
        self.einsum = nn.Parameter(torch.randn(4, 64, 40) / 8)

    def forward(self, x):  # [4, M, 64]
        x = torch.baddbmm(self.bias, x, self.up)
        x = torch.bmm(F.relu(x), self.added)
        x = torch.bmm(self.left, x.mT).mT
        for expert in range(2):
            x = x + F.linear(x, self.chosen[expert])
        x = x + F.linear(x, self.chosen.unbind()[2])
        return torch.einsum("emk,ekn->emn", x, self.einsum)


NAMES = {"up", "added", "left", "chosen", "einsum"}


def both_doors(model, x, **options):
    report = Report()
    settings = {**options, "inner_backend": "eager", "report": report, "warn_error": 2.0}
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="ss1", options=settings)(x)
        program = torch.export.export(model, (x,))
        small, exported = ss1_compile.compress_exported(program, warn_error=2.0, **options)
        return (compiled, report), (small.module()(x), exported)


def test_graph_doors():
    torch.manual_seed(5)
    model, x = Products().double(), torch.randn(4, 6, 64, dtype=torch.double)
    expected = model(x)
    for out, report in both_doors(model, x, reduction=1):
        assert {row.name for row in report.compressed} == NAMES
        assert not report.left
        torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
    (compiled, _), (exported, _) = both_doors(model, x, reduction=4)
    torch.testing.assert_close(compiled, exported, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(compiled, expected, rtol=1e-2)


def test_gathered_weights_are_reported():
    class Gathered(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 64, 64))
            self.out = nn.Linear(64, 64)

        def forward(self, x):
            index = x[:, 0].argsort() % 4
            return self.out(torch.bmm(self.weight[index], x.unsqueeze(-1)).squeeze(-1))

    for _, report in both_doors(Gathered(), torch.randn(5, 64), reduction=2):
        (left,) = report.left
        assert "gathered" in left.reason


def saved_experts(directory, name="Mixtral", **options):
    model, _ = experts_of(name)
    report = ss1_compile.compress(model, reduction=4, **options, **QUIET)
    ss1_compile.save(model, directory)
    return model, report


@pytest.fixture(scope="module")
def saved_mixtral(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixtral")
    saved_experts(directory)
    return directory


def skeleton(name="Mixtral"):
    with torch.device("meta"):
        return experts_of(name)[0]


@pytest.mark.parametrize("projection", ["average", "learned"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_save_and_load(tmp_path, name, projection):
    model, report = saved_experts(tmp_path, name, projection=projection)
    saved = read_config(tmp_path)
    assert saved.format_version == 3
    experts = {key: layer.experts for key, layer in saved.layers.items() if layer.experts}
    assert len(experts) == 2
    assert set(experts.values()) == {4}
    for key in experts:  # what `ss1 inspect` shows
        assert _layer_bytes(saved.layers[key]) == (
            report[key].bytes_before,
            report[key].bytes_after,
        )
    loaded = ss1_compile.load(skeleton(name), tmp_path)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    path = next(key for key, module in model.named_modules() if isinstance(module, SS1Experts))
    again, arguments = loaded.get_submodule(path), routed()
    assert type(again) is SS1Experts
    assert again.gate_up_proj.z.requires_grad
    assert torch.equal(again(*arguments), model.get_submodule(path)(*arguments))
    twice = ss1_compile.load(loaded, tmp_path)  # over compressed experts, too
    assert torch.equal(twice.get_submodule(path)(*arguments), again(*arguments))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"experts": 3}, r"has experts = 3; in the model there are 4"),
        ({"experts": 0}, "experts must be an integer of at least 1, got 0"),
        ({"experts": None}, "experts must be an integer of at least 1, got None"),
        ({"experts": True}, "experts must be an integer of at least 1, got True"),
        ({"experts": 2**70}, "experts is 1180591620717411303424"),
        ({"bias": True}, "experts have no bias"),
        ({"out_features": 64}, "in the model they are 64, 192"),
        ("experts", r"has experts = None; in the model there are 4"),
    ],
)
def test_load_refuses_other_experts(saved_mixtral, tmp_path, change, problem):
    shutil.copytree(saved_mixtral, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "ss1_config.json"
    document = json.loads(path.read_text())
    layer = next(v for k, v in document["layers"].items() if k.endswith("gate_up_proj"))
    if isinstance(change, str):
        del layer[change]
    else:
        layer.update(change)
    path.write_text(json.dumps(document))
    target = experts_of("Mixtral")[0]
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=problem):
        ss1_compile.load(target, tmp_path)
    assert target.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def test_load_refuses_z_of_another_number_of_experts(tmp_path):
    model, _ = experts_of("Mixtral")
    ss1_compile.compress(model, reduction=4, **QUIET)
    layer = next(m for m in model.modules() if isinstance(m, SS1ExpertLinear))
    layer.z = nn.Parameter(layer.z[:3])
    ss1_compile.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"has experts = 3; in the model there are 4"):
        ss1_compile.load(skeleton(), tmp_path)
