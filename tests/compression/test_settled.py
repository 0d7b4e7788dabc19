import copy

import pytest
import torch
from torch import nn

import ss1_compile
from ss1_compile import Report


def small_model():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()


def run_through_backend(model, **options):
    report = Report()
    compiled = torch.compile(
        model, backend="ss1", options={"inner_backend": "eager", "report": report, **options}
    )
    with torch.no_grad():
        y = compiled(torch.ones(3, 64))
    return y, {row.name: row for row in report}


@pytest.fixture
def compressed():
    model = small_model()
    ss1_compile.compress(model, reduction=2, exclude=("2",), warn_error=10.0)
    return model


def test_what_compress_left_dense_the_backend_leaves_dense(compressed):
    with torch.no_grad():
        expected = compressed(torch.ones(3, 64))
    y, rows = run_through_backend(compressed)
    torch.testing.assert_close(y, expected)
    assert rows["2"].reason.startswith("dense since the model was compressed")


def test_a_deep_copy_is_known_by_its_layers(compressed):
    _, rows = run_through_backend(copy.deepcopy(compressed))
    assert rows["2"].reason is not None


def test_a_part_without_compressed_layers_is_known(compressed):
    _, rows = run_through_backend(nn.Sequential(nn.Linear(64, 96).eval(), compressed[2]))
    assert rows["1"].reason is not None


def test_options_compress_the_rest(compressed):
    _, rows = run_through_backend(compressed, reduction=1)
    assert rows["2"].reason is None
    assert rows["2"].reduction == 1


def test_a_loaded_model_is_settled(compressed, tmp_path):
    ss1_compile.save(compressed, tmp_path / "model")
    loaded = ss1_compile.load(small_model(), tmp_path / "model")
    _, rows = run_through_backend(nn.Sequential(nn.Linear(64, 96).eval(), loaded[2]))
    assert rows["1"].reason is not None


def test_another_model_is_compressed_by_default():
    _, rows = run_through_backend(small_model(), warn_error=10.0)
    assert all(row.reason is None for row in rows.values())
