"""What ``compress`` leaves dense, and the reasons that it gives."""

import copy
import warnings

import pytest
import torch
from compression_support import D, make_model, quiet
from torch import nn

from ss1_compile import (
    SS1Linear,
    UnhandledLinearError,
)


class Custom(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def with_hook():
    layer = nn.Linear(D, D)
    layer.register_forward_hook(lambda *_: None)
    return layer


def hooked_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(D, D))


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(D, D)
        self.head = nn.Linear(D, D, bias=False)
        self.head.weight = self.embedding.weight


LEFT = {
    "subclass": (lambda: Custom(D, D), "overrides forward"),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D)),
        "parametrised",
    ),
    "old weight norm": (hooked_weight_norm, "parametrised"),
    "hook": (with_hook, "hooks"),
    "tied": (TiedHead, "tied to 0.embedding.weight"),
    "attention subclass": (lambda: Attention(D, 4), "reads its weight directly"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_with_a_reason(name):
    make, reason = LEFT[name]
    model = nn.Sequential(make(), nn.Linear(D, D))
    report = quiet(model)
    assert isinstance(model[1], SS1Linear)
    assert report.left
    assert all(reason in row.reason for row in report.left)
    with pytest.raises(UnhandledLinearError, match="strict"):
        quiet(nn.Sequential(make(), nn.Linear(D, D)), strict=True)


class Adapted(nn.Module):
    """What the libraries of low-rank adapters put in the place of a linear layer."""

    def __init__(self, base, rank):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


def test_the_layer_inside_an_adapter_is_compressed_and_the_adapter_is_named():
    model = nn.Sequential(Adapted(nn.Linear(D, D), 4), nn.Linear(D, D))
    x, dense = torch.randn(3, D), copy.deepcopy(model)
    report = quiet(model, reduction=1)
    assert {row.name for row in report.compressed} == {"0.base_layer", "1"}
    reasons = {row.name: row.reason for row in report.left}
    assert reasons.keys() == {"0.lora_A", "0.lora_B"}
    assert all("smaller than min_features" in reason for reason in reasons.values())
    torch.testing.assert_close(model(x), dense(x))


def test_what_the_config_leaves_dense_is_no_strict_error():
    report = quiet(make_model(), strict=True, exclude=("0.*",), overrides={"1.up": None})
    assert report["0.q"].reason == "excluded by '0.*'"
    assert report["1.up"].reason == "kept dense by overrides['1.up']"


class Bare(nn.Module):
    """Weights outside linear modules, next to parameters that are none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, D, 2 * D))
        self.weight = nn.Parameter(torch.randn(D, D))
        self.positions = nn.Parameter(torch.randn(1, 9, D))
        self.table = nn.Parameter(torch.randn(D, 8))
        self.point, self.real = nn.Conv1d(D, D, 1), nn.Conv1d(D, D, 3)
        self.norm, self.embed = nn.LayerNorm((2, D)), nn.Embedding(40, D)
        self.lstm = nn.LSTM(D, D)
        self.attention = nn.MultiheadAttention(D, 4)
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return self.linear(x @ self.weight)


def test_weights_outside_linear_modules_have_a_row_with_a_reason():
    report = quiet(nn.Sequential(Bare()), exclude=["0.point"])
    parts = {f"0.attention.{name}_proj" for name in ("q", "k", "v", "out")}
    assert {row.name for row in report.compressed} == {"0.linear", *parts}
    reasons = {row.name: row.reason for row in report.left}
    assert "outside any linear module" in reasons.pop("0")
    assert "outside any linear module" in reasons.pop("0.experts")
    assert "min_features" in reasons.pop("0.table")
    assert "excluded" in reasons.pop("0.point")
    assert "LSTM" in reasons.pop("0.lstm.weight_ih_l0")
    assert "LSTM" in reasons.pop("0.lstm.weight_hh_l0")
    assert not reasons


def test_strict_refuses_a_weight_outside_linear_modules_until_it_is_excluded():
    names = ["0", "0.experts", "0.point", "0.lstm.*"]
    model = nn.Sequential(Bare())
    with pytest.raises(UnhandledLinearError, match=r"0\.experts: Bare holds it"):
        quiet(model, strict=True, exclude=["0", "0.point", "0.lstm.*"])
    assert quiet(model, strict=True, exclude=names).compressed
