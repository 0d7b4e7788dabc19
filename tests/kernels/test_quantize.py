import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.errors import QuantizationError
from ss1_compile.kernels.quantize import (
    Q_MAX,
    dequantize,
    quantize_activations,
    quantize_rows,
    row_scale,
)

FLOAT8 = torch.float8_e4m3fn
both_dtypes = pytest.mark.parametrize("dtype", [torch.int8, FLOAT8])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 6), st.integers(1, 4), st.integers(1, 20), st.integers(-20, 20))
def test_int8_is_within_half_a_step_of_every_value(rows, groups, size, exponent):
    z = torch.randn(rows, groups * size, dtype=torch.float64) * 10.0**exponent
    q, scale = quantize_rows(z, groups)
    assert q.dtype == torch.int8
    assert scale.shape == (rows, groups)
    step = scale.double().repeat_interleave(size, 1)
    assert ((q * step - z).abs() <= step * (0.5 + 1e-5)).all()
    # float32 products, rounded once
    torch.testing.assert_close(dequantize(q, scale, torch.float64), q * step, rtol=1e-7, atol=0)
    if rows:
        largest = q.view(rows, groups, size).abs().amax(-1)
        assert (largest == 127).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 40))
def test_float8_keeps_four_significant_bits(rows, size):
    z = torch.randn(rows, size)
    q, scale = quantize_rows(z, dtype=FLOAT8)
    error = (dequantize(q, scale) - z).abs()
    assert (error <= (z.abs() / 16).clamp(min=scale * 2**-10) * (1 + 1e-5)).all()
    assert (q.float().abs().amax(1) == 448).all()


@both_dtypes
def test_rows_of_zeros_and_of_tiny_values_have_scale_one(dtype):
    z = torch.zeros(3, 8)
    z[1] = 1e-40
    z[2, 4] = 1e-30
    q, scale = quantize_rows(z, dtype=dtype)
    assert scale[:2].flatten().tolist() == [1.0, 1.0]
    assert (q[:2].float() == 0).all()
    assert q[2].float().abs().max() == Q_MAX[dtype]


@both_dtypes
def test_saturation_is_symmetric(dtype):
    z = torch.tensor([[-3.0, 3.0, 0.0, 1.5]])
    q, _ = quantize_rows(z, dtype=dtype)
    assert q.float().tolist()[0][:2] == [-Q_MAX[dtype], Q_MAX[dtype]]


def test_ties_go_to_even():
    z = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_rows(z)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@both_dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_and_activations_marked(dtype, value):
    z = torch.randn(3, 8)
    z[1, 5] = value
    with pytest.raises(QuantizationError, match=r"encoder.0: z\[1, 5\] is (nan|-?inf)"):
        quantize_rows(z, dtype=dtype, name="encoder.0")
    q, scale = quantize_activations(z, dtype)
    assert scale.isnan().tolist() == [False, True, False]
    assert (q[1].float() == 0).all()
    clean, clean_scale = quantize_activations(z[::2], dtype)
    assert torch.equal(q[::2].float(), clean.float())
    assert torch.equal(scale[::2], clean_scale)


def test_values_beyond_float32_are_refused():
    with pytest.raises(QuantizationError, match="leaves the range of float32"):
        quantize_rows(torch.full((1, 2), 1e300, dtype=torch.float64))


def test_scales_of_the_extremes():
    amax = torch.tensor([0.0, 127.0, 3e38, float("inf"), float("nan")])
    scale = row_scale(amax, torch.int8)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert torch.isfinite(scale[2])
    assert scale[3:].isnan().all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.randn(2, 6), 4), "4 groups do not divide K_c = 6"),
        ((torch.randn(2, 6), 0), "0 groups"),
        ((torch.randn(2, 6), 1, torch.int16), "cannot quantise to torch.int16"),
        ((torch.randn(6),), r"must be floating \[N, K_c\]"),
        ((torch.ones(2, 6, dtype=torch.int32),), "got torch.int32"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(QuantizationError, match=message):
        quantize_rows(*args)
