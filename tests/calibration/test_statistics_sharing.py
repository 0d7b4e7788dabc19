"""Weights with the same input share one accumulation, which never shows in the result."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_support import Attention, assert_moments
from torch import Tensor, nn

from ss1_compile.calibration import moments as moments_module
from ss1_compile.calibration.moments import SharedMoments, input_key
from ss1_compile.calibration.statistics import (
    InputStatistics,
    calibrate,
    execution_groups,
)
from ss1_compile.errors import CalibrationError


def test_weights_with_the_same_input_share_one_accumulation(monkeypatch):
    absorbed = []
    plain = moments_module.Moments.absorb
    monkeypatch.setattr(
        moments_module.Moments,
        "absorb",
        lambda self, rows, name, sign=1: absorbed.append(name) or plain(self, rows, name, sign),
    )
    model, batches = Attention(), [torch.randn(2, 3, 12) for _ in range(4)]
    found = calibrate(model, batches)
    assert found["query.weight"] is found["key.weight"] is found["value.weight"]
    assert found["output.weight"] is not found["query.weight"]
    assert absorbed == ["query.weight", "output.weight"] * 4
    rows = torch.cat([model.norm(x).detach().reshape(-1, 12) for x in batches])
    assert_moments(found["query.weight"], rows)


class Script(nn.Module):
    """Calls its weights as a program says: a list of (weight, input) or ("+", input) per batch."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.w = nn.ParameterList([torch.randn(2, 3, dtype=torch.float64) for _ in range(count)])

    def forward(self, program, inputs: list[Tensor]) -> None:
        for weight, which in program:
            if weight == "+":
                inputs[which].add_(1)
            else:
                F.linear(inputs[which], self.w[weight])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([0, 1, 2, "+"]), st.integers(0, 1)), max_size=7),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_sharing_never_changes_the_result(programs, repeat_first):
    if repeat_first:
        programs = [programs[0], *programs]
    programs = [[(0, 0), (1, 0), (2, 0)], *programs]
    model, rows = Script(3), [[], [], []]
    batches = []
    for program in programs:
        inputs = [torch.randn(2, 3, dtype=torch.float64) for _ in range(2)]
        batches.append((program, [x.clone() for x in inputs]))
        for weight, which in program:
            if weight == "+":
                inputs[which].add_(1)
            else:
                rows[weight].append(inputs[which].clone())
    try:
        found = calibrate(model, batches)
    except CalibrationError as error:
        assert "changed in place" in str(error)  # noqa: PT017 - allowed only where one was
        assert any(step[0] == "+" for program in programs for step in program)
        return
    for i, seen in enumerate(rows):
        assert_moments_close(found[f"w.{i}"], torch.cat(seen))


def assert_moments_close(found: InputStatistics, rows: Tensor) -> None:
    assert found.count == len(rows)
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        found.second_moment, rows.t() @ rows / len(rows), rtol=1e-9, atol=1e-12
    )


def test_members_that_part_keep_what_they_saw():
    model = Script(3)
    x = [torch.randn(2, 3, dtype=torch.float64) for _ in range(4)]
    together, parted = [(0, 0), (1, 0), (2, 0)], [(0, 0), (1, 1)]
    batches = [(together, x[:2]), (parted, x[1:3]), (together, x[2:])]
    found = calibrate(model, batches)
    assert_moments(found["w.0"], torch.cat([x[0], x[1], x[2]]))
    assert_moments(found["w.1"], torch.cat([x[0], x[2], x[2]]))
    assert_moments(found["w.2"], torch.cat([x[0], x[2]]))


def test_reused_memory_is_not_the_same_input():
    shared = SharedMoments()
    shared.start(None)
    first = torch.randn(64, 3)
    key = input_key(first)
    shared.add("a", first)
    assert input_key(first) == key
    first.add_(1)
    assert input_key(first) != key
    del first
    for _ in range(20):  # the allocator hands the same address out again
        again = torch.randn(64, 3)
        assert input_key(again) != key
        del again
    with torch.inference_mode():
        assert input_key(torch.randn(2, 3)) is None


def test_inference_tensors_are_counted_apart():
    model = Script(2)
    with torch.inference_mode():
        x = torch.randn(4, 3, dtype=torch.float64)
    y = torch.randn(4, 3, dtype=torch.float64)
    program = [(0, 0), (1, 0)]
    found = calibrate(model, [(program, [y]), (program, [x]), (program, [y])])
    for name in ("w.0", "w.1"):
        assert_moments(found[name], torch.cat([y, x, y]))


def test_execution_groups_follow_the_data_and_not_the_definition():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.gate, self.up, self.unused = (nn.Linear(4, 4) for _ in range(4))
            self.parallel = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(self.gate(x) * self.up(x))
            return y + self.parallel(x) + self.last(y)

    model, x = Model(), torch.randn(2, 4)
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    assert execution_groups(model, x, names) == [
        ["gate.weight", "up.weight", "parallel.weight"],
        ["last.weight"],
    ]
    assert execution_groups(model, x, ["last.weight"]) == [["last.weight"]]
    groups = execution_groups(model, None, names, forward=lambda m, _: m.last(m.up(x)))
    assert groups == [["up.weight"], ["last.weight"]]
    with pytest.raises(CalibrationError, match=r"did you mean 'gate\.weight'"):
        execution_groups(model, x, ["gates.weight"])
