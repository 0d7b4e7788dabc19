"""What a weight makes up for in the stream that its outputs are added to."""

import pytest
import torch

from ss1_compile import LearnedStructure, SS1Structure, project
from ss1_compile.calibration.input_statistics import Drift, InputStatistics, Shortfall

K, N, ROWS = 24, 16, 4000


def draw(seed, foreseen=1.0):
    """Inputs, the dense model's, and a shortfall that x tells a part of."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    fixed = torch.Generator().manual_seed(99)
    mix, cause = (torch.randn(K, n, dtype=torch.float64, generator=fixed) / 5 for n in (K, N))
    x = randn(ROWS, K) @ mix + 0.3
    return x, x + 0.2 * randn(ROWS, K), foreseen * x @ cause + 0.3 * randn(ROWS, N) + 0.5


def statistics(x, dense, s):
    d, count = dense - x, len(x)
    return InputStatistics(
        count,
        x.mean(0),
        x.T @ x / count,
        Drift(d.mean(0), d.T @ d / count, d.T @ x / count),
        shortfall=Shortfall(s.mean(0), s.T @ x / count),
    )


def both(rows, apart):
    """The statistics of all of them, the second ones held out."""
    whole = statistics(*(torch.cat(pair) for pair in zip(rows, apart, strict=True)))
    whole.held_out = statistics(*apart)
    return whole


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "structure",
    [LearnedStructure.create(K, N, 1.3, group_size=K), SS1Structure.create(K, N, 2, block_k=8)],
    ids=["learned", "rotation"],
)
def test_the_sum_comes_nearest_to_the_dense_one(structure, biased):
    whole, without = both(draw(1), draw(2)), both(draw(1), draw(2))
    without.shortfall = None
    torch.manual_seed(0)
    w, b = torch.randn(N, K, dtype=torch.float64) / 5, torch.randn(N, dtype=torch.float64)
    x, dense, s = draw(3)
    lost = []
    for known in (without, whole):
        found = project(w, structure, b if biased else None, statistics=known, asymmetry=1.0)
        y = x @ structure.materialize(found.z, found.sketch).T + (found.bias if biased else 0)
        lost.append((dense @ w.T + (b if biased else 0) + s - y).square().sum(1).mean())
    assert lost[1] < 0.8 * lost[0]


def test_without_a_structure_it_is_the_regression_of_what_is_wanted():
    x, dense, s = draw(1)
    torch.manual_seed(0)
    w = torch.randn(N, K, dtype=torch.float64)
    known = statistics(x, dense, s)
    structure = LearnedStructure(K, N, K, K)
    found = project(w, structure, statistics=known, asymmetry=1.0, damping=1e-12)
    wanted = torch.linalg.lstsq(x, dense @ w.T + s).solution.T
    made = structure.materialize(found.z, found.sketch)
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-6)


def test_a_shortfall_that_held_out_rows_contradict_is_left_alone():
    known, plain = (both(draw(1), draw(2, foreseen=-3.0)) for _ in range(2))
    plain.shortfall = None
    torch.manual_seed(0)
    w = torch.randn(N, K, dtype=torch.float64)
    structure = LearnedStructure.create(K, N, 2, group_size=K)
    z = [project(w, structure, statistics=each, asymmetry=1.0).z for each in (known, plain)]
    assert torch.equal(*z)
