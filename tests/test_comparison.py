"""``compare`` against signal-to-noise ratios worked out by hand."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from ss1_compile import CalibrationError, ConfigError, SS1Linear, compare, compress

D = 64


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))


def compressed(model, **options):
    other = copy.deepcopy(model)
    compress(other, warn_error=2.0, progress=False, **options)
    return other


def decibels(signal, other):
    return 10 * math.log10((signal.square().sum() / (signal - other).square().sum()).item())


def test_by_hand():
    dense = make()
    small = compressed(dense, reduction=2)
    batches = [torch.randn(5, D), torch.randn(3, D)]
    x = torch.cat(batches)
    with torch.no_grad():
        a, b = dense[0](x), small[0](x)
        c, d, own = dense(x), small(x), small[2](dense[:2](x))
    first, last = compare(dense, small, batches)
    assert (first.name, last.name) == ("0", "2")
    assert first.own_sqnr == pytest.approx(decibels(a, b), rel=1e-4)
    assert first.sqnr == pytest.approx(first.own_sqnr)
    assert last.sqnr == pytest.approx(decibels(c, d), rel=1e-4)
    assert last.own_sqnr == pytest.approx(decibels(c, own), rel=1e-4)
    cosine = nn.functional.cosine_similarity(c.flatten(), d.flatten(), 0).item()
    assert last.cosine == pytest.approx(cosine, rel=1e-4)


def test_worst_layer_is_named_first():
    dense = make()
    small = compressed(dense, overrides={"0": 1, "2": 8})
    comparison = compare(dense, small, [torch.randn(9, D)])
    assert comparison.worst(1)[0].name == "2"
    assert comparison.layers[0].own_sqnr > 80  # c = 1 loses nothing but rounding
    assert "worst by themselves: 2" in str(comparison)
    assert json.loads(comparison.to_json())[1]["name"] == "2"


def test_a_layer_called_several_times_and_no_hooks_left():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x):
            return self.layer(self.layer(x))

    dense = Shared().train()
    small = compressed(dense, reduction=2)
    (row,) = compare(dense, small, [torch.randn(4, D)])
    assert row.sqnr < row.own_sqnr
    assert dense.training
    assert not dense.layer._forward_hooks
    assert isinstance(small.layer, SS1Linear)


def test_bad_input():
    dense = make()
    with pytest.raises(ConfigError, match="no SS1 layers"):
        compare(dense, dense, [torch.randn(1, D)])
    with pytest.raises(ConfigError, match="called '0'"):
        compare(nn.Linear(D, D), compressed(dense), [torch.randn(1, D)])
    with pytest.raises(CalibrationError, match="no batches"):
        compare(dense, compressed(dense), [])
