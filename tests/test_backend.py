"""``backend="ss1"``: exact at c = 1, right when weights change, and loud when it must refuse."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ss1_compile import Report, SS1Config, SS1Warning, compress
from ss1_compile import backend as backend_module
from ss1_compile import binding as binding_module

D = 64


class Mlp(nn.Module):
    def __init__(self, width=D, hidden=2 * D):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, inner="eager", **options):
    options.setdefault("warn_error", 2.0)
    return torch.compile(model, backend="ss1", options={"inner_backend": inner, **options})


def ss1_of(model, **options):
    """The same compression through the other door: the oracle for every test at c > 1."""
    other = copy.deepcopy(model)
    compress(other, progress=False, **{"warn_error": 2.0, **options})
    return other


def assert_same(actual, expected, tolerance=1e-5):
    error = (actual - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.fixture
def counted(monkeypatch):
    """Counts projections."""
    calls = []
    real = binding_module.project

    def project(*args, **kwargs):
        calls.append(kwargs["name"])
        return real(*args, **kwargs)

    monkeypatch.setattr(binding_module, "project", project)
    return calls


def test_is_listed_without_importing_us():
    assert "ss1" in torch.compiler.list_backends()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_exact_at_reduction_one(inner):
    model, x = Mlp().eval(), torch.randn(3, 5, D)
    with torch.no_grad():
        assert_same(compiled(model, inner, reduction=1)(x), model(x))


@pytest.mark.parametrize("reduction", [2, 3, 4, 8])
def test_equals_the_compressed_model(reduction):
    model, x = Mlp().eval(), torch.randn(7, D)
    expected = ss1_of(model, reduction=reduction)(x)
    with torch.no_grad():
        assert_same(compiled(model, reduction=reduction)(x), expected.detach())


def test_second_instance_reuses_the_graph_with_its_own_weights(counted):
    first, second = Mlp().eval(), Mlp().eval()
    x = torch.randn(4, D)
    report = Report()

    @torch.compile(
        backend="ss1", options={"inner_backend": "eager", "report": report, "warn_error": 2.0}
    )
    def call(model, x):
        return model(x)

    with torch.no_grad():
        call(first, x)
        assert_same(call(second, x), ss1_of(second)(x))
        assert_same(call(first, x), ss1_of(first)(x))


def in_place(model):
    with torch.no_grad():
        model.up.weight.mul_(-2)


def new_parameter(model):
    model.up.weight = nn.Parameter(torch.randn_like(model.up.weight))


def new_data(model):
    model.up.weight.data = torch.randn_like(model.up.weight)


def load_state(model):
    model.load_state_dict(Mlp().state_dict())


def load_state_assign(model):
    model.load_state_dict(Mlp().state_dict(), assign=True)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize(
    "change", [in_place, new_parameter, new_data, load_state, load_state_assign]
)
def test_changed_weights_are_seen(change, inner):
    model, x = Mlp().eval(), torch.randn(4, D)
    fast = compiled(model, inner)
    with torch.no_grad():
        before = fast(x)
        change(model)
        after = fast(x)
        assert_same(after, ss1_of(model)(x))
        assert not torch.allclose(before, after)


def test_unchanged_weights_are_projected_once(counted):
    model = Mlp().eval()
    fast = compiled(model)
    with torch.no_grad():
        for rows in (2, 3, 4, 5):  # recompiles for a dynamic batch on the way
            fast(torch.randn(rows, D))
    assert sorted(counted) == ["down", "up"]


def test_dynamic_batch_and_sequence():
    model = Mlp().eval()
    fast = torch.compile(
        model,
        backend="ss1",
        dynamic=True,
        options={"warn_error": 2.0},
    )
    oracle = ss1_of(model)
    with torch.no_grad():
        for shape in ((2, 3, D), (5, 7, D), (1, 4, D)):
            x = torch.randn(shape)
            assert_same(fast(x), oracle(x))


def test_train_eval_toggle():
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, D))
    fast, x = compiled(model), torch.randn(16, D)
    with torch.no_grad():
        model.eval()
        expected = ss1_of(model)(x)
        assert_same(fast(x), expected)
        model.train()
        assert not torch.allclose(fast(x), expected)
        model.eval()
        assert_same(fast(x), expected)


def test_weight_tied_to_an_embedding_stays_dense_and_the_report_says_so():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(100, D)
            self.body = nn.Linear(D, D)
            self.head = nn.Linear(D, 100, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.body(self.embedding(ids)))

    model, report = Tied().eval(), Report()
    ids = torch.randint(0, 100, (2, 5))
    with torch.no_grad():
        assert_same(compiled(model, report=report)(ids), ss1_of(model)(ids))
    assert [row.name for row in report.compressed] == ["body"]
    assert "also used by embedding" in report.left[0].reason


def test_one_weight_in_two_linears():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x):
            return self.layer(self.layer(x))

    model, x = Twice().eval(), torch.randn(3, D)
    with torch.no_grad():
        assert_same(compiled(model)(x), ss1_of(model)(x))


def test_graph_breaks():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            x = self.norm(x)  # a fragment without linears is no error
            torch._dynamo.graph_break()
            return self.b(x)

    model, x, report = Broken().eval(), torch.randn(3, D), Report()
    with torch.no_grad():
        assert_same(compiled(model, report=report)(x), ss1_of(model)(x))
    assert {row.name for row in report.compressed} == {"a", "b"}


def test_equal_blocks_share_one_graph_under_regional_compilation():
    model = nn.Sequential(*[Mlp() for _ in range(6)]).eval()
    oracle = ss1_of(model)
    graphs = []

    def inner(gm, inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.register_backend(inner, name="ss1_test_counter")
    for block in model:
        block.compile(
            backend="ss1", options={"inner_backend": "ss1_test_counter", "warn_error": 2.0}
        )
    x = torch.randn(3, D)
    with torch.no_grad():
        assert_same(model(x), oracle(x))
    assert len(graphs) == 1


def test_inference_mode_and_autocast():
    model, x = Mlp().eval(), torch.randn(3, D)
    with torch.inference_mode():
        assert_same(compiled(model, reduction=1)(x), model(x))
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = compiled(model, "inductor", reduction=1)(x)
        assert y.dtype == model(x).dtype
        assert_same(y.float(), model(x).float(), 2e-2)


def test_bfloat16_model():
    model, x = Mlp().eval().bfloat16(), torch.randn(3, D, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_same(compiled(model, "inductor", reduction=1)(x).float(), model(x).float(), 2e-2)


def test_functional_spellings():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.kn = nn.Parameter(torch.randn(D, 2 * D) / 8)
            self.qkv = nn.Parameter(torch.randn(3 * D, 2 * D) / 8)
            self.bias = nn.Parameter(torch.randn(3 * D))
            self.register_buffer("fixed", torch.randn(D, D) / 8)

        def forward(self, x):
            x = x @ self.kn
            q, k, v = F.linear(x, self.qkv, self.bias).chunk(3, -1)
            a, b = self.qkv[:D], self.qkv.t()
            del a, b
            return torch.addmm(self.bias[:D], q + k * v, self.fixed)

    model, x, report = Raw().eval(), torch.randn(5, D), Report()
    with torch.no_grad():
        assert_same(compiled(model, "inductor", reduction=1, report=report)(x), model(x))
    assert {row.name for row in report.compressed} == {"kn", "qkv", "fixed"}


def test_projections_die_with_their_weights():
    gc.collect()
    before = len(binding_module._bound)
    model = Mlp().eval()
    with torch.no_grad():
        compiled(model)(torch.randn(2, D))
    assert len(binding_module._bound) == before + 2
    z = weakref.ref(next(reversed(binding_module._bound.values())).projection.z)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(binding_module._bound) == before
    assert z() is None


# --- refusals -----------------------------------------------------------------------------------


def call_compiled(model, grad=False, **options):
    with torch.set_grad_enabled(grad):
        return compiled(model.eval(), **options)(torch.randn(2, D))


def test_training_is_refused_loudly():
    with pytest.raises(Exception, match=r"TrainingError.*up requires gradients.*compress"):
        call_compiled(Mlp(), grad=True)
    # Frozen weights are fine with gradients on.
    torch._dynamo.reset()
    model = Mlp().eval().requires_grad_(False)
    x = torch.randn(2, D, requires_grad=True)
    y = compiled(model, reduction=1, inner="aot_eager")(x)
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    assert_same(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reductoin": 4}, "did you mean 'reduction'"),
        ({"inner_backned": "eager"}, "did you mean 'inner_backend'"),
        ({"reduction": 0}, "reduction must be at least 1"),
        ({"mode": "fastest"}, "mode='fastest'"),
        ({"report": []}, "report must be"),
        ({"lowering": "fastest"}, "lowering must be one of library, triton"),
        ({"inductor": {"max_autotune": True}}, "need inner_backend='inductor'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(Exception, match=message):
        call_compiled(Mlp(), **options)


def test_nothing_to_compress():
    with pytest.raises(Exception, match=r"NothingToCompressError.*none"):
        call_compiled(nn.Sequential(nn.LayerNorm(D)))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"NothingToCompressError.*excluded by 'up'"):
        call_compiled(Mlp(), exclude=("up", "down"))
    torch._dynamo.reset()
    call_compiled(nn.Sequential(nn.LayerNorm(D)), allow_empty=True)


def test_strict_names_the_first_unhandled_linear():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(D, D))
            self.ok = nn.Linear(D, D)

        def forward(self, x):
            return self.ok(torch.einsum("...k,nk->...n", x, self.w))

    with pytest.raises(Exception, match="UnhandledLinearError: w: einsum"):
        call_compiled(Odd(), strict=True)
    torch._dynamo.reset()
    report = Report()
    call_compiled(Odd(), report=report)
    assert "einsum" in report["w"].reason


def test_ruin_is_warned_of_once_and_max_error_keeps_layers_dense():
    model = Mlp()
    with pytest.warns(SS1Warning, match="2 of 2 projected layers lose more than 50%") as caught:
        call_compiled(model, warn_error=0.5)
    assert len([w for w in caught if w.category is SS1Warning]) == 1
    torch._dynamo.reset()
    report = Report()
    x = torch.randn(2, D)
    with torch.no_grad():
        y = compiled(model, max_error=0.5, allow_empty=True, report=report)(x)
        assert_same(y, model(x))
    assert all("exceeds max_error = 0.5" in row.reason for row in report.left)
    assert len(report.left) == 2


def test_weights_of_a_given_structure_are_recovered_exactly():
    small = ss1_of(Mlp().eval(), reduction=4, seed=9, block_k=8)
    structures = {name: small.get_submodule(name).structure for name in ("up", "down")}
    dense = copy.deepcopy(small)
    for name in structures:
        dense.set_submodule(name, small.get_submodule(name).to_linear())
    report, x = Report(), torch.randn(3, D)
    with torch.no_grad():
        fast = compiled(dense, structures=structures, report=report, warn_error=1e-5)
        assert_same(fast(x), small(x))
    assert all(row.exact for row in report.compressed)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['a']._modules['0']._parameters['weight']", "a.0.weight"),
        ("L['self']._modules['a'].__dict__['_modules']['b']._parameters['weight']", "a.b.weight"),
        ("L['self'].layers[3].weight", "layers.3.weight"),
        ("L['self']._buffers['table']", "table"),
        ("L['w']", "L['w']"),
        ("f(L['self'].w)", "f(L['self'].w)"),
    ],
)
def test_names_are_read_from_every_form_of_source(source, name):
    assert backend_module._qualified_name(source) == name


def test_config_means_the_same_as_in_compress():
    options = {"overrides": {"up": 2, "*": None}, "seed": 3, "signed": False}
    model, report = Mlp().eval(), Report()
    x = torch.randn(4, D)
    with torch.no_grad():
        fast = compiled(model, report=report, **options)(x)
    other = copy.deepcopy(model)
    rows = compress(other, SS1Config(**options, warn_error=2.0), progress=False)
    assert_same(fast, other(x).detach())
    assert [(r.name, r.reduction, r.reason) for r in rows] == [
        (r.name, r.reduction, r.reason) for r in report
    ]


def test_lowering_override_holds_while_the_compiled_graph_runs(monkeypatch):
    from ss1_compile.kernels import lowering, native

    seen = []
    real = native.linear

    def linear(*args):
        seen.append(lowering._override.get())
        return real(*args)

    monkeypatch.setattr(native, "linear", linear)
    call_compiled(Mlp(), lowering="library")
    assert set(seen) == {"library"}
    assert lowering._override.get() is None


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
def test_gpu_modes(mode):
    model = Mlp(256, 1024).eval().cuda().half()
    x = torch.randn(96, 256, device="cuda", dtype=torch.half)
    report = Report()
    options = {"warn_error": 2.0, "report": report, **({"mode": mode} if mode else {})}
    oracle = ss1_of(model)
    with torch.no_grad():
        fast = torch.compile(model, backend="ss1", options=options)
        for _ in range(4):  # warm-up, recording and replay of CUDA graphs
            y = fast(x).clone()
        assert_same(y.float(), oracle(x).float(), 5e-3)
        in_place(model)
        assert_same(fast(x).float(), ss1_of(model)(x).float(), 5e-3)
        for rows in (1, 17, 300):
            x = torch.randn(rows, 256, device="cuda", dtype=torch.half)
            assert_same(fast(x).float(), ss1_of(model)(x).float(), 5e-3)
    assert all(row.lowering is not None and row.speedup > 0 for row in report.compressed)


def test_weights_that_stay_dense_are_named():
    """A computed weight by its module, each weight of a fused operator, those in a branch."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))
            self.attention = nn.MultiheadAttention(D, 4, batch_first=True)
            self.yes, self.no, self.ok = (nn.Linear(D, D) for _ in range(3))

        def forward(self, x):
            x = self.normed(self.ok(x))
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return torch.cond(x.sum() > 0, lambda x: self.yes(x), lambda x: self.no(x), (x,))

    torch._dynamo.reset()
    report, model, x = Report(), Odd().eval(), torch.randn(2, 5, D)
    options = {"reduction": 1, "report": report, "inner_backend": "eager"}
    with torch.no_grad():
        fast = torch.compile(model, backend="ss1", options=options)
        assert_same(fast(x), model(x))
    assert {row.name for row in report.compressed} == {"ok"}
    reasons = {row.name: row.reason for row in report.left}
    assert "computed" in reasons.pop("normed")
    assert "opaque" in reasons.pop("attention.in_proj_weight")
    assert "opaque" in reasons.pop("attention.out_proj")
    assert "inside cond" in reasons.pop("yes")
    assert "inside cond" in reasons.pop("no")
    assert not reasons


