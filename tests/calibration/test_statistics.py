"""Input statistics are collected from every spelling, and bad data is named."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_support import Attention, Conv1D, assert_moments
from torch import Tensor, nn

from ss1_compile.calibration import moments as moments_module
from ss1_compile.calibration.statistics import (
    calibrate,
    statistics_of,
)
from ss1_compile.errors import CalibrationError


class Spelled(nn.Module):
    """One weight, one way to write a linear."""

    def __init__(self, call, shape) -> None:
        super().__init__()
        self.call, self.weight = call, nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias)


N_K, K_N = (3, 5), (5, 3)


SPELLINGS = {
    "linear": (N_K, lambda x, w, b: F.linear(x, w, b)),
    "linear keywords": (N_K, lambda x, w, b: F.linear(input=x, weight=w)),
    "linear transposed": (K_N, lambda x, w, b: F.linear(x, w.t())),
    "matmul .T": (N_K, lambda x, w, b: x @ w.T),
    "matmul": (K_N, lambda x, w, b: torch.matmul(x, w)),
    "matmul keyword": (K_N, lambda x, w, b: torch.matmul(x, other=w)),
    "method": (N_K, lambda x, w, b: x.matmul(w.mT)),
    "mm": (K_N, lambda x, w, b: torch.mm(x, w)),
    "mm method": (N_K, lambda x, w, b: x.mm(w.transpose(0, 1))),
    "addmm": (K_N, lambda x, w, b: torch.addmm(b, x, w)),
    "addmm keywords": (N_K, lambda x, w, b: torch.addmm(b, mat1=x, mat2=w.t(), alpha=2)),
    "addmm method": (N_K, lambda x, w, b: b.expand(len(x), 3).addmm(x, w.permute(1, 0))),
    "inner": (N_K, lambda x, w, b: torch.inner(x, w)),
    "inner method": (N_K, lambda x, w, b: x.inner(w)),
    "linalg.matmul": (K_N, lambda x, w, b: torch.linalg.matmul(x, w)),
    "tensordot": (K_N, lambda x, w, b: torch.tensordot(x, w, dims=1)),
    "tensordot transposed": (N_K, lambda x, w, b: torch.tensordot(x, w.t(), dims=1)),
    "einsum transposed": (N_K, lambda x, w, b: torch.einsum("mk,kn->mn", x, w.t())),
    "tensordot weight first": (N_K, lambda x, w, b: torch.tensordot(w, x, dims=([1], [1]))),
    "mv": (N_K, lambda x, w, b: torch.stack([torch.mv(w, row) for row in x])),
    "addmv": (N_K, lambda x, w, b: torch.stack([torch.addmv(b, w, row) for row in x])),
    "addmv method": (N_K, lambda x, w, b: torch.stack([b.addmv(w, vec=row) for row in x])),
    "detached view": (N_K, lambda x, w, b: x @ w.detach().view(3, 5).t()),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_linear_is_seen(spelling):
    shape, call = SPELLINGS[spelling]
    model = Spelled(call, shape)
    batches = [torch.randn(4, 5), torch.randn(2, 5)]
    found = calibrate(model, batches)
    assert list(found) == ["weight"]
    assert_moments(found["weight"], torch.cat(batches))


def test_conv1d_of_transformers_and_nested_modules():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(nn.Sequential(pytorch_utils.Conv1D(6, 5)), nn.Linear(6, 2))
    x = torch.randn(3, 4, 5)
    found = calibrate(model, [x])
    assert list(found) == ["0.0.weight", "1.weight"]
    assert_moments(found["0.0.weight"], x.reshape(-1, 5))
    assert_moments(found["1.weight"], model[0](x).detach().reshape(-1, 6))


def test_products_that_are_no_linear_are_not_taken_for_one():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.a, self.b, self.used = (
                nn.Parameter(torch.randn(4, 4)) for _ in range(4)
            )

        def forward(self, x: Tensor) -> Tensor:
            merged = self.a @ self.b
            return F.linear(x @ x.mT, self.used) + self.left @ x + merged + self.a[:4, :2] @ x[:2]

    found = calibrate(Model(), [torch.randn(4, 4)])
    assert list(found) == ["used"]
    assert found.unreached == ("left", "a", "b")


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 40),
)
def test_streaming_equals_one_shot(sizes, dtype, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments_module, "CHUNK_ELEMENTS", chunk)
        model = nn.Linear(6, 2).to(dtype)
        batches = [(torch.randn(n, 6) * 3 + 1).to(dtype) for n in sizes]
        found = calibrate(model, batches)
    assert_moments(found["weight"], torch.cat(batches))


def test_autocast_and_half_precision_models():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    x = torch.randn(20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = calibrate(model, [x])
        hidden = model[0](x)
    assert hidden.dtype == torch.bfloat16
    assert_moments(found["0.weight"], x)
    assert_moments(found["1.weight"], hidden.detach())


def test_batches_of_every_kind():
    model = Attention()
    x = torch.randn(2, 3, 12)
    wanted = calibrate(model, [{"x": x, "scale": 2.0}])["output.weight"].second_moment
    for batch in ((x, None, 2.0), [x, None, 2.0]):
        found = calibrate(model, [batch])["output.weight"].second_moment
        torch.testing.assert_close(found, wanted)
    found = calibrate(model, iter(["two"]), forward=lambda m, batch: m(x, scale=len(batch) - 1))
    torch.testing.assert_close(found["output.weight"].second_moment, wanted)
    calibrate(model, [x])


def test_the_model_is_left_as_it_was():
    model = Attention().train()
    model.norm.eval()
    seen = []
    model.dropout.register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    calibrate(model, [torch.randn(2, 3, 12)])
    assert seen == [(False, False)]
    assert model.training
    assert model.dropout.training
    assert not model.norm.training

    def fail(model, batch):
        raise KeyError("the model's own error")

    with pytest.raises(KeyError, match="own error"):
        calibrate(model, [1], forward=fail)
    assert model.training
    assert not model.norm.training
    assert torch.is_grad_enabled()


def test_masked_rows_are_left_out_even_if_they_are_not_finite():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), Conv1D(4, 6)
            self.pooled = nn.Linear(4, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            y = self.second(self.first(x)).nan_to_num()
            return self.pooled(y[:, 0])

    model, x = Model(), torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    x[mask == 0] = float("nan")
    found = calibrate(model, [{"x": x, "attention_mask": mask}])
    assert_moments(found["first.weight"], x[mask.bool()])
    assert_moments(found["second.weight"], model.first(x[mask.bool()]).detach())
    assert found["pooled.weight"].count == 3
    with pytest.raises(CalibrationError, match=r"first\.weight holds nan"):
        calibrate(model, [(x, mask)])  # positional: nobody says which of them is a mask
    wide = mask[:, None, None, :]
    with pytest.raises(CalibrationError, match="nan"):
        calibrate(model, [{"x": x, "attention_mask": wide}])


def test_names_restrict_and_tied_weights_have_all_their_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 6)
            self.block = nn.Linear(6, 6)
            self.again = self.block
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.table.weight
            self.unused = nn.Linear(6, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.again(self.block(self.table(ids))))

    model, ids = Tied(), torch.randint(0, 9, (4, 5))
    found = calibrate(model, [ids])
    assert list(found) == ["block.weight", "again.weight", "table.weight", "head.weight"]
    assert found["block.weight"] is found["again.weight"]
    assert found["block.weight"].count == 40
    assert found["head.weight"] is found["table.weight"] is statistics_of(model.head.weight)
    assert found.unreached == ("unused.weight",)
    some = calibrate(model, [ids], names=["head.weight", "unused.weight"])
    assert list(some) == ["head.weight"]
    assert some.unreached == ("unused.weight",)
    assert statistics_of(model.block.weight) is found["block.weight"]
    assert statistics_of(model.head.weight) is some["head.weight"]


def test_a_weight_used_both_ways_has_no_single_statistics():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.other = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.other((x @ self.weight) @ self.weight.t())

    found = calibrate(Both(), [torch.randn(3, 4)] * 2)
    assert list(found) == ["other.weight"]
    assert found.unreached == ("weight",)


def test_compiled_models_run_eagerly_and_keep_their_names():
    model = Attention()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 12)
    found = calibrate(compiled, [x])
    assert_moments(found["query.weight"], model.norm(x).detach().reshape(-1, 12))
    assert statistics_of(model.query.weight) is found["query.weight"]


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ([], {}, "empty; pass at least one batch"),
        (iter(()), {}, "empty"),
        (torch.randn(2, 3, 12), {}, "wrap it in a list"),
        ({"x": torch.randn(2, 3, 12)}, {}, "one dict; wrap it"),
        (["text"], {}, "a batch is a str.*forward="),
        ([torch.randn(2, 3, 12)], {"names": ["query"]}, "did you mean 'query.weight'"),
        (
            [torch.randn(2, 3, 12)],
            {"names": ["query.bias"]},
            "'query.bias' is not a floating",
        ),
        ([torch.full((2, 3, 12), float("inf"))], {}, r"query\.weight holds nan"),
        ([torch.randn(2, 3, 12)], {"forward": lambda m, b: m.norm(b)}, "reached a linear"),
        ([torch.randn(0, 3, 12)], {}, "reached a linear weight"),
    ],
)
def test_bad_data_is_named_and_binds_nothing(data, options, words):
    model = Attention()
    with pytest.raises(CalibrationError, match=words):
        calibrate(model, data, progress=False, **options)
    assert all(statistics_of(p) is None for p in model.parameters())


def test_overflow_inside_a_model_names_the_layer_behind_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.fill_(float("inf"))
    with pytest.raises(CalibrationError, match=r"the input of 1\.weight"):
        calibrate(model, [torch.ones(2, 4)])


def test_progress_bar_only_for_many_batches(capsys):
    model, x = nn.Linear(4, 2), torch.randn(2, 4)
    calibrate(model, [x] * 3)
    calibrate(model, [x] * 50, progress=False)
    assert capsys.readouterr() == ("", "")
    calibrate(model, [x] * 50)
    captured = capsys.readouterr()
    assert captured.out == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_statistics_stay_on_the_device(dtype):
    model = Attention().to("cuda", dtype)
    batches = [torch.randn(2, 3, 12, device="cuda", dtype=dtype) for _ in range(3)]
    found = calibrate(model, batches)
    assert found["query.weight"].second_moment.is_cuda
    assert found["query.weight"] is found["value.weight"]
    rows = torch.cat([model.norm(x).detach().reshape(-1, 12) for x in batches])
    assert_moments(found["query.weight"], rows)
