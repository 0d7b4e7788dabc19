from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quality_baselines as baselines


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mix = torch.randn(64, 64, dtype=torch.float64) / 8
    x = torch.randn(500, 64, dtype=torch.float64) @ mix
    return torch.randn(48, 64, dtype=torch.float64), baselines.damped(x.T @ x / 500)


@pytest.mark.parametrize("name", baselines.METHODS)
def test_every_method_approximates_and_more_parameters_help(name, problem):
    w, h = problem
    errors = [
        baselines.output_error(w, baselines.METHODS[name](w, h, c), h) for c in (1.2, 2.0, 4.0)
    ]
    assert errors == sorted(errors)
    assert errors[-1] < 1


def test_the_svds_are_the_best_of_their_rank(problem):
    w, h = problem
    rank = int(48 * 64 / (2 * (48 + 64)))
    plain, aware = baselines.svd(w, h, 2), baselines.aware_svd(w, h, 2)
    assert torch.linalg.matrix_rank(plain) == torch.linalg.matrix_rank(aware) == rank
    tail = torch.linalg.svdvals(w)[rank:]
    torch.testing.assert_close((w - plain).square().sum(), tail.square().sum())
    tail = torch.linalg.svdvals(w @ torch.linalg.cholesky(h))[rank:]
    lost = baselines.output_energy(w - aware, h)
    assert lost == pytest.approx(tail.square().sum().item())
    assert lost < baselines.output_energy(w - plain, h)


def test_the_weighed_svd_is_the_best_of_its_rank_for_the_weighed_error(problem):
    w, h = problem
    rank = int(48 * 64 / (2 * (48 + 64)))
    root = torch.logspace(0, -2, 48, dtype=torch.float64).diag()  # Γ^½
    approximation = baselines.weighed_svd(w, h, rank, root @ w)
    assert torch.linalg.matrix_rank(approximation) == rank
    tail = torch.linalg.svdvals(root @ w @ torch.linalg.cholesky(h))[rank:]
    lost = baselines.output_energy(root @ (w - approximation), h)
    assert lost == pytest.approx(tail.square().sum().item())
    assert lost < baselines.output_energy(root @ (w - baselines.aware_svd(w, h, 2)), h)
    alike = baselines.weighed_svd(w, h, rank, w)
    torch.testing.assert_close(alike, baselines.aware_svd(w, h, 2))


def test_monarch_recovers_a_monarch_matrix(problem):
    # 4 blocks, tiles of rank 1: outputs dealt out with stride 4
    h = problem[1]
    torch.manual_seed(1)
    tiles = torch.randn(4, 12, 4, 1, dtype=torch.float64) * torch.randn(4, 1, 4, 16).double()
    w = tiles.transpose(0, 1).reshape(48, 64)
    c = 48 * 64 / (4 * (48 + 64))
    assert baselines.output_error(w, baselines.monarch(w, h, c), h) < 1e-6


def test_magnitude_keeps_the_largest(problem):
    w, h = problem
    kept = baselines.magnitude(w, h, 4)
    mask = kept != 0
    assert mask.sum() == w.numel() // 4
    assert torch.equal(kept[mask], w[mask])
    assert w[~mask].abs().max() <= w[mask].abs().min()