@pytest.mark.parametrize("dynamic", [False, True])
def test_other_spellings_are_rewritten_with_symbolic_sizes(dynamic):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.Parameter(torch.randn(D, 4, 32) / 8)
            self.merge = nn.Parameter(torch.randn(4, 32, D) / 8)
            self.point = nn.Conv1d(D, D, 1)

        def forward(self, x):
            h = torch.einsum("btd,dhk->bhtk", x, self.heads)
            y = torch.einsum("bhtk,hkd->btd", h, self.merge)
            y = self.point(y.transpose(1, 2))
            return y.view(y.shape[0], -1)

    torch._dynamo.reset()
    report, model = Report(), Odd().eval()
    options = {"reduction": 1, "report": report, "inner_backend": "aot_eager"}
    fast = torch.compile(model, backend="ss1", options=options, dynamic=dynamic)
    with torch.no_grad():
        for shape in ((2, 5, D), (3, 7, D)):
            x = torch.randn(shape)
            assert_same(fast(x), model(x))
    assert {row.name for row in report.compressed} == {"heads", "merge", "point"}
    assert not report.left


def test_checkpointed_blocks_are_rewritten():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Mlp()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    torch._dynamo.reset()
    report, model, x = Report(), Model().eval(), torch.randn(5, D)
    options = {"reduction": 1, "report": report, "inner_backend": "eager"}
    with torch.no_grad():
        assert_same(torch.compile(model, backend="ss1", options=options)(x), model(x))
    assert {row.name for row in report.compressed} == {"block.up", "block.down"}
