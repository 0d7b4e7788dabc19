"""What is done with statistics: combined, bound to weights, saved and loaded."""

import copy
import gc
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from statistics_support import Attention, assert_moments
from torch import nn

from ss1_compile.calibration.statistics import (
    InputStatistics,
    Statistics,
    calibrate,
    statistics_of,
)
from ss1_compile.errors import CalibrationError
from ss1_compile.projection.project import project
from ss1_compile.structure import SS1Structure


def test_combine_is_the_statistics_of_both():
    model, x = nn.Linear(5, 2), torch.randn(30, 5)
    parts = [calibrate(model, [part])["weight"] for part in (x[:11], x[11:])]
    assert_moments(parts[0].combine(parts[1]), x)
    with pytest.raises(CalibrationError, match="5 and 2 features"):
        parts[0].combine(InputStatistics(1, torch.zeros(2).double(), torch.eye(2).double()))


def test_registry_follows_the_weight_object():
    model = nn.Linear(6, 4)
    found = calibrate(model, [torch.randn(9, 6)])["weight"]
    with torch.no_grad():
        model.weight.mul_(2)
    assert statistics_of(model.weight) is found
    assert statistics_of(model.bias) is None
    twin = copy.deepcopy(model)
    assert statistics_of(twin.weight) is None
    alive = weakref.ref(found)
    del found
    gc.collect()
    assert alive() is not None
    model.weight = nn.Parameter(torch.randn(4, 6))
    gc.collect()
    assert alive() is None
    assert statistics_of(model.weight) is None


def test_save_load_bind(tmp_path):
    model = Attention()
    found = calibrate(model, [torch.randn(2, 3, 12) for _ in range(3)])
    found.save(tmp_path / "statistics.safetensors")
    loaded = Statistics.load(tmp_path / "statistics.safetensors")
    assert list(loaded) == list(found)
    assert loaded.unreached == found.unreached
    assert loaded["query.weight"] is loaded["value.weight"]
    for name, entry in found.items():
        assert loaded[name].count == entry.count
        assert torch.equal(loaded[name].mean, entry.mean)
        assert torch.equal(loaded[name].second_moment, entry.second_moment)
    twin = copy.deepcopy(model)
    loaded.bind(twin)
    assert statistics_of(twin.output.weight) is loaded["output.weight"]
    structure = SS1Structure.create(12, 12, 2)
    pair = [
        project(
            m.output.weight, structure, m.output.bias, statistics=statistics_of(m.output.weight)
        )
        for m in (model, twin)
    ]
    assert torch.equal(pair[0].z, pair[1].z)


def test_bind_names_what_does_not_fit():
    found = calibrate(Attention(), [torch.randn(2, 3, 12)])
    wide = Attention(16)
    del wide.output
    with pytest.raises(CalibrationError, match=r"output\.weight; misfits: query\.weight \(w"):
        found.bind(wide)
    assert statistics_of(wide.query.weight) is None


def test_tampered_files_are_refused(tmp_path):
    path = tmp_path / "statistics.safetensors"
    calibrate(Attention(), [torch.randn(2, 3, 12)]).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["header"])
    moment = tensors["0.second_moment"]
    skewed = moment.clone()
    skewed[0, 1] += 1
    cases = [
        ({"0.mean": tensors["0.mean"][:5].clone()}, {}, "query.*mean \\[5\\]"),
        ({"0.mean": tensors["0.mean"].float()}, {}, "query.*float64"),
        ({"0.second_moment": moment * float("nan")}, {}, "query.*second_moment is not finite"),
        ({"0.second_moment": skewed}, {}, "query.*not symmetric"),
        ({"1.mean": None}, {}, "output.*entry is missing"),
        ({}, {"counts": [0, 6]}, "query.*count is 0"),
        ({}, {"counts": ["6", 6]}, "query.*count is '6'"),
        ({}, {"counts": [6]}, "output.*entry is missing"),
        ({}, {"entries": {"query.weight": -1}}, "damaged header"),
        ({}, {"entries": ["query.weight"]}, "damaged header"),
        ({}, {"entries": {"query.weight": 7}}, "query.*entry is missing"),
    ]
    for changes, header_changes, words in cases:
        changed = {k: v for k, v in (tensors | changes).items() if v is not None}
        text = json.dumps(header | header_changes)
        save_file(changed, path, metadata | {"header": text})
        with pytest.raises(CalibrationError, match=words):
            Statistics.load(path)
    for other in (None, {"format": "pt"}, metadata | {"version": "2"}):
        save_file(tensors, path, other)
        with pytest.raises(CalibrationError, match="not 'ss1-statistics' version '1'"):
            Statistics.load(path)
    save_file(tensors, path, metadata | {"header": "{"})
    with pytest.raises(CalibrationError, match="damaged header"):
        Statistics.load(path)
    save_file(tensors, path, metadata)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match="cannot be read"):
        Statistics.load(path)
    with pytest.raises(FileNotFoundError, match="no statistics"):
        Statistics.load(tmp_path / "absent")
