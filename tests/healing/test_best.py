"""Healing that ends with the parameters of its best evaluation."""

import copy

import pytest
import torch
from test_healing import case, heal  # noqa: F401

import ss1_compile
from ss1_compile.errors import CheckpointError, ConfigError
from ss1_compile.healing.best import Best

pytest.importorskip("accelerate")


class Scored:
    """A metric that gives these figures, and keeps what the model was like."""

    def __init__(self, *figures):
        self.figures, self.models = list(figures), []

    def __call__(self, model):
        self.models.append(copy.deepcopy(model))
        return self.figures[len(self.models) - 1]


def same(model, other):
    return all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("more", "figures", "at"),
    [(True, (0.1, 0.5, 0.9, 0.9, 0.2), 2), (False, (0.9, 0.5, 0.1, 0.1, 0.3), 2),
     (True, (0.3, 0.2, 0.1, 0.0, -1.0), 0), (False, (5.0, 4.0, 3.0, 2.0, 1.0), 4)],
)  # fmt: skip
def test_the_best_evaluation_is_kept(case, more, figures, at):  # noqa: F811
    metric = Scored(*figures)
    model, result = heal(
        case, steps=8, evaluate_every=2, metric=metric, keep_best=True, more_is_better=more
    )
    assert result.steps == 8
    assert result.kept == 2 * at
    assert result.figures == (figures[0], figures[at])
    assert same(model, metric.models[at])
    assert sum(same(model, other) for other in metric.models) == 1
    assert f"kept: step {2 * at}" in str(result)


def test_without_it_the_last_parameters_stay(case):  # noqa: F811
    metric = Scored(0.9, 0.1)
    model, result = heal(case, steps=3, metric=metric)
    assert result.kept is None
    assert result.figures == (0.9, 0.1)
    assert same(model, metric.models[1])


def test_named_metrics_say_themselves_what_is_best(case):  # noqa: F811
    # far too great a rate, from which the cosine suffers at once
    model, result = heal(case, steps=6, evaluate_every=1, learning_rate=1.0, keep_best=True)
    cosines = [entry["metric"] for entry in result.curve if "metric" in entry]
    assert result.figures[1] == max(cosines)
    assert cosines[-1] < max(cosines)
    _, teacher, _, held_out = case
    outputs = [(model(batch), teacher(batch)) for batch in held_out]
    cosine = torch.cat([torch.cosine_similarity(a, b, -1) for a, b in outputs]).mean()
    assert float(cosine.detach()) == pytest.approx(max(cosines), abs=1e-5)


@pytest.mark.parametrize("best", [0, 1, 3])
def test_a_resumed_run_keeps_the_best_of_both_parts(case, tmp_path, best):  # noqa: F811
    figures = [0.5] * 5
    figures[best] = 0.9
    options = {"steps": 8, "evaluate_every": 2, "save_every": 4, "keep_best": True,
               "more_is_better": True}  # fmt: skip
    whole, _ = heal(case, metric=Scored(*figures), **options)

    class Interrupted(Exception):
        pass

    left = figures[:3]

    def interrupt(model):
        if not left:
            raise Interrupted
        return left.pop(0)

    with pytest.raises(Interrupted):
        heal(case, metric=interrupt, directory=tmp_path, **options)
    # the state is of step 4; the evaluations of steps 6 and 8 are to come
    resumed, result = heal(case, metric=Scored(*figures[3:]), directory=tmp_path, **options)
    assert result.kept == 2 * best
    assert same(resumed, whole)
    again, _ = heal(case, metric=Scored(), directory=tmp_path, **options)
    assert same(again, whole)
    with pytest.raises(CheckpointError, match="keep_best"):
        heal(case, metric=Scored(), directory=tmp_path, **{**options, "keep_best": False})


def test_bad_requests(case):  # noqa: F811
    model, teacher, batches, _ = case
    with pytest.raises(ConfigError, match="keep_best needs held_out"):
        ss1_compile.heal(copy.deepcopy(model), teacher, batches, keep_best=True)
    with pytest.raises(ConfigError, match="more_is_better=True or"):
        heal(case, metric=lambda m: 0.0, keep_best=True)
    with pytest.raises(ConfigError, match="keep_best must be True or False, got 1"):
        ss1_compile.HealConfig(keep_best=1)


def test_values_are_copies_in_the_host_s_memory():
    parameter = torch.nn.Parameter(torch.ones(3))
    best = Best(more_is_better=True)
    best.offer(1.0, 5, {"p": parameter})
    with torch.no_grad():
        parameter.zero_()
    best.offer(0.5, 6, {"p": parameter})
    best.offer(1.0, 7, {"p": parameter})
    best.put_back({"p": parameter})
    assert best.step == 5
    assert torch.equal(parameter, torch.ones(3))
