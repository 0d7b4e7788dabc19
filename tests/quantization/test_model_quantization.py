import copy

import pytest
import torch
from torch import nn

import ss1_compile
from ss1_compile.errors import CalibrationError, ConfigError, QuantizationError

METHODS = ["int8_weight_only", "int8_dynamic", "fp8_dynamic"]


def net(**options):
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 40, bias=False))
    options = {"reduction": 2, "progress": False, "warn_error": 2} | options
    ss1_compile.compress(model, **options)
    return model.eval()


def batches():
    mixing = torch.randn(6, 48)
    return [torch.randn(64, 6) @ mixing + 0.1 * torch.randn(64, 48) for _ in range(5)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("projection", [None, "learned"])
def test_is_what_compress_does_with_the_same_options(method, projection):
    dense = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 40, bias=False)).eval()
    options = {"reduction": 2, "projection": projection, "progress": False, "warn_error": 2}
    model, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    ss1_compile.compress(model, **options)
    ss1_compile.compress(expected, quantization=method, **options)
    report = ss1_compile.quantize(model, quantization=method)
    assert all(
        torch.equal(a.float(), b.float())
        for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    assert [(row.name, row.quantization, row.error) for row in report] == [
        ("0", method, None),
        ("2", method, None),
    ]
    assert all(row.bytes_after < row.bytes_before for row in report)
    x = torch.randn(5, 48)
    assert torch.equal(model(x), expected(x))


def test_calibrated_rounding_moves_the_outputs_less():
    model, data = net(reduction=3), batches()
    x = torch.cat(data)
    errors = {}
    for rounding in ("nearest", "calibrated"):
        made = copy.deepcopy(model)
        report = ss1_compile.quantize(
            made, quantization="int8_weight_only", rounding=rounding, calibration=data
        )
        with torch.no_grad():
            y, inputs = model[0](x), model[:2](x)
            first = (made[0](x) - y).norm() / (y - y.mean(0)).norm()
            second = (made[2](inputs) - model[2](inputs)).norm() / model[2](inputs).norm()
        assert report["0"].quantization_error == pytest.approx(first.item(), rel=0.02)
        assert report["2"].quantization_error == pytest.approx(second.item(), rel=0.02)
        errors[rounding] = first
    assert errors["calibrated"] < 0.9 * errors["nearest"]


def test_shared_layers_stay_shared_and_chosen_layers_only():
    model = net()
    model.append(nn.Linear(40, 48))
    model.append(model[0])
    report = ss1_compile.quantize(
        model, quantization="int8_dynamic", overrides={"2": {"quantization": None}}
    )
    assert [row.name for row in report] == ["0"]
    assert model[4] is model[0]
    assert model[0].quantization == "int8_dynamic"
    assert model[2].quantization is None
    assert isinstance(model[3], nn.Linear)
    report = ss1_compile.quantize(model, quantization="int8_weight_only", exclude=["9"])
    assert [row.name for row in report] == ["2"]  # the other one is quantised already


def test_what_cannot_be_done_is_said_and_changes_nothing():
    for match, error, options in (
        ("needs a quantization", ConfigError, {}),
        ("has no SS1 layer", ConfigError, {"quantization": "int8_dynamic", "exclude": ["*"]}),
        (
            "0: quantization_group_size = 7",
            QuantizationError,
            {"quantization": "int8_weight_only", "quantization_group_size": 7},
        ),
        (
            "0: rounding='calibrated' needs",
            CalibrationError,
            {"quantization": "int8_dynamic", "rounding": "calibrated"},
        ),
        (
            "calibration data is empty",
            CalibrationError,
            {"quantization": "int8_dynamic", "calibration": []},
        ),
    ):
        model = net()
        layers = list(model)
        with pytest.raises(error, match=match):
            ss1_compile.quantize(model, **options)
        assert all(a is b for a, b in zip(model, layers, strict=True))
        assert not model[0]._forward_pre_hooks
    with pytest.raises(ConfigError, match="has no SS1 layer"):
        ss1_compile.quantize(nn.Sequential(nn.Linear(4, 4)), quantization="int8_dynamic")


def test_training_goes_on_around_quantised_layers():
    model = net()
    ss1_compile.quantize(model, quantization="int8_dynamic")
    assert [name for name, _ in model.named_parameters()] == ["0.bias"]
    model(torch.randn(4, 48)).square().sum().backward()
    assert model[0].bias.grad is not None
