"""The paper's statements on variance (SS1, NeurIPS 2024, section on quantisation), by simulation.

A signed sketch of n values to m = n / c slots estimates inner products without bias, and the
variance over random permutations is ``(c-1)/(n-1) · Σ_{i≠j} (x_i² y_j² + x_i y_i x_j y_j)``.
With b bits, w = 2 / 2^b: ``V_q ≤ w²/2 + n w⁴/16`` for unit vectors rounded at random.
"""

import pytest
import torch

N = 128
TRIALS = 20000


def sketched_products(x, y, c, trials):
    """``⟨sketch x, sketch y⟩`` for random permutations and signs, ``[trials]``."""
    order = torch.rand(trials, N).argsort(1)
    signs = torch.randint(0, 2, (trials, N)).double() * 2 - 1
    parts = [(v[order] * signs).view(trials, N // c, c).sum(2) for v in (x, y)]
    return (parts[0] * parts[1]).sum(1)


def rounded(x, step, trials):
    """x on a grid of ``step``, up or down at random without bias, ``[trials, N]``."""
    return torch.floor(x / step + torch.rand(trials, N, dtype=torch.float64)) * step


def unit():
    """A random unit vector."""
    x = torch.rand(N, dtype=torch.float64) * 2 - 1
    return x / x.norm()


@pytest.mark.parametrize("c", [2, 4, 8])
def test_a_signed_sketch_is_unbiased_with_the_stated_variance(c):
    x, y = torch.randn(2, N, dtype=torch.float64)
    products = sketched_products(x, y, c, TRIALS)
    both = x * y
    cross = (x**2).sum() * (y**2).sum() - (both**2).sum() + both.sum() ** 2 - (both**2).sum()
    variance = (c - 1) / (N - 1) * cross
    assert abs(products.mean() - both.sum()) < 5 * (variance / TRIALS).sqrt()
    assert products.var() == pytest.approx(variance.item(), rel=0.06)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_quantisation_stays_below_its_bound(bits):
    x, y, w = unit(), unit(), 2 / 2**bits
    products = (rounded(x, w, TRIALS) * rounded(y, w, TRIALS)).sum(1)
    assert abs(products.mean() - x @ y) < 5 * products.std() / TRIALS**0.5
    assert products.var() <= (w**2 / 2 + N * w**4 / 16) * 1.05


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("c", [2, 4])
def test_both_together_stay_below_the_bound_of_both(bits, c):
    """``V_pq ≤ Q(b)·(1 + (n-1)/m) + P(m)`` with ``P(m) = k/m``, ``k ≥ 1 + ⟨x, y⟩²``, m = n / c."""
    x, y, w, m = unit(), unit(), 2 / 2**bits, N // c
    k = 1.5
    assert 1 + (x @ y) ** 2 < k  # independent vectors: 8 standard deviations away
    order = torch.rand(TRIALS, N).argsort(1)
    signs = torch.randint(0, 2, (TRIALS, N)).double() * 2 - 1
    qx, qy = rounded(x, w, TRIALS), rounded(y, w, TRIALS)
    parts = [(q.gather(1, order) * signs).view(TRIALS, m, c).sum(2) for q in (qx, qy)]
    products = (parts[0] * parts[1]).sum(1)
    pruned = sketched_products(x, y, c, TRIALS)
    assert pruned.var() <= k / m
    quantised = w**2 / 2 + N * w**4 / 16
    assert abs(products.mean() - x @ y) < 5 * products.std() / TRIALS**0.5
    assert products.var() <= quantised * (1 + (N - 1) / m) + k / m
