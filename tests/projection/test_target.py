"""The output that is wanted of drifted inputs, and the choices made on held-out rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile import ConfigError, LearnedStructure, SS1Structure, project
from ss1_compile.calibration.input_statistics import Drift, InputStatistics
from ss1_compile.projection.target import Target

K, N = 24, 20


def statistics(x, x_dense=None, held_out=None):
    found = InputStatistics(len(x), x.mean(0), x.T @ x / len(x))
    if x_dense is not None:
        d = x_dense - x
        found.drift = Drift(d.mean(0), d.T @ d / len(x), d.T @ x / len(x))
    found.held_out = held_out
    return found


def problem(seed=0, rows=400, noise=0.3):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x_dense = draw(rows, K) @ draw(K, K) / K**0.5 + 0.5
    x = x_dense @ (torch.eye(K) + 0.1 * draw(K, K)) + noise * draw(rows, K) + 0.2
    return draw(N, K), draw(N), x, x_dense


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.booleans())
def test_quadratic_forms_are_those_of_the_data(seed, centred):
    w, _, x, x_dense = problem(seed)
    torch.manual_seed(seed)
    e, step = torch.randn_like(w), torch.randn_like(w)
    target = Target.of(statistics(x, x_dense), centred, w.device)

    def mean_square(y):
        return ((y - y.mean(0) if centred else y).square().sum(1)).mean()

    def lost(e):
        return mean_square(x_dense @ w.T - x @ (w - e).T)

    torch.testing.assert_close(target.lost(w, e), lost(e))
    torch.testing.assert_close(target.whole(w), mean_square(x_dense @ w.T))
    slope, curvature = target.along(w, e, step)
    torch.testing.assert_close(lost(e - 0.7 * step), lost(e) - 0.7 * slope + 0.49 * curvature)
    torch.testing.assert_close(target.shift(w, e), (x_dense @ w.T - x @ (w - e).T).mean(0))


def test_the_correction_is_the_least_squares_solution():
    w, _, x, x_dense = problem()
    correction = Target.of(statistics(x, x_dense), False, w.device).correction(0.0, "w")
    best = torch.linalg.lstsq(x, x_dense @ w.T).solution.T
    torch.testing.assert_close(w + w @ correction, best)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["rotation", "learned"])
def test_the_reported_error_is_that_of_the_dense_outputs(kind, biased):
    w, b, x, x_dense = problem(1)
    structure = (
        SS1Structure.create(K, N, 2) if kind == "rotation" else LearnedStructure(K, N, 12, 5)
    )
    known = statistics(x, x_dense)
    found, plain = (
        project(w, structure, b if biased else None, statistics=known, asymmetry=a)
        for a in (1.0, 0.0)
    )

    def error(made):
        y = x_dense @ w.T + (b if biased else 0)
        out = x @ structure.materialize(made.z, made.sketch).T + (made.bias if biased else 0)
        if biased:
            torch.testing.assert_close(out.mean(0), y.mean(0))
        whole = y - y.mean(0) if biased else y
        return ((out - y).square().sum() / whole.square().sum()).sqrt().item()

    assert found.error == pytest.approx(error(found), rel=1e-9)
    assert plain.error == pytest.approx(error(plain), rel=1e-9)
    assert found.error < plain.error
    assert (found.asymmetry, plain.asymmetry) == (1.0, 0.0)


def test_asymmetry_is_chosen_by_the_error_on_held_out_rows():
    w, _, x, x_dense = problem(2, rows=60, noise=0.6)  # few rows: the drift is not well known
    fitted, apart = slice(0, 40), slice(40, 60)
    unseen = statistics(x[apart], x_dense[apart])
    whole = statistics(x[fitted], x_dense[fitted]).combine(unseen)
    whole.held_out = unseen
    structure = SS1Structure.create(K, N, 2)
    chosen = project(w, structure, statistics=whole).asymmetry

    def held_out_error(asymmetry):
        made = project(
            w, structure, statistics=statistics(x[fitted], x_dense[fitted]), asymmetry=asymmetry
        )
        out = x[apart] @ structure.materialize(made.z, made.sketch).T
        return (out - x_dense[apart] @ w.T).square().sum().item()

    steps = [i / 20 for i in range(21)]
    best = min(steps, key=held_out_error)
    assert 0 < best < 1
    assert abs(chosen - best) <= 0.05
    assert project(w, structure, statistics=statistics(x, x_dense)).asymmetry == 0.5
    assert project(w, structure, statistics=statistics(x)).asymmetry == 0.0


def test_damping_is_chosen_by_the_error_on_held_out_rows():
    w, _, x, _ = problem(3, rows=4000)
    few, many = statistics(x[:30]), statistics(x[:3000])
    for known, wanted in ((few, 1e-2), (many, 1e-3)):
        known.held_out = None
        joined = known.combine(statistics(x[3000:]))
        joined.held_out = statistics(x[3000:])
        damping = project(
            w, SS1Structure.create(K, N, 2), statistics=joined, damping="auto"
        ).damping
        assert damping >= wanted if known is few else damping <= wanted
    alone = project(w, SS1Structure.create(K, N, 2), statistics=statistics(x), damping="auto")
    assert alone.damping == 1e-3


def test_rows_that_do_not_belong_together_are_no_drift():
    w, _, x, x_dense = problem()
    shuffled = statistics(x, x_dense.roll(1, 0))
    assert Target.of(shuffled, True, w.device).drift is None
    assert Target.of(statistics(x, x_dense), True, w.device).drift is not None


@pytest.mark.parametrize("options", [{"asymmetry": -1}, {"asymmetry": 2}, {"damping": "some"}])
def test_bad_options(options):
    w, _, x, _ = problem()
    with pytest.raises(ConfigError, match=next(iter(options))):
        project(w, SS1Structure.create(K, N, 2), statistics=statistics(x), **options)


def test_combining_and_parting_statistics():
    _, _, x, x_dense = problem(4)
    a, b = statistics(x[:100], x_dense[:100]), statistics(x[100:], x_dense[100:])
    both, whole = a.combine(b), statistics(x, x_dense)
    both.held_out = b
    rest = both.without_held_out()
    for found, wanted in ((both, whole), (rest, a)):
        assert found.count == wanted.count
        for name in ("mean", "second_moment"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
            torch.testing.assert_close(getattr(found.drift, name), getattr(wanted.drift, name))
        torch.testing.assert_close(found.drift.cross_moment, wanted.drift.cross_moment)
    assert math.isclose(whole.without_held_out().count, len(x))
