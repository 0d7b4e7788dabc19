import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.kernels import quantized_cuda, quantized_native, quantized_portable, reference
from ss1_compile.kernels.quantize import dequantize, quantize_rows
from ss1_compile.structure import SS1Structure

OPS = torch.ops.ss1
FLOAT8 = torch.float8_e4m3fn
# of the result's norm: y is rounded once, X̃ too where it is floating
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
both_kinds = pytest.mark.parametrize("kind", ["rotation", "learned"])
both_quantized = pytest.mark.parametrize("quantized", [torch.int8, FLOAT8])
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE))


def make(kind, dtype=torch.float32, quantized=torch.int8, groups=1, batch=(5,), bias=True):
    """``(x, sketch, z, scale, bias)``: K = 45 in groups of 32, N = 7 in blocks of 2, K_c = 16."""
    if kind == "rotation":
        sketch = SS1Structure.create(45, 7, 4, block_k=8, seed=3).code
    else:
        sketch = torch.randn(4, 2, 32, 8).to(dtype)
    z, scale = quantize_rows(torch.randn(7, 16), groups, quantized)
    b = torch.randn(7).to(dtype) if bias else None
    return torch.randn(*batch, 45).to(dtype), sketch, z, scale, b


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= TOLERANCE[actual.dtype], f"relative error {error:.1e}"


@both_kinds
@both_quantized
@every_dtype
@pytest.mark.parametrize("groups", [1, 4])
def test_weight_only_is_the_layer_with_dequantised_z(kind, quantized, dtype, groups):
    args = make(kind, dtype, quantized, groups, batch=(2, 3))
    y = OPS.linear_quantized(*args)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_close(y, reference.linear_weight_only(*args))


@both_kinds
@both_quantized
@every_dtype
def test_dynamic_is_the_exact_product_of_the_quantised_rows(kind, quantized, dtype):
    x, sketch, z, scale, b = make(kind, dtype, quantized)
    y = OPS.linear_quantized(x, sketch, z, scale, b, True)
    q, q_scale = OPS.sketch_quantized(x, sketch, 16, quantized == FLOAT8)
    assert_close(y, reference.quantized_product(q, q_scale, z, scale, b))


@both_kinds
def test_sketch_rows_are_within_half_a_step(kind):
    x, sketch, *_ = make(kind, batch=(9,))
    q, scale = OPS.sketch_quantized(x, sketch, 16)
    error = q * scale.double().unsqueeze(-1) - reference.sketched(x, sketch, 16)
    assert (error.abs() <= (0.5 + 1e-4) * scale.unsqueeze(-1)).all()
    assert (q.abs().amax(-1) == 127).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.integers(0, 70), st.booleans())
def test_any_shape(reduction, extra, out_features, rows, dynamic):
    structure = SS1Structure.create(reduction + extra, out_features, reduction, block_k=8)
    code, reduced = structure.code, structure.reduced_features
    x = torch.randn(rows, reduction + extra)
    groups = 1 if dynamic else reduced // 8
    z, scale = quantize_rows(torch.randn(out_features, reduced), groups)
    y = OPS.linear_quantized(x, code, z, scale, None, dynamic)
    if dynamic:
        q, q_scale = OPS.sketch_quantized(x, code, reduced)
        assert_close(y, reference.quantized_product(q, q_scale, z, scale))
    else:
        assert_close(y, reference.linear_weight_only(x, code, z, scale))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("reduced", [1024, 1056, 4096])
