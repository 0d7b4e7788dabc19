"""``compress_exported``: exact at c = 1, equal to ``compress``, and valid for what comes after."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram, export
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
    UnhandledLinearError,
    compress,
    compress_exported,
)

D = 64


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(D, 2 * D)
        self.down = nn.Linear(2 * D, D)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


def exported(model, *args, decompose=False, strict=False, **kwargs) -> ExportedProgram:
    ep = export(model, args, strict=strict, **kwargs)
    return ep.run_decompositions() if decompose else ep


def mlp_program(model, **options):
    return exported(
        model, torch.randn(4, D), dynamic_shapes={"x": {0: Dim("n", max=512)}}, **options
    )


def ss1(ep, **options):
    """The new program, without the warning that random weights deserve."""
    return compress_exported(ep, **{"warn_error": 2.0, **options})


def compressed(model, **options):
    other = copy.deepcopy(model)
    compress(other, progress=False, **{"warn_error": 2.0, **options})
    return other


def assert_same(actual, expected, tolerance=1e-5):
    error = (actual - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


def kinds(ep):
    return {spec.target: spec.kind for spec in ep.graph_signature.input_specs if spec.target}


def snapshot(ep):
    """Everything of a program that a rewrite could damage."""
    return (
        str(ep.graph),
        str(ep.graph_signature),
        {name: (id(t), t._version, t.clone()) for name, t in ep.state_dict.items()},
        dict(ep.constants),
        str(ep.range_constraints),
    )


def assert_unchanged(before, after):
    assert before[0] == after[0]
    assert before[1] == after[1]
    assert before[2].keys() == after[2].keys()
    for name, (identity, version, value) in before[2].items():
        assert (identity, version) == after[2][name][:2]
        assert torch.equal(value, after[2][name][2])
    assert before[3].keys() == after[3].keys()
    assert before[4] == after[4]


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
    new, _ = ss1(exported(model, data))
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    statistics = ss1_compile.calibrate(model, [data])
    for part in (a, b):
        compress(part, calibration=statistics, progress=False, warn_error=2.0)
    assert_same(new.module()(data), a(data))


def test_calibrated_projection_needs_statistics():
    with pytest.raises(CalibrationError, match="up"):
        ss1(mlp_program(Mlp()), projection="calibrated")


# --- graphs it was not written for ----------------------------------------------------------------


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))
        self.register_buffer("table", torch.randn(D, D))
        self.register_buffer("fleeting", torch.randn(D, D), persistent=False)
        self.plain = torch.randn(D, D)

    def forward(self, x):
        return (self.weight @ x.t()).t() @ self.table @ self.fleeting @ self.plain


@pytest.mark.parametrize("decompose", [False, True])
def test_weights_on_the_left_buffers_and_constants(decompose):
    model, x = Constant(), torch.randn(5, D)
    ep = exported(model, x, decompose=decompose)
    new, report = ss1(ep, reduction=1)
    assert_same(new.module()(x), model(x))
    assert [row.name for row in report.compressed] == ["weight", "table", "fleeting", "plain"]
    assert kinds(new)["z"] == InputKind.PARAMETER
    assert {kinds(new)[f"{n}_z"] for n in ("table", "fleeting", "plain")} == {InputKind.BUFFER}
    assert not set(new.constants) & {"fleeting", "plain"}
    new.run_decompositions()


class Strided(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(D, D)

    def forward(self, x):
        return self.out(x.transpose(0, 1))


@pytest.mark.parametrize("dynamic", [None, {"x": {1: Dim("b", min=2, max=64)}}])
def test_linear_on_a_strided_input_decomposes_to_bmm_and_is_found(dynamic):
    model, x = Strided(), torch.randn(6, 3, D)
    ep = exported(model, x, decompose=True, dynamic_shapes=dynamic)
    assert torch.ops.aten.bmm.default in {node.target for node in ep.graph.nodes}
    new, report = ss1(ep, reduction=1)
    assert [row.op for row in report.compressed] == ["aten.bmm"]
    assert "out.weight" not in new.state_dict
    assert_same(new.module()(x), model(x))


class Tied(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.first = nn.Embedding(D, D) if embedding else nn.Linear(D, D, bias=False)
        self.second = nn.Linear(D, D)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("strict", [False, True])
def test_tied_linears_share_one_z(strict):
    model, x = Tied(embedding=False), torch.randn(5, D)
    new, report = ss1(exported(model, x, strict=strict), reduction=4)
    assert [row.name for row in report.compressed] == ["first", "second"]
    assert len([name for name in new.state_dict if name.endswith("z")]) == 1
    assert not [name for name in new.state_dict if name.endswith("weight")]
    structure = SS1Config().structure_for("", D, D)
    weight = structure.materialize(ss1_compile.project(model.first.weight, structure).z)
    assert_same(new.module()(x), F.linear(x @ weight.t(), weight, model.second.bias))


@pytest.mark.parametrize("strict", [False, True])
def test_weight_tied_to_an_embedding_stays_dense(strict):
    ep = exported(Tied(embedding=True), torch.tensor([1, 2]), strict=strict)
    new, report = ss1(ep, allow_empty=True)
    assert [row.name for row in report.left] == ["second"]
    assert "embedding" in report["second"].reason
    new.validate()


class Control(nn.Module):
    def __init__(self):
        super().__init__()
        self.quiet = nn.Linear(D, D)
        self.yes = nn.Linear(D, D)
        self.free = nn.Linear(D, D)

    def forward(self, x):
        with torch.no_grad():
            y = self.quiet(x)
        z = torch.cond(x.sum() > 0, lambda t: self.yes(t), lambda t: t.clone(), (y,))
        return self.free(z)


def test_linears_inside_bodies_are_reported():
    model, x = Control(), torch.randn(3, D)
    ep = exported(model, x)
    new, report = ss1(ep, reduction=1)
    assert [row.name for row in report] == ["quiet", "yes", "free"]
    assert [row.name for row in report.compressed] == ["free"]
    assert "cond" in report["yes"].reason
    assert_same(new.module()(x), model(x))
    with pytest.raises(UnhandledLinearError, match="quiet"):
        ss1(ep, strict=True)


class Moving(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.randn(D, D))
        self.fixed = nn.Linear(D, D)

    def forward(self, x):
        y = self.fixed(x) @ self.w
        self.w.copy_(x.t() @ x)
        return y


def test_a_weight_that_the_program_writes_stays_dense():
    model, x = Moving(), torch.randn(3, D)
    for decompose in (False, True):
        ep = exported(copy.deepcopy(model), x, decompose=decompose)
        new, report = ss1(ep, reduction=1)
        assert [row.name for row in report.compressed] == ["fixed"]
        assert [row.name for row in report.left] == ["w"]
        module, expected = new.module(), copy.deepcopy(model)
        for _ in range(2):
            assert_same(module(x), expected(x))


def test_outputs_and_preserved_submodules_keep_their_names():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Mlp()
            self.last = nn.Linear(D, D)

        def forward(self, input):
            y = self.inner(input)
            return {"y": y, "z": self.last(y)}

    model, x = Outer(), torch.randn(3, D)
    ep = exported(model, x, preserve_module_call_signature=("inner",))
    new, _ = ss1(ep, reduction=1)
    assert new.graph_signature.user_outputs == ep.graph_signature.user_outputs
    assert new.graph_signature.user_inputs == ep.graph_signature.user_inputs
    flat = torch.export.unflatten(new)
    assert_same(flat(x)["z"], model(x)["z"])
    assert tuple(flat.inner.up.z.shape) == (2 * D, D)


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


# --- what comes after -----------------------------------------------------------------------------


def test_trains():
    model, x = Mlp(), torch.randn(5, D)
    model.down.weight.requires_grad_(False)
    new, _ = ss1(mlp_program(model), reduction=4)
    module = new.module()
    module(x).sum().backward()
    gradients = {name: p.grad is not None for name, p in module.named_parameters()}
    assert gradients == {"up.z": True, "up.bias": True, "down.z": False, "down.bias": True}


def test_compiles_and_decomposes():
    model, x = Mlp().eval(), torch.randn(5, D)
    new, _ = ss1(mlp_program(model))
    expected = new.module()(x)
    core = new.run_decompositions()
    assert "ss1.linear" in str(core.graph)
    assert_same(core.module()(x), expected)
    with torch.no_grad():
        compiled = torch.compile(new.module(), fullgraph=True)
        assert_same(compiled(x), expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keeps_the_dtype(dtype):
    model, x = Mlp().to(dtype), torch.randn(5, D, dtype=dtype)
    new, _ = ss1(exported(model, x), reduction=1)
    assert new.state_dict["up.z"].dtype == dtype
    assert_same(new.module()(x), model(x), 1e-2 if dtype == torch.bfloat16 else 1e-12)


def in_fresh_process(body, *paths, imports="import ss1_compile"):
    code = f"import sys, torch\n{imports}\n{body}"
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_saves_and_loads_in_a_fresh_process(tmp_path):
    model, x = Mlp().eval(), torch.randn(5, D)
    new, _ = ss1(mlp_program(model))
    torch.export.save(new, tmp_path / "program.pt2")
    torch.save({"x": x, "y": new.module()(x).detach()}, tmp_path / "expected.pt")
    size = (tmp_path / "program.pt2").stat().st_size
    torch.export.save(mlp_program(model), tmp_path / "dense.pt2")
    assert size < (tmp_path / "dense.pt2").stat().st_size - 40_000
    in_fresh_process(
        """
