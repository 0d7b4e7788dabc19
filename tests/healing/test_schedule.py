"""Phases, lengths and rates, by steps and by the clock."""

import copy
import time

import pytest
import torch
from test_healing import Stack

import ss1_compile
from ss1_compile.errors import ConfigError
from ss1_compile.healing.schedule import is_over, rate, spent

pytest.importorskip("accelerate")


def test_the_rate_by_steps():
    config = ss1_compile.HealConfig(steps=100, block_steps=20)
    rates = [rate(config, step, 0.0) for step in range(120)]
    assert rates[0] == 1.0  # 5 % of 20 is one step
    assert rates[10] == pytest.approx(0.5, abs=0.1)
    assert rates[19] < 0.02
    assert rates[20:25] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[24:] == sorted(rates[24:], reverse=True)
    assert rates[-1] < 0.001
    assert [is_over(config, step, 1e9) for step in (0, 19, 119, 120)] == [False] * 3 + [True]


def test_the_rate_by_the_clock():
    config = ss1_compile.HealConfig(seconds=60, block_steps=20)
    assert rate(config, 20, 0.0) == pytest.approx(0.01)
    assert rate(config, 1000, 0.0) == 1.0
    assert rate(config, 1000, 30.0) == pytest.approx(0.5)
    assert rate(config, 1000, 61.0) == 0.0
    assert not is_over(config, 20, 100.0)  # one step at least
    assert not is_over(config, 10, 100.0)
    assert not is_over(config, 21, 59.9)
    assert is_over(config, 21, 60.0)


def test_blocks_are_not_counted():
    curve = [{"phase": "blocks", "seconds": 2.0}, {"phase": "blocks", "seconds": 5.0}]
    assert spent([], 4.0) == 4.0
    assert spent([*curve, {"phase": "model", "seconds": 6.0}], 9.0) == 4.0


@pytest.fixture
def case():
    torch.manual_seed(0)
    teacher = Stack()
    batches = [torch.randn(24, 32) for _ in range(4)]
    model = copy.deepcopy(teacher)
    ss1_compile.compress(
        model, calibration=batches, projection="learned", reduction=4, warn_error=10.0,
        weigh_outputs=False, progress=False,
    )  # fmt: skip
    return model, teacher, batches


@pytest.mark.parametrize("step", [0.25, 0.37, 0.61])
def test_it_trains_for_so_long_and_ends_with_an_evaluation(case, monkeypatch, step):
    model, teacher, batches = case
    now = 100.0

    def tick():
        nonlocal now
        now += step
        return now

    monkeypatch.setattr(time, "perf_counter", tick)
    result = ss1_compile.heal(
        model, teacher, batches, seconds=60.0, block_steps=3, held_out=batches, progress=False
    )
    assert 60 <= spent(result.curve, result.seconds) < 60 + 10 * step
    assert result.steps > 20
    assert result.curve[-1]["step"] == result.steps
    assert "metric" in result.curve[-1]
    start, end = result.figures
    assert end > start


def test_a_resumed_run_has_the_time_that_is_left(case, tmp_path, monkeypatch):
    model, teacher, batches = case
    now, failing = 0.0, True

    def tick():
        nonlocal now
        now += 0.5
        return now

    class Interrupted(Exception):
        pass

    def metric(model):
        if failing and now > 20:
            raise Interrupted
        return 0.0

    monkeypatch.setattr(time, "perf_counter", tick)
    options = {
        "seconds": 60.0, "save_every": 5, "evaluate_every": 5, "metric": metric,
        "directory": tmp_path, "progress": False,
    }  # fmt: skip
    with pytest.raises(Interrupted):
        ss1_compile.heal(copy.deepcopy(model), teacher, batches, **options)
    failing, now = False, 1000.0
    result = ss1_compile.heal(model, teacher, batches, **options)
    assert 60 <= result.seconds < 63
    seconds = [entry["seconds"] for entry in result.curve]
    assert seconds == sorted(seconds)
    again = ss1_compile.heal(model, teacher, batches, **options)
    assert again.steps == result.steps


def test_bad_times_are_refused():
    for bad in (0, -1.0, float("inf"), True, "60"):
        with pytest.raises(ConfigError, match="seconds"):
            ss1_compile.HealConfig(seconds=bad)
    ss1_compile.HealConfig(seconds=1, steps=0)
