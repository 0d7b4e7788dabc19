"""Layers that stay dense behind a compressed prefix."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ss1_compile import SS1Config, SS1Linear, compress

D = 32


class Residual(nn.Module):
    """Two layers that are compressed, and two behind them that are kept, one of them a Conv1D."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.wide, self.out = nn.Linear(D, 2 * D, bias=False), Conv1D(D, 2 * D)
        self.last = nn.Linear(D, D)

    def forward(self, x):
        x = x + self.down(torch.tanh(self.up(x)))
        x = x + self.out(torch.relu(self.wide(x)))
        return self.last(x)


def problem():
    torch.manual_seed(0)
    model = Residual().eval()
    mix = torch.randn(D, D) / D**0.5
    return model, [torch.randn(100, D) @ mix for _ in range(12)]


KEPT = {"wide": None, "out": {"reduction": None}}


def compressed(model, data, **options):
    made = copy.deepcopy(model)
    config = SS1Config(reduction=4, exclude=("last",), overrides=KEPT, warn_error=9.0, **options)
    return made, compress(made, config, data[:8], sequential=True, progress=False)


@pytest.mark.parametrize("projection", ["learned", "calibrated"])
def test_they_make_up_for_a_part_of_the_error(projection):
    model, data = problem()
    lost = {}
    for refit in (False, True):
        made, report = compressed(model, data, projection=projection, refit_dense=refit)
        with torch.no_grad():
            lost[refit] = sum((made(x) - model(x)).square().mean() for x in data[8:])
        assert isinstance(made.down, SS1Linear)
        assert not isinstance(made.out, SS1Linear)
        for name in ("wide", "out"):
            same = torch.equal(made.get_submodule(name).weight, model.get_submodule(name).weight)
            assert same is not refit
            assert report[name].reason.endswith("refitted") is refit
        assert torch.equal(made.last.weight, model.last.weight)
        assert torch.equal(made.last.bias, model.last.bias)
    assert lost[True] < 0.9 * lost[False]


def test_the_refitted_weight_is_the_regression_of_what_is_wanted():
    model, data = problem()
    made, _ = compressed(model, data, asymmetry=1, damping=1e-9, refit_dense=True)
    with torch.no_grad():
        mine, its = (
            torch.cat([x + m.down(torch.tanh(m.up(x))) for x in data[:8]]).double()
            for m in (made, model)
        )
        wanted = torch.linalg.lstsq(mine, its @ model.wide.weight.T.double()).solution.T
    torch.testing.assert_close(made.wide.weight.double(), wanted, rtol=1e-3, atol=1e-4)


def test_a_dry_run_and_inputs_that_have_not_drifted_change_nothing():
    model, data = problem()
    options = {"overrides": {"last": 2, "*": None}, "refit_dense": True, "warn_error": 9.0}
    made = copy.deepcopy(model)
    compress(made, SS1Config(**options), data, sequential=True, progress=False)
    for name in ("up", "down", "wide", "out"):
        assert torch.equal(made.get_submodule(name).weight, model.get_submodule(name).weight)
    made, options = copy.deepcopy(model), {"overrides": KEPT, "refit_dense": True}
    compress(made, SS1Config(**options, warn_error=9.0), data, sequential=True, dry_run=True,
             progress=False)  # fmt: skip
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, False),
        ({"overrides": {"a.*": None}}, True),
        ({"overrides": {"a.*": {"reduction": None}}}, True),
        ({"overrides": {"a.*": 2}}, False),
        ({"overrides": {"a.*": {"quantization": "int8_dynamic"}}}, False),
        ({"overrides": {"a.*": None}, "exclude": ("*.b",)}, False),
        ({"overrides": {"a.*": None}, "include": ("c",)}, False),
    ],
)
def test_only_layers_that_overrides_keep_are_refitted(options, wanted):
    assert SS1Config(refit_dense=True, **options).refits("a.b") is wanted
    assert not SS1Config(**options).refits("a.b")
