"""The C++ int8 kernels of the CPU against exact integers, float64 and the portable ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.kernels import native, quantized_native, quantized_portable, reference
from ss1_compile.kernels.quantize import dequantize, quantize_activations, quantize_rows
from ss1_compile.structure import SS1Structure


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if quantized_native._library() is None:
        pytest.skip("no C++ compiler")


@st.composite
def layers(draw):
    """``(structure, rows)``; few rows and many, columns around the width of a tile."""
    reduction = draw(st.integers(1, 5))
    block_k = draw(st.sampled_from([8, 16, 32]))
    structure = SS1Structure.create(
        draw(st.integers(reduction, 3 * reduction * block_k)),
        draw(st.integers(1, 150)),
        reduction,
        num_hashes=draw(st.integers(1, 5)),
        block_k=block_k,
        seed=draw(st.integers(0, 1000)),
    )
    return structure, draw(st.integers(0, 23))


def padded(tensor):
    """The same values with rows apart and something else between them."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 3), 77, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def relative(actual, expected):
    return (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(deadline=None, max_examples=25)
@given(layers())
def test_sketch_is_bit_for_bit_the_composed_one(dtype, case):
    structure, rows = case
    x = padded(torch.randn(rows, structure.in_features).to(dtype))
    reduced = structure.reduced_features
    sketched = native.sketch(x.float(), structure.code, reduced)
    expected = quantize_activations(sketched, torch.int8)
    for stored in (torch.int8, torch.int16):
        q, scale = quantized_native._sketch(x, structure.code, reduced, stored)
        assert q.dtype == stored
        assert torch.equal(q.to(torch.int8), expected[0])
        assert torch.equal(scale, expected[1])


@settings(deadline=None, max_examples=60)
@given(layers(), st.booleans())
def test_dynamic_is_the_exact_product(case, bias):
    structure, rows = case
    x = torch.randn(rows, structure.in_features)
    reduced, columns = structure.reduced_features, structure.out_features
    z, scale = quantize_rows(torch.randn(columns, reduced))
    b = torch.randn(columns) if bias else None
    y = quantized_native.linear(x, structure.code, padded(z), scale, b, True)
    q, q_scale = quantized_native.sketch(x, structure.code, reduced, torch.int8)
    expected = reference.quantized_product(q, q_scale, z, scale)
    # three roundings of the product and one of the sum, which may cancel
    allowed = 3e-7 * (expected.abs() + (0 if b is None else b.double().abs()))
    expected = expected if b is None else expected + b.double()
    assert ((y.double() - expected).abs() <= allowed).all()


@settings(deadline=None, max_examples=60)
@given(layers(), st.booleans(), st.sampled_from([1, 2, 8]))
def test_weight_only_is_the_layer_with_dequantised_z(case, bias, groups):
    structure, rows = case
    x = torch.randn(rows, structure.in_features)
    columns, reduced = structure.out_features, structure.reduced_features
    z, scale = quantize_rows(torch.randn(columns, reduced), groups)
    b = torch.randn(columns) if bias else None
    y = quantized_native.linear(x, structure.code, padded(z), scale, b, False)
    expected = reference.linear_weight_only(x, structure.code, z, scale, b)
    w = structure.materialize(dequantize(z, scale, torch.float64))
    allowed = x.double().abs() @ w.abs().t() + (0 if b is None else b.double().abs())
    assert ((y.double() - expected).abs() <= 2e-6 * allowed).all()


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 12, 13, 29])
@pytest.mark.parametrize("reduced", [1, 7, 64, 1033])
def test_saturated_products_are_exact(rows, reduced):
    """Every pair is ±127 · 127, and odd widths have half a pair."""
    q = torch.full((2, rows, reduced), 127, dtype=torch.int16)
    q[1] *= -1
    z = torch.full((70, reduced), 127, dtype=torch.int8)
    z[3] = -127
    kernel = quantized_native._kernel("product_int8")
    y, ones = torch.empty(rows, 70), torch.ones(70)
    q_scale = torch.ones(2, rows)
    pointers = (q.data_ptr(), q_scale.data_ptr(), z.data_ptr(), reduced, ones.data_ptr(), None)
    kernel(*pointers, y.data_ptr(), 2, rows, reduced, 70, 1)
    exact = torch.cat([q[j].long() @ z[j * 35 : (j + 1) * 35].long().t() for j in range(2)], 1)
    assert torch.equal(y, exact.float())


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_the_float32_result(dtype, dynamic):
    structure = SS1Structure.create(200, 60, 3)
    x = torch.randn(3, 200).to(dtype)
    z, scale = quantize_rows(torch.randn(60, structure.reduced_features))
    bias = torch.randn(60).to(dtype)
    y = quantized_native.linear(x, structure.code, z, scale, bias, dynamic)
    assert y.dtype == dtype
    other = quantized_portable.linear(x, structure.code, z, scale, bias, dynamic)
    assert relative(y, other.double()) < (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("rows", [3, 40])
def test_threads_make_no_difference(rows, dynamic, monkeypatch):
    structure = SS1Structure.create(256, 300, 2)
    x = torch.randn(rows, 256)
    z, scale = quantize_rows(torch.randn(300, structure.reduced_features))
    args = (x, structure.code, z, scale, None, dynamic)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = quantized_native.linear(*args)
        torch.set_num_threads(3)
        monkeypatch.setattr(quantized_native, "_PRODUCTS_PER_THREAD", 1)
        three = quantized_native.linear(*args)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(three, one, rtol=0 if dynamic else 1e-6, atol=0 if dynamic else 1e-6)


@pytest.mark.parametrize("dynamic", [True, False])
def test_without_a_compiler_the_portable_kernels_run(dynamic, monkeypatch):
    structure = SS1Structure.create(96, 40, 3)
    x = torch.randn(5, 96)
    z, scale = quantize_rows(torch.randn(40, structure.reduced_features))
    args = (x, structure.code, z, scale, None, dynamic)
    expected = quantized_native.linear(*args)
    monkeypatch.setattr(quantized_native, "_kernel", lambda name: None)
    torch.testing.assert_close(quantized_native.linear(*args), expected, rtol=1e-5, atol=1e-5)
