"""Sketches fitted to outputs that are weighed by what the model makes of them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ss1_compile import compress
from ss1_compile.calibration.statistics import InputStatistics
from ss1_compile.learned import LearnedStructure
from ss1_compile.projection.project import project
from ss1_compile.projection.shared_sketch import fit_sketch
from ss1_compile.projection.target import Target
from ss1_compile.projection.weighing import EQUAL_PART, weighed_rows

DAMPING = 1e-3


def known(k, rows=300, mean=0.0):
    mix = torch.randn(k, k, dtype=torch.float64) / k**0.5
    x = torch.randn(rows, k, dtype=torch.float64) @ mix + mean
    return InputStatistics(rows, x.mean(0), x.T @ x / rows)


def materialize(projection):
    return projection.z.double() @ torch.block_diag(*projection.sketch[0].double()).T


def lost(w, w_hat, h, gamma):
    e = w - w_hat
    return (gamma @ e @ h @ e.T).trace().item()


def damped(h):
    return h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def mixed(weights, gradients, h):
    """The M that is fitted to, by its formula."""
    m = sum(gradients)
    alike = sum(w.T @ w / (w @ h @ w.T).trace() for w in weights) / len(weights)
    return m / (m @ h).trace() + EQUAL_PART * alike


@settings(max_examples=20, deadline=None)
@given(
    st.integers(2, 24),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.integers(0, 2**16),
)
def test_rows_stand_for_all_weights(k, sizes, seed):
    torch.manual_seed(seed)
    statistics = known(k)
    weights = [torch.randn(n, k, dtype=torch.float64) for n in sizes]
    gradients = []
    for w in weights:
        delta = torch.randn(len(w), len(w), dtype=torch.float64)
        gradients.append(w.T @ delta @ delta.T @ w)
    target = Target.of(statistics, False, torch.device("cpu"))
    rows = weighed_rows(weights, gradients, target)
    wanted = mixed(weights, gradients, statistics.second_moment)
    torch.testing.assert_close(rows.T @ rows, wanted, rtol=1e-8, atol=1e-8 * wanted.max().item())


@settings(max_examples=15, deadline=None)
@given(st.integers(12, 40), st.integers(12, 60), st.booleans(), st.integers(0, 2**16))
def test_one_group_has_the_closed_solution(k, n, centred, seed):
    torch.manual_seed(seed)
    w, statistics = torch.randn(n, k, dtype=torch.float64), known(k, mean=0.3)
    gamma = torch.diag(torch.logspace(0, -4, n, dtype=torch.float64))
    statistics.gradients = w.T @ gamma @ w
    structure = LearnedStructure(k, n, k, k // 3)
    bias = torch.zeros(n, dtype=torch.float64) if centred else None
    found = project(w, structure, bias, statistics=statistics, damping=DAMPING)

    h = statistics.covariance() if centred else statistics.second_moment
    energy = (gamma @ w @ h @ w.T).trace()
    whole = (w @ h @ w.T).trace()
    mixed_gamma = gamma / energy + EQUAL_PART / whole * torch.eye(n, dtype=torch.float64)
    factor = torch.linalg.cholesky(damped(h))
    values = torch.linalg.eigvalsh(factor.T @ w.T @ mixed_gamma @ w @ factor)
    least = values[: -structure.rank].sum().item()
    error = lost(w, materialize(found), damped(h), mixed_gamma)
    assert error == pytest.approx(least, rel=1e-6, abs=1e-8)


def test_it_serves_the_outputs_that_count():
    torch.manual_seed(0)
    n, k = 48, 32
    w, statistics = torch.randn(n, k, dtype=torch.float64), known(k)
    gamma = torch.diag((torch.arange(n) < n // 4).double())
    structure = LearnedStructure(k, n, k, k // 4)
    h = statistics.second_moment
    errors = []
    for gradients in (None, w.T @ gamma @ w):
        found = project(w, structure, statistics=replace(statistics, gradients=gradients))
        errors.append((lost(w, materialize(found), h, gamma), found.error))
    alike, weighed = errors
    assert weighed[0] < 0.5 * alike[0]
    assert weighed[1] > alike[1]  # the reported error counts all outputs alike


@pytest.mark.parametrize("size", [16, 48])
def test_equal_weights_change_nothing(size):
    torch.manual_seed(0)
    n, k = 60, 48
    w, statistics = torch.randn(n, k, dtype=torch.float64), known(k)
    structure = LearnedStructure(k, n, size, size // 4)
    wanted = project(w, structure, statistics=statistics)
    weighed = replace(statistics, gradients=7 * w.T @ w)
    found = project(w, structure, statistics=weighed)
    torch.testing.assert_close(materialize(found), materialize(wanted), rtol=1e-5, atol=1e-5)
    blocks = fit_sketch([w, 0.1 * w], statistics, 2, centred=False, group_size=size)
    same = fit_sketch(
        [w, 0.1 * w], statistics, 2, centred=False, group_size=size, gradients=[w.T @ w, w.T @ w]
    )
    spans = [torch.linalg.qr(s.blocks[0])[0] for s in (blocks, same)]
    torch.testing.assert_close(*(q @ q.mT for q in spans), rtol=1e-5, atol=1e-5)


def test_a_weight_that_reaches_nothing_counts_alike():
    torch.manual_seed(0)
    w, statistics = torch.randn(40, 32), known(32)
    structure = LearnedStructure(32, 40, 16, 4)
    wanted = project(w, structure, statistics=statistics)
    none = replace(statistics, gradients=torch.zeros(32, 32, dtype=torch.float64))
    found = project(w, structure, statistics=none)
    assert torch.equal(found.z, wanted.z)
    assert torch.equal(found.sketch, wanted.sketch)


def test_a_shared_sketch_serves_the_layer_that_counts():
    torch.manual_seed(0)
    k = 32
    q, v = (torch.randn(24, k, dtype=torch.float64) for _ in range(2))
    statistics = known(k)
    h = statistics.second_moment
    gradients = [q.T @ q, 1e-3 * v.T @ v]
    shared = {
        name: fit_sketch([q, v], statistics, 3, centred=False, group_size=k, gradients=given)
        for name, given in (("alike", None), ("weighed", gradients))
    }
    errors = {}
    for name, sketch in shared.items():
        for which, w in (("q", q), ("v", v)):
            structure = sketch.structure(w)
            found = project(w, structure, statistics=statistics, sketch=sketch.blocks)
            errors[name, which] = lost(w, materialize(found), h, torch.eye(24).double())
    assert errors["weighed", "q"] < 0.8 * errors["alike", "q"]
    assert errors["weighed", "v"] > errors["alike", "v"]


class Parts(nn.Module):
    """Four layers of which the output shows one eighth of the last one's features."""

    def __init__(self):
        super().__init__()
        self.q, self.v, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.out(torch.tanh(self.q(x)) * self.v(x))[..., :8]


@pytest.mark.parametrize("sequential", [False, True])
def test_compressed_models_come_closer_to_the_dense_one(sequential):
    torch.manual_seed(0)
    dense = Parts().eval()
    mix = torch.randn(64, 64) / 8
    data = [torch.randn(200, 64) @ mix for _ in range(4)]
    x = torch.randn(500, 64) @ mix
    errors = {}
    for weigh in (True, False):
        model = Parts().eval()
        model.load_state_dict(dense.state_dict())
        report = compress(model, reduction=2, calibration=data, sequential=sequential,
                          weigh_outputs=weigh, progress=False, warn_error=2.0)  # fmt: skip
        assert len(report.compressed) == 3
        assert model.q.sketch is model.v.sketch
        errors[weigh] = (model(x) - dense(x)).norm().item()
    assert errors[True] < 0.9 * errors[False]


def test_without_reduction_it_is_exact():
    torch.manual_seed(0)
    model = Parts().eval()
    x = torch.randn(64, 64)
    wanted = model(x)
    report = compress(model, reduction=1, calibration=[x], projection="learned", progress=False)
    assert all(row.exact for row in report)
    torch.testing.assert_close(model(x), wanted)
