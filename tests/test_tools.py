"""What PyTorch users do to a model, done to one that is compressed or compiled with our backend."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import ss1_compile
from ss1_compile import Report, SS1Config, SS1Linear, UnhandledLinearError, compress

D = 64


class Mlp(nn.Module):
    def __init__(self, width=D):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compressed(model=None, **options):
    """A compressed copy of ``model``, or of a new one."""
    model = Mlp().eval() if model is None else copy.deepcopy(model)
    compress(model, progress=False, **{"warn_error": 2.0, **options})
    return model


def compiled(model, inner="eager", dynamic=None, fullgraph=False, **options):
    options = {"inner_backend": inner, "warn_error": 2.0, **options}
    return torch.compile(
        model, backend="ss1", dynamic=dynamic, fullgraph=fullgraph, options=options
    )


def assert_same(actual, expected, tolerance=1e-5):
    error = (actual - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


# --- options of torch.compile ---------------------------------------------------------------------


def test_max_autotune_reaches_inductor(monkeypatch):
    from torch._inductor import compile_fx as module

    seen = []
    real = module.compile_fx

    def compile_fx(*args, **kwargs):
        seen.append(kwargs.get("config_patches"))  # it calls itself under them
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "compile_fx", compile_fx)
    before = torch._inductor.config.max_autotune
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)).eval()
    x = torch.randn(3, D)
    with torch.no_grad():
        fast = torch.compile(
            model, backend="ss1", options={"mode": "max-autotune", "warn_error": 2.0}
        )
        assert_same(fast(x), compressed(model)(x))
    assert seen[0]["max_autotune"] is True
    assert torch._inductor.config.max_autotune == before  # nothing global is left changed


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dynamic_and_fullgraph_make_one_graph(inner):
    model, report = Mlp().eval(), Report()
    oracle = compressed(model)
    fast = compiled(model, inner, dynamic=True, fullgraph=True, report=report)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for shape in ((2, 3, D), (5, 7, D), (4, 9, D)):
            x = torch.randn(shape)
            assert_same(fast(x), oracle(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(report.compressed) == 2


def test_a_compressed_model_is_one_graph_and_trains_compiled():
    model = compressed()
    eager = copy.deepcopy(model)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    x = torch.randn(5, D)
    fast(x).square().sum().backward()
    eager(x).square().sum().backward()
    for actual, expected in zip(model.parameters(), eager.parameters(), strict=True):
        assert_same(actual.grad, expected.grad)


def test_stance_force_eager_runs_the_dense_model():
    model, x = Mlp().eval(), torch.randn(3, D)
    fast = compiled(model)
    with torch.no_grad():
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(fast(x), model(x))
        assert_same(fast(x), compressed(model)(x))


def test_stance_fail_on_recompile_allows_changed_weights_only():
    model, x = Mlp().eval(), torch.randn(3, D)
    fast = compiled(model, dynamic=False)
    with torch.no_grad():
        fast(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            model.up.weight.mul_(-2)  # bound at run time: no recompilation
            assert_same(fast(x), compressed(model)(x))
            with pytest.raises(RuntimeError, match="fail_on_recompile"):
                fast(torch.randn(7, D))


def test_stance_eager_on_recompile_falls_back_to_the_dense_model():
    model, x, longer = Mlp().eval(), torch.randn(3, D), torch.randn(7, D)
    fast = compiled(model, dynamic=False)
    with torch.no_grad():
        fast(x)
        with torch.compiler.set_stance("eager_on_recompile"):
            assert_same(fast(x), compressed(model)(x))
            assert torch.equal(fast(longer), model(longer))
    # A model that was compressed beforehand has nothing dense to fall back to.
    small = compressed(model)
    fast = torch.compile(small, backend="eager", dynamic=False)
    with torch.no_grad():
        fast(x)
        with torch.compiler.set_stance("eager_on_recompile"):
            assert torch.equal(fast(longer), small(longer))


# --- copies, files, dtypes and devices ------------------------------------------------------------


def test_deepcopy_is_independent():
    model, x = compressed(), torch.randn(3, D)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    with torch.no_grad():
        copied.up.z.neg_()
    assert not torch.allclose(copied(x), model(x))


def test_deepcopy_of_a_compiled_model_has_its_own_weights():
    model, x = Mlp().eval(), torch.randn(3, D)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        copied = copy.deepcopy(fast)
        model.up.weight.zero_()
        assert_same(copied(x), compressed(copied._orig_mod)(x))
        assert_same(fast(x), compressed(model)(x))


def test_pickle_and_torch_save():
    model, x = compressed(), torch.randn(3, D)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    whole, state = io.BytesIO(), io.BytesIO()
    torch.save(model, whole)
    torch.save(model.state_dict(), state)
    for file in (whole, state):
        file.seek(0)
    assert torch.equal(torch.load(whole, weights_only=False)(x), model(x))
    other = compressed(seed=9)  # other rotations: they come with the state dict
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(torch.load(state, weights_only=True))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float64])
def test_casts_after_compression(dtype):
    model, x = compressed(), torch.randn(3, D)
    expected = model(x)
    cast = {torch.half: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
    for small in (getattr(copy.deepcopy(model), cast)(), copy.deepcopy(model).to(dtype)):
        assert small.up.sketch.dtype == torch.int32
        y = small(x.to(dtype))
        assert y.dtype == dtype
        assert_same(y.float(), expected, 1e-5 if dtype == torch.float64 else 3e-2)


def test_casts_after_compilation():
    model, x = Mlp().eval(), torch.randn(3, D)
    fast = compiled(model, reduction=1)
    with torch.no_grad():
        assert_same(fast(x), model(x))
        model.bfloat16()
        assert_same(fast(x.bfloat16()).float(), model(x.bfloat16()).float(), 2e-2)
        model.double()
        assert_same(fast(x.double()), model(x.double()), 1e-12)


def test_meta_skeleton_takes_a_state_dict():
    model, x = compressed(), torch.randn(3, D)
    skeleton = copy.deepcopy(model).to("meta")
    assert skeleton(x.to("meta")).shape == (3, D)
    assigned = copy.deepcopy(skeleton)
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert assigned.up.z.data_ptr() == model.up.z.data_ptr()
    assert torch.equal(assigned(x), model(x))
    filled = skeleton.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    assert torch.equal(filled(x), model(x))


def test_accelerate_loads_into_a_skeleton(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from safetensors.torch import save_file

    model, x = compressed(), torch.randn(3, D)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    layers = {"up": model.up.structure, "down": model.down.structure}
    with accelerate.init_empty_weights(include_buffers=True):
        skeleton = Mlp().eval()
        for name, structure in layers.items():
            skeleton.set_submodule(name, SS1Linear(structure))
    assert skeleton.up.z.is_meta
    loaded = accelerate.load_checkpoint_and_dispatch(
        skeleton, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}
    )
    assert torch.equal(loaded(x), model(x))


def test_a_layer_whose_forward_was_replaced_stays_dense():
    """As accelerate's hooks do: a layer in its place would lose what they do."""
    model, x = Mlp().eval(), torch.randn(3, D)
    real = model.up.forward
    model.up.forward = lambda x: 2 * real(x)
    expected = model(x)
    report = compress(model, reduction=1, progress=False)
    assert [row.name for row in report.compressed] == ["down"]
    assert "forward was replaced" in report["up"].reason
    assert_same(model(x), expected)
    with pytest.raises(UnhandledLinearError, match="up: its forward was replaced"):
        compress(model, strict=True, progress=False)


