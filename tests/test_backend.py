"""``backend="ss1"``: exact at c = 1, the same as ``compress`` above, in every way of compiling."""

import copy

import pytest
import torch
import torch.nn.functional as F
from backend_support import D, Mlp, assert_same, call_compiled, compiled, in_place, ss1_of
from torch import nn

from ss1_compile import Report, SS1Config, compress
from ss1_compile.backend.captured import qualified_name


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
    assert qualified_name(source) == name


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
