import copy

import pytest
import torch
from torch import nn

import ss1_compile
from ss1_compile import InputStatistics, SS1Config
from ss1_compile.config import LayerQuantization
from ss1_compile.errors import CalibrationError, QuantizationError
from ss1_compile.experts import project_experts
from ss1_compile.kernels import quantized_cuda
from ss1_compile.kernels.quantize import dequantize
from ss1_compile.quantization.projection import project_layer

METHODS = ["int8_weight_only", "int8_dynamic", "fp8_dynamic"]
every_method = pytest.mark.parametrize("method", METHODS)
both_kinds = pytest.mark.parametrize("kind", ["average", "learned"])


def structure_of(kind, k=45, n=26):
    """Several groups, so that slots are correlated."""
    learned = {"projection": "learned", "group_size": 16} if kind == "learned" else {}
    config = SS1Config(reduction=3, num_hashes=2, min_features=8, **learned)
    made = config.structure_for("w", k, n)
    assert not isinstance(made, str)
    return made


def inputs(k=45, rows=300):
    """Correlated, and not centred."""
    return torch.randn(rows, 8) @ torch.randn(8, k) + 0.2 * torch.randn(rows, k) + torch.randn(k)


def moments(x):
    x = x.double()
    return InputStatistics(len(x), x.mean(0), x.t() @ x / len(x))


def dense(structure, projection):
    """Ŵ in float64, quantised or not."""
    z = projection.z.double()
    if hasattr(projection, "scale"):
        z = dequantize(projection.z, projection.scale, torch.float64)
    sketch = projection.sketch.double() if structure.kind == "learned" else projection.sketch
    return structure.materialize(z, sketch)


@every_method
@both_kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_statistics", [True, False])
def test_error_is_what_rounding_adds_to_the_layer(method, kind, bias, with_statistics):
    structure = structure_of(kind)
    w, b = torch.randn(26, 45), torch.randn(26) if bias else None
    x = inputs()
    options = {"statistics": moments(x) if with_statistics else None}
    plain = project_experts(w, structure, b, **options)
    made = project_layer(w, structure, b, quantization=LayerQuantization(method), **options)
    assert made.z.dtype == LayerQuantization(method).dtype
    assert (made.error, made.method) == (plain.error, plain.method)
    before, after = dense(structure, plain), dense(structure, made)
    if with_statistics:
        y, shifted = x.double() @ before.t(), x.double() @ after.t()
        if bias:  # it absorbs the mean
            shifted += (made.bias - plain.bias).double()
            y = y - y.mean(0)
            shifted = shifted - (x.double() @ before.t()).mean(0)
        expected = (shifted - y).norm() / y.norm()
    else:
        expected = (after - before).norm() / before.norm()
        assert bias is False or torch.equal(made.bias, b)
    assert made.quantization_error == pytest.approx(expected.item(), rel=2e-3)
    assert 1e-4 < made.quantization_error < 0.1


@both_kinds
@pytest.mark.parametrize("method", ["int8_weight_only", "fp8_dynamic"])
def test_calibrated_rounding_adds_less_output_error(method, kind):
    structure = structure_of(kind, 96, 40)
    w, statistics = torch.randn(40, 96), moments(inputs(96))
    errors = [
        project_layer(
            w,
            structure,
            None,
            statistics=statistics,
            quantization=LayerQuantization(method, None, r),
        ).quantization_error
        for r in ("nearest", "calibrated")
    ]
    # measured: 0.25 … 0.36 for rotations, 0.59 … 0.83 for learned sketches, which decorrelate
    assert errors[1] < (0.6 if kind == "average" else 0.97) * errors[0]


def test_groups_cut_the_rows_of_z():
    structure = structure_of("average", 128, 16)
    w = torch.randn(16, 128) * torch.logspace(0, 2, 128)
    whole = project_layer(w, structure, quantization=LayerQuantization("int8_weight_only"))
    size = structure.reduced_features // 3
    spec = LayerQuantization("int8_weight_only", size)
    grouped = project_layer(w, structure, quantization=spec)
    assert grouped.scale.shape == (16, 3)
    assert whole.scale.shape == (16, 1)
    assert dense(structure, grouped).sub(w).norm() <= 1.01 * dense(structure, whole).sub(w).norm()


def test_float8_is_refused_on_old_gpus(monkeypatch):
    monkeypatch.setattr(quantized_cuda, "_capability", lambda device: (8, 0))
    w = torch.randn(26, 45)
    with pytest.raises(QuantizationError, match=r"layer.3: fp8_dynamic needs .* 8.9 or later"):
        project_layer(
            w,
            structure_of("average"),
            quantization=LayerQuantization("fp8_dynamic"),
            name="layer.3",
        )


def test_experts_are_refused():
    weight = torch.randn(3, 26, 45)
    spec = LayerQuantization("int8_dynamic")
    with pytest.raises(QuantizationError, match=r"moe.up: its 3 matrices .* overrides=\{'moe.up'"):
        project_layer(weight, structure_of("average"), quantization=spec, name="moe.up")


def net():
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40, bias=False))


def refused(match, model=None, error=QuantizationError, **options):
    model = model or net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        ss1_compile.compress(model, reduction=2, progress=False, warn_error=2, **options)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True)
    )


def test_what_cannot_be_quantised_is_named_and_nothing_changes():
    refused(
        "0: quantization_group_size = 7 does not divide K_c = 32",
        None,
        quantization="int8_weight_only",
        quantization_group_size=7,
    )
    refused("0: the weight is torch.float64", net().double(), quantization="int8_dynamic")
    refused(
        "2: rounding='calibrated' needs input statistics",
        None,
        CalibrationError,
        quantization="int8_dynamic",
        rounding="calibrated",
        overrides={"0": {"rounding": "nearest"}},
    )


def test_options_by_layer():
    model = net()
    report = ss1_compile.compress(
        model,
        reduction=2,
        quantization="int8_weight_only",
        quantization_group_size=16,
        overrides={"2": {"quantization": "int8_dynamic", "reduction": 4}},
        progress=False,
        warn_error=2,
    )
    assert [layer.quantization for layer in report] == ["int8_weight_only", "int8_dynamic"]
    assert [layer.reduction for layer in report] == [2, 4]
    assert [layer.bits for layer in report] == [8, 8]
    assert all(0 < layer.quantization_error < 0.02 for layer in report)
    assert model[0].scale.shape == (96, 2)
    # z, scales, bias, sketch [J, G, c] int32
    sketch = model[0].sketch.numel()
    assert report["0"].bytes_after == 96 * 32 + 4 * 96 * 2 + 4 * 96 + 4 * sketch
    assert "+ 0.0" in str(report)
    errors = [layer.quantization_error for layer in report]
    assert report.mean_quantization_error == pytest.approx(sum(errors) / 2)
    assert f"quantisation adds {report.mean_quantization_error:.3f}" in report.summary()
    assert "int8_dynamic" in str(report)
    plain = ss1_compile.compress(
        net(), reduction=2, overrides={"2": {"quantization": None}}, progress=False, warn_error=2
    )
    assert [(layer.quantization, layer.bits) for layer in plain] == [(None, 32)] * 2
