"""The exact multiple-choice knapsack against enumeration."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.errors import ConfigError
from ss1_compile.planning.knapsack import choose

numbers = st.one_of(st.integers(0, 4).map(float), st.floats(0, 3))
items = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), max_size=5)


@settings(max_examples=40, deadline=None)
@given(items, st.floats(0, 6))
def test_it_finds_the_least_loss(rows, spare):
    losses = [[loss for loss, _ in row] for row in rows]
    costs = [[cost for _, cost in row] for row in rows]
    budget = math.fsum(map(min, costs)) + spare
    picked = choose(losses, costs, budget)
    assert len(picked) == len(rows)

    def total(table, choices):
        return math.fsum(row[i] for row, i in zip(table, choices, strict=True))

    assert total(costs, picked) <= budget * (1 + 1e-8)
    every = itertools.product(*(range(len(row)) for row in rows))
    best = min(total(losses, one) for one in every if total(costs, one) <= budget)
    assert total(losses, picked) <= best + 1e-8


def test_costs_of_all_magnitudes():
    tiny = 2.2250738585072014e-308
    assert choose([[0.0, 0.0], [0.0, 2.0]], [[0.0, tiny], [1.0, 0.0]], 0.0)[1] == 1
    assert choose([[0.0, 1.0], [0.0, 2.0]], [[1e9, 1e-9], [1.0, 0.0]], 1.5) == [1, 0]


def test_hundreds_of_items_with_a_generous_and_a_tight_budget():
    rows = [[(1 - 1 / c) ** 2 * (1 + i % 7) for c in (1, 2, 4)] for i in range(200)]
    costs = [[(1 + i % 3) / c for c in (1, 2, 4)] for i in range(200)]
    whole = sum(row[0] for row in costs)
    assert choose(rows, costs, whole) == [0] * 200
    assert choose(rows, costs, whole / 4) == [2] * 200
    picked = choose(rows, costs, whole / 2)
    spent = sum(row[i] for row, i in zip(costs, picked, strict=True))
    assert 0.49 * whole < spent <= whole / 2 * (1 + 1e-8)
    lost = sum(row[i] for row, i in zip(rows, picked, strict=True))
    assert lost < sum(row[1] for row in rows)  # less than uniform c = 2 of equal cost


def test_a_budget_under_the_cheapest_choices_is_refused():
    with pytest.raises(ConfigError, match=r"budget 0\.5 is below 1\.2"):
        choose([[0.0, 1.0]], [[2.0, 1.2]], 0.5)