ep = torch.export.load(sys.argv[1])
ep.validate()
expected = torch.load(sys.argv[2])
torch.testing.assert_close(ep.module()(expected["x"]).detach(), expected["y"])
assert sorted(n for n in ep.state_dict if n.endswith("z")) == ["down.z", "up.z"]
again, report = ss1_compile.compress_exported(ep, reduction=1, allow_empty=True)
assert not report.compressed
""",
        tmp_path / "program.pt2",
        tmp_path / "expected.pt",
    )


def test_a_loaded_program_can_be_compressed(tmp_path):
    model, x = Tied(embedding=False).eval(), torch.randn(5, D)
    torch.export.save(exported(model, x), tmp_path / "dense.pt2")
    new, report = ss1(torch.export.load(tmp_path / "dense.pt2"), reduction=1)
    assert [row.name for row in report.compressed] == ["first", "second"]
    assert not [name for name in new.state_dict if name.endswith("weight")]
    assert_same(new.module()(x), model(x))


@pytest.mark.slow
def test_aot_inductor_package_runs_in_a_fresh_process(tmp_path):
    """The operator on the CPU is Python: the package calls it through the dispatcher."""
    model, x = Mlp().eval(), torch.randn(5, D)
    new, _ = ss1(mlp_program(model))
    torch.save({"x": x, "y": new.module()(x).detach()}, tmp_path / "expected.pt")
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            new, package_path=str(tmp_path / "package.pt2")
        )
    in_fresh_process(
        """
run = torch._inductor.aoti_load_package(sys.argv[1])
expected = torch.load(sys.argv[2])
torch.testing.assert_close(run(expected["x"]), expected["y"])
assert run(torch.randn(40, 64)).shape == (40, 64)
""",
        path,
        tmp_path / "expected.pt",
    )
    in_fresh_process(
        """
try:
    torch._inductor.aoti_load_package(sys.argv[1])(torch.randn(4, 64))
except RuntimeError as error:
    assert "Could not find schema for ss1::linear" in str(error), error
else:
    raise SystemExit("ran without the operator")
""",
        path,
        imports="",
    )
