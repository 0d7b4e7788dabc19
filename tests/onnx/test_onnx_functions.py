from dataclasses import replace

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx_support import layer_model, rotation, run_ort

from ss1_compile.kernels import reference
from ss1_compile.onnx.functions import MAX_UNROLLED, NARROW, Traits, function_body
from ss1_compile.onnx.operators import DOMAIN, OPERATORS, Operator
from ss1_compile.onnx.quantization import emulate, round_rows
from ss1_compile.onnx.runner import relative_error


@st.composite
def layers(draw):
    """``(kind, in_features, sketch, z, bias)`` with every kind of raggedness."""
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    n, num_hashes = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    num_hashes = -(-n // -(-n // num_hashes))
    bias = torch.randn(n, generator=generator) if draw(st.booleans()) else None
    if draw(st.booleans()):
        c, block_k = draw(st.integers(1, 5)), draw(st.sampled_from([8, 16, 32]))
        k = draw(st.integers(c, 200))
        structure = rotation(k, n, c, num_hashes, block_k, seed)
        z = torch.randn(n, structure.reduced_features, generator=generator)
        return "rotation", k, structure.code, z, bias
    groups, size, rank = (draw(st.integers(1, most)) for most in (4, 24, 9))
    k = draw(st.integers((groups - 1) * size + 1, groups * size))
    sketch = torch.randn(num_hashes, groups, size, rank, generator=generator)
    return "learned", k, sketch, torch.randn(n, groups * rank, generator=generator), bias


def traits_of(k, sketch, z, bias):
    num_hashes, groups, parts = sketch.shape[:3]
    block_k = z.shape[1] // groups
    size = parts if sketch.is_floating_point() else parts * block_k
    return Traits(
        num_hashes,
        k != groups * size,
        z.shape[0] % num_hashes != 0,
        narrow=num_hashes * block_k <= NARROW,
        biased=bias is not None,
    )


@settings(deadline=None, max_examples=40)
@given(layers(), st.booleans(), st.sampled_from([(1, 1), (2, 3), (5, 1)]), st.integers(18, 23))
def test_bodies_compute_the_definition(layer, general, rows, opset):
    kind, k, sketch, z, bias = layer
    x = torch.randn(*rows, k)
    traits = Traits() if general else traits_of(k, sketch, z, bias)
    model = layer_model(Operator(kind), sketch, z, bias, k, opset=opset, traits=traits)
    onnx.checker.check_model(model, full_check=True)
    assert relative_error(run_ort(model, x), reference.linear(x, sketch, z, bias)) < 1e-5


@settings(deadline=None, max_examples=40)
@given(layers(), st.booleans(), st.sampled_from(["int8_weight_only", "int8_dynamic"]))
def test_int8_bodies_compute_the_quantised_arithmetic(layer, general, quantization):
    kind, k, sketch, z, bias = layer
    x = torch.randn(2, 3, k)
    traits = Traits() if general else traits_of(k, sketch, z, bias)
    operator = Operator(kind, quantization)
    model = layer_model(operator, sketch, z, bias, k, traits=traits)
    expected = emulate(x, sketch, z, bias, 63, quantization == "int8_dynamic")
    found = run_ort(model, x)
    # one value may round the other way, after an addition in another order: a step of 1/255
    assert relative_error(found, expected) < (1e-2 if "dynamic" in quantization else 1e-5)
    exact = ReferenceEvaluator(model).run(None, {"X": x.numpy()})[0]
    assert relative_error(found, torch.from_numpy(exact)) < 1e-2


@settings(deadline=None, max_examples=25)
@given(layers(), st.booleans(), st.sampled_from([63, 127]))
def test_per_token_bodies_compute_the_quantised_operator(layer, general, levels):
    """``ss1::linear_quantized``, ragged, with codes beyond ±63 that need two exact products."""
    kind, k, sketch, z, bias = layer
    x = torch.randn(2, 3, k) * 10.0 ** torch.randint(-3, 3, (2, 3, 1))  # a scale per row matters
    x[0, 1] = 0
    traits = replace(traits_of(k, sketch, z, bias), wide=levels > 63)
    model = layer_model(
        Operator(kind, "int8_per_token"),
        sketch,
        z,
        bias,
        k,
        traits=Traits() if general else traits,
        levels=levels,
    )
    onnx.checker.check_model(model, full_check=True)
    codes, scale = (torch.from_numpy(a) for a in round_rows(z.numpy(), levels))
    expected = torch.ops.ss1.linear_quantized(x, sketch, codes, scale, bias, True)
    found = run_ort(model, x)
    for row in range(x.shape[0]):  # per row: a small one must not hide behind a large one
        assert relative_error(found[row], expected[row]) < 1e-2
    if bias is None:
        assert not found[0, 1].any()


def test_two_parts_are_exact_where_pairs_of_products_overflow():
    z = torch.full((8, 64), 1.0)
    sketch = torch.zeros(1, 1, 1, dtype=torch.int32)
    x = torch.full((1, 2, 64), 3.0)
    model = layer_model(Operator("rotation", "int8_per_token"), sketch, z, None, 64, levels=127)
    assert torch.allclose(run_ort(model, x), torch.full((1, 2, 8), 192.0), rtol=1e-6)


def test_emulation_is_that_of_the_definition():
    """Against float64 from the written-out definition, with the quantised operands."""
    torch.manual_seed(0)
    structure = rotation(64, 24, 2, 2, 16, 0)
    z, x, bias = torch.randn(24, 32), torch.randn(7, 64), torch.randn(24)
    q, scale = (torch.from_numpy(a).double() for a in round_rows(z.numpy(), 63))
    found = emulate(x, structure.code, z, bias, 63, dynamic=False)
    expected = reference.linear(x, structure.code, q * scale, bias)
    assert relative_error(found, expected) < 1e-6
    dynamic = emulate(x, structure.code, z, bias, 63, dynamic=True)
    assert 1e-4 < relative_error(dynamic, expected) < 2e-2  # activations are rounded, and not lost


def test_eight_bit_rows_saturate_and_zero_rows_stay_zero():
    z = torch.tensor([[0.0, 0.0], [-3.0, 1.0], [1e-30, 5e-31]]).numpy()
    for levels in (63, 127):
        q, scale = round_rows(z, levels)
        assert q[0].tolist() == [0, 0]
        assert scale[0, 0] == 1
        assert q[1, 0] == -levels
        assert q[2, 0] == levels
        assert abs(q * scale - z).max() <= 3 / levels / 2 + 1e-6


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda operator: operator.name)
def test_bodies_call_standard_operators_only(operator):
    for traits in (
        Traits(),
        Traits(1, False, False, narrow=True),
        Traits(4, True, True, False, biased=True),
    ):
        body = function_body(operator, 20, traits)
        assert {node.domain for node in body.node} == {""}
        assert (body.domain, body.name) == (DOMAIN, operator.name)
        assert [(o.domain, o.version) for o in body.opset_import] == [("", 20)]


def test_many_hashes_stay_one_product():
    body = function_body(Operator("rotation"), 18, Traits(MAX_UNROLLED + 1, False, False))
    assert sum(node.op_type == "MatMul" for node in body.node) == 2
