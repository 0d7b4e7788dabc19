"""The multiple-choice knapsack: one choice per item, least loss within a budget, exactly.

Dynamic programming over the items, keeping the states (cost, loss) that no other beats in both, and
of these only such that can still lead to less than the best solution known: the Lagrangian bound at
the multiplier of the linear relaxation rules the rest out (Kellerer, Pferschy, Pisinger: *Knapsack
Problems*, 2004, chapter 11). Few states survive, so a model's hundreds of layers take milliseconds.
SciPy's ``milp`` solves it too, but took minutes to prove the optimum of some 36-layer models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ss1_compile.errors import ConfigError

_SLACK = 1e-9
"""Part of the budget that rounding of the costs' sum may exceed it by."""


def choose(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """Pick one choice per item: ``min Σ loss`` subject to ``Σ cost ≤ budget``.

    Args:
        losses: of each item's choices, finite.
        costs: of the same shape.
        budget: in the unit of the costs.

    Returns:
        The index of the choice of each item.

    Raises:
        ConfigError: even the cheapest choices exceed the budget.
    """
    least = math.fsum(min(row) for row in costs)
    limit = budget + _SLACK * abs(budget)
    if least > limit:
        raise ConfigError(
            f"the budget {budget:.6g} is below {least:.6g}, which the cheapest choices need; allow "
            f"larger reductions (choices=...), or a larger budget"
        )
    items = [
        (torch.tensor(loss, dtype=torch.float64), torch.tensor(cost, dtype=torch.float64))
        for loss, cost in zip(losses, costs, strict=True)
    ]
    multiplier, best = _relax(items, limit)
    return _search(items, limit, multiplier, best)


def _relax(items: Sequence[tuple[Tensor, Tensor]], limit: float) -> tuple[float, float]:
    """The multiplier λ ≥ 0 with the greatest lower bound, and the loss of a feasible solution."""
    if not items:
        return 0.0, 0.0
    loss, cost = (pad_sequence(list(p), True, torch.inf) for p in zip(*items, strict=True))

    def at(multiplier: float) -> tuple[float, float]:
        """Loss and cost if every item takes the least ``loss + λ cost``, of equals the cheapest."""
        value = (loss + multiplier * cost).nan_to_num(nan=torch.inf, posinf=torch.inf)
        least = value.min(1, keepdim=True).values
        near = value <= least + 1e-12 * least.abs()
        index = torch.where(near, cost, torch.inf).argmin(1, keepdim=True)
        return float(loss.gather(1, index).sum()), float(cost.gather(1, index).sum())

    best, spent = at(0.0)
    if spent <= limit:
        return 0.0, best
    # The cheapest choices are a solution; a multiplier that is large enough leads to them, up to
    # differences in cost that are nothing beside the largest cost
    cheapest = torch.where(cost <= cost.min(1, keepdim=True).values, loss, torch.inf).min(1).values
    best = float(cheapest.sum())
    gaps = cost - cost.min(1, keepdim=True).values
    largest = gaps[gaps.isfinite()].max()
    gap = gaps[gaps > 1e-12 * largest].min()
    spread = torch.where(loss.isfinite(), loss, 0.0)
    high = 2 * float((spread.amax(1) - spread.amin(1)).max() / gap) + 1e-300
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        reached, spent = at(middle)
        if spent <= limit:
            best, high = min(best, reached), middle
        else:
            low = middle
    return high, best


def _search(
    items: Sequence[tuple[Tensor, Tensor]], limit: float, multiplier: float, best: float
) -> list[int]:
    """Backwards through the states of the dynamic program."""
    rest_value = [0.0]  # Σ min (loss + λ cost) and Σ min cost over the items still to come
    rest_cost = [0.0]
    for loss, cost in reversed(items):
        rest_value.append(rest_value[-1] + float((loss + multiplier * cost).min()))
        rest_cost.append(rest_cost[-1] + float(cost.min()))
    tolerance = 1e-9 * (abs(best) + multiplier * abs(limit))
    state_cost = torch.zeros(1, dtype=torch.float64)
    state_loss = torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[Tensor, Tensor]] = []
    for position, (loss, cost) in enumerate(items):
        left = len(items) - position - 1
        new_cost = (state_cost[:, None] + cost).flatten()
        new_loss = (state_loss[:, None] + loss).flatten()
        bound = new_loss + multiplier * (new_cost - limit) + rest_value[left]
        alive = (new_cost + rest_cost[left] <= limit) & (bound <= best + tolerance)
        index = alive.nonzero().flatten()
        # By cost, and of equal cost by loss: then a state lives if its loss is below all before it
        index = index[new_loss[index].argsort(stable=True)]
        index = index[new_cost[index].argsort(stable=True)]
        ordered = new_loss[index]
        before = torch.cat([ordered.new_full((1,), torch.inf), ordered.cummin(0).values[:-1]])
        index = index[ordered < before]
        trail.append((index // len(loss), index % len(loss)))
        state_cost, state_loss = new_cost[index], new_loss[index]
    at = int(state_loss.argmin()) if items else 0
    picked = []
    for parents, choices in reversed(trail):
        picked.append(int(choices[at]))
        at = int(parents[at])
    return picked[::-1]
