from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.calibration.statistics import InputStatistics
from ss1_compile.errors import ProjectionError
from ss1_compile.kernels import reference
from ss1_compile.learned import LearnedStructure
from ss1_compile.projection.project import project


def statistics(k: int, *, rows: int = 400, seed: int = 0, mean: float = 0.3) -> InputStatistics:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64) / k**0.5
    x = torch.randn(rows, k, generator=generator, dtype=torch.float64) @ mix + mean
    return InputStatistics(rows, x.mean(0), x.T @ x / rows)


def output_error(w, w_hat, h):
    e = w - w_hat
    return ((e @ h * e).sum() / (w @ h * w).sum()).sqrt().item()


def alternating_least_squares(w, h, size, rank, sweeps):
    """The plain alternation, in the naive way and with dense matrices: the fit must beat it."""
    k = w.shape[1]
    groups = k // size
    s = torch.zeros(k, groups * rank, dtype=torch.float64)
    for g in range(groups):
        f = slice(g * size, (g + 1) * size)
        e, v = torch.linalg.eigh(h[f, f])
        root = v * e.sqrt() @ v.T
        _, u = torch.linalg.eigh(root @ w[:, f].T @ w[:, f] @ root)
        s[f, g * rank : (g + 1) * rank] = torch.linalg.solve(root, u[:, -rank:])
    for sweep in range(sweeps):
        z = torch.linalg.solve(s.T @ h @ s, (w @ h @ s).T).T
        if sweep == sweeps - 1:
            break
        residual = w - z @ s.T
        for g in range(groups):
            f, q = slice(g * size, (g + 1) * size), slice(g * rank, (g + 1) * rank)
            residual[:, f] += z[:, q] @ s[f, q].T
            left = torch.linalg.solve(z[:, q].T @ z[:, q], z[:, q].T @ residual @ h[:, f])
            s[f, q] = torch.linalg.solve(h[f, f], left.T)
            residual[:, f] -= z[:, q] @ s[f, q].T
    return z @ s.T


@pytest.mark.parametrize(("n", "k", "size", "rank"), [(48, 64, 16, 5), (20, 96, 32, 8)])
def test_it_beats_alternating_least_squares(n, k, size, rank):
    torch.manual_seed(n)
    w = torch.randn(n, k, dtype=torch.float64)
    stats = statistics(k)
    structure = LearnedStructure(k, n, size, rank)
    fitted = project(w, structure, statistics=stats, damping=1e-6)
    h = stats.second_moment
    ours = output_error(w, reference.materialize(fitted.sketch, fitted.z, k), h)
    assert fitted.error == pytest.approx(ours, rel=1e-6)
    assert fitted.error_of == "output"
    assert fitted.method == "learned"
    assert ours < output_error(w, alternating_least_squares(w, h, size, rank, 6), h)


def test_one_group_is_the_activation_aware_svd():
    # With gsize = K the problem is the best rank-r W for the norm of H: W H^½ truncated.
    torch.manual_seed(0)
    n, k, rank = 30, 40, 6
    w, stats = torch.randn(n, k, dtype=torch.float64), statistics(k)
    fitted = project(w, LearnedStructure(k, n, k, rank), statistics=stats, damping=0.0)
    factor = torch.linalg.cholesky(stats.second_moment)
    u, s, v = torch.linalg.svd(w @ factor, full_matrices=False)
    best = torch.linalg.solve(factor.T, ((u[:, :rank] * s[:rank]) @ v[:rank]).T).T
    torch.testing.assert_close(
        reference.materialize(fitted.sketch, fitted.z, k), best, rtol=1e-6, atol=1e-8
    )


def test_without_statistics_each_group_is_truncated_by_itself():
    torch.manual_seed(1)
    w = torch.randn(24, 36, dtype=torch.float64)
    fitted = project(w, LearnedStructure(36, 24, 12, 4))
    expected = []
    for block in w.split(12, dim=1):
        u, s, v = torch.linalg.svd(block, full_matrices=False)
        expected.append((u[:, :4] * s[:4]) @ v[:4])
    torch.testing.assert_close(
        reference.materialize(fitted.sketch, fitted.z, 36), torch.cat(expected, 1)
    )
    assert fitted.error_of == "weight"


@settings(deadline=None, max_examples=15)
@given(
    k=st.integers(4, 50),
    n=st.integers(8, 40),
    group=st.integers(2, 50),
    rank=st.integers(1, 6),
    hashes=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    calibrated=st.booleans(),
)
def test_a_weight_that_has_the_structure_is_recovered(k, n, group, rank, hashes, seed, calibrated):
    group = min(group, k)
    hashes = -(-n // (-(-n // hashes)))
    structure = LearnedStructure(k, n, group, min(rank, group), hashes)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, structure.reduced_features, generator=generator, dtype=torch.float64)
    sketch = torch.randn(structure.sketch_shape, generator=generator, dtype=torch.float64)
    w = structure.materialize(z, sketch)
    fitted = project(w, structure, statistics=statistics(k, seed=seed) if calibrated else None)
    assert fitted.error < 1e-5
    torch.testing.assert_close(
        structure.materialize(fitted.z, fitted.sketch), w, rtol=1e-4, atol=1e-4
    )


def test_the_bias_absorbs_the_mean_error():
    torch.manual_seed(2)
    w, b = torch.randn(16, 24), torch.randn(16)
    stats = statistics(24, mean=2.0)
    structure = LearnedStructure(24, 16, 8, 2)
    fitted = project(w, structure, b, statistics=stats)
    w_hat = reference.materialize(fitted.sketch, fitted.z, 24)
    before = w.double() @ stats.mean + b.double()
    assert fitted.bias is not None
    after = w_hat @ stats.mean + fitted.bias.double()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_z_is_solved_for_the_rounded_blocks(dtype):
    torch.manual_seed(3)
    w = torch.randn(32, 64)
    stats = statistics(64)
    exact = project(w.double(), LearnedStructure(64, 32, 16, 6), statistics=stats).error
    fitted = project(w.to(dtype), LearnedStructure(64, 32, 16, 6), statistics=stats)
    assert fitted.z.dtype == fitted.sketch.dtype == dtype
    assert fitted.error < exact * 1.01


def test_degenerate_inputs():
    torch.manual_seed(4)
    w = torch.randn(16, 24)
    structure = LearnedStructure(24, 16, 8, 2)
    still = InputStatistics(5, torch.ones(24).double(), torch.ones(24, 24).double())
    constant = project(w, structure, torch.zeros(16), statistics=still)  # covariance 0
    assert constant.z.isfinite().all()
    assert project(torch.zeros(16, 24), structure, statistics=statistics(24)).error == 0
    thin = statistics(24, rows=3)
    assert project(w, structure, statistics=thin).error < 1e-1
    with pytest.raises(ProjectionError, match="damping"):
        project(w, structure, statistics=thin, damping=0.0)
