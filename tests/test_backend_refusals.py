"""``backend="ss1"`` is loud when it must refuse, and names what it leaves dense."""

import pytest
import torch
from backend_support import D, Mlp, assert_same, call_compiled, compiled, ss1_of
from torch import nn

from ss1_compile import Report, SS1Warning


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
            return self.ok(torch.einsum("...k,kk->...k", x, self.w))

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


def test_weights_that_stay_dense_are_named():
    """A computed weight by its module, those in a branch; not those of attention."""

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
    attention = {"attention.in_proj_weight", "attention.out_proj"}
    assert {row.name for row in report.compressed} == {"ok", *attention}
    reasons = {row.name: row.reason for row in report.left}
    assert "computed" in reasons.pop("normed")
    assert "inside cond" in reasons.pop("yes")
    assert "inside cond" in reasons.pop("no")
    assert not reasons


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
