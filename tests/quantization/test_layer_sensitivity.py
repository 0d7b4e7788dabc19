import json
import math

import pytest
import torch
from torch import nn

import ss1_compile
from ss1_compile.errors import CalibrationError, ConfigError
from ss1_compile.kernels.quantize import dequantize, quantize_rows


def net():
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40, bias=False)).eval()


def batches(count=6):
    mixing = torch.randn(8, 64)
    return [torch.randn(32, 8) @ mixing + 0.1 * torch.randn(32, 64) for _ in range(count)]


def test_errors_are_those_of_the_layers_on_the_dense_inputs():
    model, data = net(), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"reduction": 2, "quantization": "int8_weight_only", "projection": "calibrated"}
    found = ss1_compile.sensitivity(model, data, **options)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert [layer.name for layer in found.layers] == ["0", "2"]
    x = torch.cat(data)
    inputs = {"0": x, "2": model[:2](x).detach()}
    for layer in found.layers:
        w = model.get_submodule(layer.name).weight.detach().double()
        y = inputs[layer.name].double() @ w.t()
        energy = (y - y.mean(0) if layer.name == "0" else y).norm()
        # rounding a row does not depend on the order and signs of its values
        rounded = dequantize(*quantize_rows(w.float()), torch.float64)
        error = inputs[layer.name].double() @ (rounded - w).t()
        if layer.name == "0":  # the bias absorbs the mean
            error = error - error.mean(0)
        assert layer.quantized == pytest.approx((error.norm() / energy).item(), rel=0.02)
        assert layer.quantized < 0.02 < layer.sketch
        assert layer.both == pytest.approx(math.hypot(layer.sketch, layer.quantized), rel=0.05)
        assert layer.shape == tuple(w.shape)
        assert (layer.reduction, layer.quantization) == (2, "int8_weight_only")
    twin, plain = net_like(model), {"reduction": 2, "projection": "calibrated", "warn_error": 2}
    report = ss1_compile.compress(twin, calibration=data, progress=False, **plain)
    assert found.layers[0].sketch == pytest.approx(report["0"].error, rel=1e-3)
    rows = json.loads(found.to_json())["layers"]
    assert [row["both"] for row in rows] == [layer.both for layer in found.layers]
    assert "96×64" in str(found)


def net_like(model):
    twin = net()
    twin.load_state_dict(model.state_dict())
    return twin


def test_dynamic_activations_add_to_the_error():
    model, data = net(), batches()
    options = {"reduction": 4, "projection": "calibrated"}
    weights = ss1_compile.sensitivity(model, data, quantization="int8_weight_only", **options)
    dynamic = ss1_compile.sensitivity(model, data, quantization="int8_dynamic", **options)
    for a, b in zip(weights.layers, dynamic.layers, strict=True):
        assert a.sketch == b.sketch
        assert b.quantized > a.quantized


def test_options_by_layer_and_attention():
    model = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, dropout=0.0).eval()
    data = [torch.randn(2, 5, 64) for _ in range(4)]
    found = ss1_compile.sensitivity(
        model,
        data,
        reduction=2,
        projection="calibrated",
        quantization="int8_dynamic",
        overrides={
            "linear1": {"quantization": None},
            "linear2": None,
            "*.v_proj": {"reduction": 4},
        },
    )
    by_name = {layer.name: layer.reduction for layer in found.layers}
    assert by_name == {
        "self_attn.q_proj": 2,
        "self_attn.k_proj": 2,
        "self_attn.v_proj": 4,
        "self_attn.out_proj": 2,
    }


def test_padding_is_not_counted():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 48)

        def forward(self, x, attention_mask):
            return self.layer(x)

    model = Masked().eval()
    x, mask = torch.randn(4, 6, 64), torch.ones(4, 6, dtype=torch.long)
    mask[:, 4:] = 0
    other = x.clone()
    other[:, 4:] = 100
    options = {"reduction": 2, "quantization": "int8_dynamic"}
    first, second = (
        ss1_compile.sensitivity(model, [{"x": data, "attention_mask": mask}], **options)
        for data in (x, other)
    )
    assert first == second


def test_what_cannot_be_measured_is_said():
    model, data = net(), batches(2)
    with pytest.raises(ConfigError, match="choose a quantization"):
        ss1_compile.sensitivity(model, data, reduction=2)
    statistics = ss1_compile.calibrate(model, data, progress=False)
    with pytest.raises(CalibrationError, match="no batches to measure on"):
        ss1_compile.sensitivity(model, statistics, reduction=2, quantization="int8_dynamic")
    with pytest.raises(CalibrationError, match="reach no layer"):
        ss1_compile.sensitivity(
            model, data, reduction=2, quantization="int8_dynamic", exclude=["*"]
        )
