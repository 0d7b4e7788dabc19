"""One learned sketch for layers that read the same input."""

import copy

import pytest
import torch
from torch import nn

from ss1_compile import SS1Linear, StructureError, compress, load, save
from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.learned import LearnedStructure
from ss1_compile.projection.project import project
from ss1_compile.projection.shared_sketch import fit_sketch

K = 48


class Heads(nn.Module):
    """Three layers that read one input, as q, k and v do, and one that reads another."""

    def __init__(self, bias=True):
        super().__init__()
        self.q, self.k = nn.Linear(K, K, bias=bias), nn.Linear(K, 2 * K, bias=bias)
        self.v, self.out = nn.Linear(K, K, bias=bias), nn.Linear(K, K, bias=bias)

    def forward(self, x):
        h = torch.tanh(x)
        both = self.q(h) * torch.sigmoid(self.k(h)[..., :K])
        return self.out(both + self.v(h))


def make(bias=True):
    torch.manual_seed(2)
    return nn.Sequential(Heads(bias), Heads(bias)).eval()


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(K, K, generator=generator) / K**0.5
    return [torch.randn(200, K, generator=generator) @ mix for _ in range(count)]


def learned(model, **options):
    options = {"reduction": 2, "projection": "learned", "warn_error": 2.0, **options}
    return compress(model, progress=False, calibration=batches(), **options)


def statistics(rows):
    rows = rows.double()
    return InputStatistics(len(rows), rows.mean(0), rows.T @ rows / len(rows))


@pytest.mark.parametrize("sequential", [False, True])
def test_q_k_and_v_share_one_parameter_within_the_budget(sequential, tmp_path):
    model, x = make(), torch.randn(5, K)
    report = learned(model, sequential=sequential)
    for heads in model:
        assert heads.q.sketch is heads.k.sketch is heads.v.sketch
        assert heads.out.sketch is not heads.q.sketch
        held = {id(p): p.numel() for m in (heads.q, heads.k, heads.v) for p in (m.z, m.sketch)}
        assert 0.8 * 2 * K * K < sum(held.values()) <= 2 * K * K  # K·ΣN/c
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(row.bytes_after for row in report) == stored
    assert all(1.95 < row.reduction < 2.5 for row in report)

    save(model, tmp_path)
    loaded = load(make(), tmp_path)
    assert loaded[0].q.sketch is loaded[0].v.sketch
    assert torch.equal(loaded(x), model(x))
    assert copy.deepcopy(model).half()[1].k.sketch.dtype == torch.float16


def test_it_costs_less_than_sketches_of_their_own():
    errors = {}
    for share in (True, False):
        model = make()
        rows = learned(model, share_sketches=share).compressed
        errors[share] = sum(row.error for row in rows if not row.name.endswith("out"))
        assert (model[0].q.sketch is model[0].k.sketch) is share
    assert errors[True] < 0.97 * errors[False]


@pytest.mark.parametrize(
    "options", [{"overrides": {"0.q": 3}}, {"num_hashes": 2}, {"overrides": {"0.q": None}}]
)
def test_only_layers_of_one_kind_share(options):
    model = make()
    learned(model, **options)
    q, k, v = (getattr(model[0], name) for name in "qkv")
    assert getattr(q, "sketch", None) is not k.sketch
    assert (k.sketch is v.sketch) is ("num_hashes" not in options)
    assert isinstance(v, SS1Linear)


def test_trained_together_it_stays_one():
    model = make(bias=False)
    learned(model)
    model(torch.randn(9, K)).square().sum().backward()
    assert model[0].q.sketch.grad.abs().sum() > 0
    assert len(list(model.parameters())) == 2 * (4 + 2)


def test_z_is_the_least_squares_solution_for_the_shared_blocks():
    torch.manual_seed(0)
    x = batches(1)[0].double()
    weights = [torch.randn(n, K, dtype=torch.float64) for n in (16, 40)]
    known = statistics(x)
    shared = fit_sketch(weights, known, 2, centred=False, damping=1e-9, group_size=24)
    assert shared.group_size == 24
    blocks = torch.block_diag(*shared.blocks[0])
    for w in weights:
        structure = shared.structure(w)
        found = project(w, structure, statistics=known, damping=1e-9, sketch=shared.blocks)
        z = torch.linalg.lstsq(x @ blocks, x @ w.T).solution.T
        torch.testing.assert_close(found.z, z, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.sketch, shared.blocks)


def test_the_group_size_is_chosen_by_the_error_on_held_out_rows():
    torch.manual_seed(0)
    k, n, unseen = 256, 256, statistics(torch.randn(600, 256))
    known = statistics(torch.randn(2000, 256)).combine(unseen)
    low_rank = torch.randn(n, 60) @ torch.randn(60, k) + 0.01 * torch.randn(n, k)
    exact = LearnedStructure.create(k, n, 2, group_size=128)
    blocks = torch.randn(2, 128, exact.rank)
    w = torch.randn(n, exact.reduced_features) @ torch.block_diag(*blocks).T
    assert fit_sketch([low_rank], known, 2, centred=False).group_size == 128  # N/2
    assert fit_sketch([torch.cat([w] * 4)], known, 2, centred=False).group_size == k
    known.held_out = unseen
    assert fit_sketch([low_rank], known, 2, centred=False).group_size == k
    shared = fit_sketch([w], known, 2, centred=False)
    assert shared.group_size == 128
    assert project(w, shared.structure(w), statistics=known, sketch=shared.blocks).error < 1e-3


def test_a_budget_that_allows_no_slot_is_an_error():
    known = statistics(torch.randn(100, 8))
    with pytest.raises(StructureError, match="smaller reduction"):
        fit_sketch([torch.randn(4, 8)], known, 8, centred=False)