def test_saturated_int8_sums_are_exact(rows, reduced):
    """The largest sums there are; adjacent pairs overflow int16, and float32 beyond 1040 slots."""
    sign = torch.tensor([-1.0, 1.0])[torch.randint(2, (rows,))]
    x = sign[:, None] * torch.full((1, reduced), 3.0)
    x[:, 0] *= 1 - 1e-6
    code = torch.zeros(1, reduced // 32, 1, dtype=torch.int32)
    z = torch.full((5, reduced), 127, dtype=torch.int8)
    z[0], z[1, 7] = -127, 126
    scale = torch.ones(5, 1)
    y = OPS.linear_quantized(x, code, z, scale, None, True)
    q, q_scale = OPS.sketch_quantized(x, code, reduced)
    assert (q.abs() == 127).all()
    exact = (q[0].long() @ z.long().t()).float() * q_scale[0][:, None]
    torch.testing.assert_close(y, exact, rtol=2e-7, atol=0)


@both_kinds
@both_quantized
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_rows_are_nan_and_the_others_untouched(kind, quantized, value):
    x, *rest = make(kind, quantized=quantized)
    clean = OPS.linear_quantized(x, *rest, True)
    x[2, 11] = value
    y = OPS.linear_quantized(x, *rest, True)
    assert y[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(y[keep], clean[keep])
    weight_only = OPS.linear_quantized(x, *rest, False)
    assert not weight_only[2].isfinite().all()
    assert weight_only[keep].isfinite().all()


@both_kinds
@both_quantized
@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_of_zeros_give_the_bias(kind, quantized, dynamic):
    x, sketch, z, scale, b = make(kind, quantized=quantized)
    x[1] = 0
    y = OPS.linear_quantized(x, sketch, z, scale, b, dynamic)
    assert torch.equal(y[1], b)


@both_kinds
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kernels", [quantized_portable, quantized_cuda, quantized_native])
def test_every_implementation_runs_on_any_strides(kind, dynamic, kernels):
    if kernels is quantized_cuda:
        pytest.importorskip("triton")
        if not torch.cuda.is_available():
            pytest.skip("its CPU fall-backs are those of the portable module")
    device = "cuda" if kernels is quantized_cuda else "cpu"
    x, sketch, z, scale, b = (t.to(device) for t in make(kind))
    expected = OPS.linear_quantized(x, sketch, z, scale, b, dynamic)
    wide = torch.randn(5, 90, device=device)
    wide[:, ::2] = x
    y = kernels.linear(wide[:, ::2], sketch, z.t().contiguous().t(), scale, b, dynamic)
    assert_close(y, expected.double())


@both_kinds
@pytest.mark.parametrize("dynamic", [False, True])
def test_opcheck_linear(kind, dynamic):
    x, sketch, z, scale, b = make(kind, batch=(2, 3))
    args = (x.requires_grad_(), sketch, z, scale, b.requires_grad_(), dynamic)
    torch.library.opcheck(OPS.linear_quantized.default, args)


@both_kinds
def test_opcheck_sketch(kind):
    x, sketch, *_ = make(kind)
    torch.library.opcheck(OPS.sketch_quantized.default, (x, sketch, 16))


@both_kinds
@both_quantized
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_are_those_of_the_dequantised_layer(kind, quantized, dynamic):
    x, sketch, z, scale, b = make(kind, quantized=quantized)
    wanted = [x, b, *([sketch] if kind == "learned" else [])]
    for tensor in wanted:
        tensor.requires_grad_()
    y = OPS.linear_quantized(x, sketch, z, scale, b, dynamic)
    g = torch.randn_like(y)
    same = OPS.linear(x, sketch, dequantize(z, scale), b)
    expected = torch.autograd.grad(same, wanted, g)
    for actual, exact in zip(torch.autograd.grad(y, wanted, g), expected, strict=True):
        torch.testing.assert_close(actual, exact)


@both_kinds
@both_quantized
def test_autocast(kind, quantized):
    x, sketch, z, scale, b = make(kind, quantized=quantized)
    with torch.autocast("cpu", torch.bfloat16):
        y = OPS.linear_quantized(x, sketch, z, scale, b, True)
    low = [t.bfloat16() if t is not None and t.is_floating_point() else t for t in (x, sketch, b)]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, OPS.linear_quantized(low[0], low[1], z, scale, low[2], True))


def test_compiled_with_dynamic_rows_is_one_graph():
    _, sketch, z, scale, b = make("rotation")
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(
        lambda x: OPS.linear_quantized(x, sketch, z, scale, b, True), backend=backend, dynamic=True
    )
    for rows in (3, 4, 9):
        x = torch.randn(rows, 45)
        assert torch.equal(compiled(x), OPS.linear_quantized(x, sketch, z, scale, b, True))
    assert len(graphs) == 1


def replaced(index, value, dynamic=False, groups=1):
    args = [*make("rotation", groups=groups), dynamic]
    args[index] = value
    return args


wrong = {
    "x must be float16, bfloat16 or float32": replaced(0, torch.randn(5, 45).double()),
    "x must be [..., K]": replaced(0, torch.tensor(1.0)),
    "x has 65": replaced(0, torch.randn(5, 65)),
    "a learned sketch must be torch.float32": replaced(1, torch.randn(4, 2, 32, 8).half()),
    "z must be int8 or float8_e4m3fn": replaced(2, torch.randn(7, 16)),
    "15 reduced features": replaced(2, torch.zeros(7, 15, dtype=torch.int8)),
    "4 column blocks": replaced(2, torch.zeros(3, 16, dtype=torch.int8)),
    "scale must be float32 [7, groups]": replaced(3, torch.ones(7)),
    "got torch.float64": replaced(3, torch.ones(7, 1).double()),
    "3 groups do not divide": replaced(3, torch.ones(7, 3)),
    "dynamic=True takes one scale per row": replaced(5, True, groups=2),
    "bias must be torch.float32 [7]": replaced(4, torch.randn(6)),
}


@pytest.mark.parametrize("message", wrong)
def test_wrong_operands_are_named(message):
    with pytest.raises(RuntimeError) as error:
        OPS.linear_quantized(*wrong[message])
    assert message in str(error.value)
    assert "ss1::linear_quantized" in str(error.value)


def test_float8_is_refused_below_sm_89(monkeypatch):
    monkeypatch.setattr(quantized_cuda, "_capability", lambda device: (8, 0))
    x, sketch, z, scale, b = make("rotation", quantized=FLOAT8)
    for dynamic in (False, True):
        with pytest.raises(RuntimeError, match="float8 needs compute capability 8.9"):
            quantized_cuda.linear(x, sketch, z, scale, b, dynamic)
    with pytest.raises(RuntimeError, match="use int8"):
        quantized_cuda.sketch(x, sketch, 16, FLOAT8)
