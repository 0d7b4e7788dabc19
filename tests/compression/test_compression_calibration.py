"""``compress`` with calibration data: better, once for every door, and gone afterwards."""

import copy

import pytest
import torch
from compression_support import D, batches, make_model, poison, quiet, relative
from torch import nn

import ss1_compile
from ss1_compile import (
    ProjectionError,
    SS1Linear,
    compress,
)
from ss1_compile.calibration.statistics import statistics_of


def test_calibrated_beats_average_and_sequential_does_not_lose():
    x = torch.cat(batches(6)[4:])
    dense = make_model()
    error = {}
    for label, options in {
        "average": {"projection": "average"},
        "calibrated": {"calibration": batches()},
        "sequential": {"calibration": batches(), "sequential": True},
    }.items():
        model = make_model()
        report = quiet(model, reduction=2, **options)
        error[label] = relative(model(x), dense(x))
        assert report.compressed[0].error_of == ("weight" if label == "average" else "output")
        assert all(isinstance(m, SS1Linear) for m in (model[0].q, model[1].down))
    assert error["calibrated"] < 0.9 * error["average"]
    assert error["sequential"] < 1.05 * error["calibrated"]


def test_sequential_reaches_experts_that_only_later_batches_use():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

        def forward(self, x, expert):
            return self.experts[expert](x)

    model = Experts()
    data = [(x, i // 2) for i, x in enumerate(batches())]
    report = quiet(model, projection="calibrated", calibration=data, sequential=True)
    assert len(report.compressed) == 2


def test_sequential_statistics_do_not_outlive_it_on_weights_that_stay_dense():
    model = make_model()
    quiet(model, calibration=batches(), sequential=True, max_error=1e-9, allow_empty=True)
    assert all(statistics_of(p) is None for p in model.parameters())
    with pytest.raises(ProjectionError):
        quiet(poison(model), calibration=[torch.randn(8, D)], sequential=True)
    assert all(statistics_of(p) is None for p in model.parameters())


def test_statistics_are_collected_once_and_used_by_every_door():
    model, x = make_model(), torch.randn(5, D)
    statistics = ss1_compile.calibrate(model, batches(), progress=False)
    with torch.no_grad():
        torch._dynamo.reset()
        options = {"inner_backend": "eager", "warn_error": 2.0, "projection": "calibrated"}
        fast = torch.compile(model, backend="ss1", options=options)(x)
        report = quiet(model, projection="calibrated")
        assert {row.projection for row in report.compressed} == {"calibrated"}
        assert relative(fast, model(x)) < 1e-5
    other = make_model()
    assert quiet(other, calibration=statistics)["0.up"].projection == "learned"


def test_the_projection_left_open_is_learned_where_there_are_statistics():
    def projections(**options):
        return {row.projection for row in quiet(make_model(), **options).compressed}

    assert projections() == {"average"}
    assert projections(calibration=batches()) == {"learned"}
    assert projections(calibration=batches(), sequential=True) == {"learned"}
    for options in ({"block_k": 8}, {"num_hashes": 2}, {"signed": False}):
        assert projections(calibration=batches(), **options) == {"calibrated"}
    model, x = make_model(), torch.randn(5, D)
    ss1_compile.calibrate(model, batches(), progress=False)
    report = ss1_compile.Report()
    with torch.no_grad():
        torch._dynamo.reset()
        options = {"inner_backend": "eager", "warn_error": 2.0, "report": report}
        torch.compile(model, backend="ss1", options=options)(x)
    assert {row.projection for row in report.compressed} == {"learned"}


def test_a_layer_the_data_never_reach_stays_dense_if_calibration_is_asked_for():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            return self.used(x)

    for sequential in (False, True):
        model = nn.Sequential(Half())
        report = quiet(model, projection="calibrated", calibration=batches(), sequential=sequential)
        assert isinstance(model[0].used, SS1Linear)
        assert "never reached" in report["0.unused"].reason


def test_weights_that_have_the_structure_are_recovered_exactly():
    model, x = make_model(), torch.randn(5, D)
    quiet(model, reduction=4, seed=5)
    structures = {n: m.structure for n, m in model.named_modules() if isinstance(m, SS1Linear)}
    expected = model(x)
    dense = copy.deepcopy(model)
    for name in structures:
        dense.set_submodule(name, model.get_submodule(name).to_linear())
    report = compress(dense, structures=structures, progress=False)  # no warning: nothing is lost
    assert all(row.exact for row in report.compressed)
    assert relative(dense(x), expected) < 1e-5