# --- torch.func and checkpointing -----------------------------------------------------------------


def test_functional_call_of_a_compressed_model():
    model, other, x = compressed(), compressed(), torch.randn(3, D)
    y = functional_call(model, dict(other.named_parameters()), (x,))
    assert_same(y, other(x))


def test_functional_call_inside_a_compiled_function():
    """The weights are arguments of the call: those that are passed are projected."""
    model, other, x, report = Mlp().eval(), Mlp().eval(), torch.randn(3, D), Report()

    @torch.compile(
        backend="ss1", options={"inner_backend": "eager", "warn_error": 2.0, "report": report}
    )
    def call(parameters, x):
        return functional_call(model, parameters, (x,))

    with torch.no_grad():
        for weights in (model, other, model):
            y = call(dict(weights.named_parameters()), x)
            assert_same(y, compressed(weights)(x))
    assert len(report.compressed) == 2


def test_gradients_per_sample_and_ensembles():
    model, x = compressed(), torch.randn(4, D)
    parameters = dict(model.named_parameters())

    def loss(parameters, row):
        return functional_call(model, parameters, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    total = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    for actual, expected in zip(each.values(), total, strict=True):
        assert_same(actual.sum(0), expected)
    other = compressed()
    stacked, buffers = torch.func.stack_module_state([model, other])
    y = torch.func.vmap(lambda p, b: functional_call(model, (p, b), (x,)))(stacked, buffers)
    assert_same(y, torch.stack([model(x), other(x)]))


def test_activation_checkpointing_of_a_compressed_block():
    model, x = compressed(), torch.randn(3, D)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    actual = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    for one, two in zip(actual, expected, strict=True):
        assert torch.equal(one, two)


# --- regions --------------------------------------------------------------------------------------


def test_equal_compressed_blocks_compile_once():
    model = nn.Sequential(*[compressed() for _ in range(4)]).eval()
    x = torch.randn(3, D)
    expected = model(x)
    graphs = []

    def inner(gm, inputs):
        graphs.append(gm)
        return gm.forward

    for block in model:
        block.compile(backend=inner)
    with torch.no_grad():
        assert_same(model(x), expected)
    assert len(graphs) == 1


def test_compile_goes_on_after_a_graph_break():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Mlp(), Mlp()

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model, x, report = Broken().eval(), torch.randn(3, D), Report()
    expected = compressed(model)(x)
    config = SS1Config(warn_error=2.0)
    fast = ss1_compile.compile(model, config, progress=False, report=report)
    assert [row.name for row in report] == ["first.up", "first.down", "second.up", "second.down"]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert_same(fast(x), expected)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(x)


# --- dry runs and strictness ----------------------------------------------------------------------


def test_dry_run_of_the_backend_reports_and_computes_densely():
    model, x, report, real = Mlp().eval(), torch.randn(3, D), Report(), Report()
    with torch.no_grad():
        assert torch.equal(compiled(model, dry_run=True, report=report)(x), model(x))
        torch._dynamo.reset()
        compiled(model, report=real)(x)
    assert report.layers == real.layers
    assert len(report.compressed) == 2
    assert torch.equal(compiled(model, dry_run=True, reduction=1)(x), model(x))  # gradients on


@pytest.mark.parametrize("dry_run", [1, "yes", None])
def test_bad_dry_run(dry_run):
    with torch.no_grad(), pytest.raises(Exception, match="ConfigError: dry_run must be True or"):
        compiled(Mlp(), dry_run=dry_run)(torch.randn(2, D))


def test_strict_is_the_same_through_every_door():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.ok = nn.Linear(D, D)
            self.odd = nn.Bilinear(D, D, D)

        def forward(self, x):
            return self.odd(self.ok(x), x)

    model, x = Odd().eval(), torch.randn(3, D)
    with pytest.raises(UnhandledLinearError, match=r"odd.*strict=True"):
        compress(copy.deepcopy(model), strict=True, progress=False)
    with torch.no_grad(), pytest.raises(Exception, match=r"UnhandledLinearError: odd.*strict=True"):
        compiled(model, strict=True)(x)
    program = torch.export.export(model, (x,))
    with pytest.raises(UnhandledLinearError, match=r"odd.*strict=True"):
        ss1_compile.compress_exported(program, strict=True)
    # What the configuration leaves dense is no failure.
    report = compress(model, strict=True, exclude=("odd",), progress=False, warn_error=2.0)
    assert report["odd"].reason == "excluded by 'odd'"


# --- CUDA graphs ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_of_a_compressed_model(mode):
    model = compressed(Mlp(256).eval().cuda().half())
    fast = torch.compile(model, mode=mode)
    with torch.no_grad():
        for rows in (64, 64, 64, 5, 5, 64):
            x = torch.randn(rows, 256, device="cuda", dtype=torch.half)
            y = fast(x).clone()
            assert_same(y.float(), model(x).float(), 5e-3)
        model.up.z.neg_()  # read at replay
        assert_same(fast(x).clone().float(), model(x).float(), 5e-3)


@pytest.mark.gpu
def test_cuda_graphs_see_every_change_of_a_bound_weight():
    model = Mlp(256).eval().cuda().half()
    fast = torch.compile(
        model, backend="ss1", options={"mode": "reduce-overhead", "warn_error": 2.0}
    )
    x = torch.randn(64, 256, device="cuda", dtype=torch.half)
    with torch.no_grad():
        for _ in range(3):
            for _ in range(3):
                y = fast(x).clone()
            assert_same(y.float(), compressed(model)(x).float(), 5e-3)
            model.up.weight.mul_(-1.5)
            model.down.weight = nn.Parameter(torch.randn_like(model.down.weight) / 16)
