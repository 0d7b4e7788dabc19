import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.kernels import reference
from ss1_compile.structure import SS1Structure

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
OPS = torch.ops.ss1


def make(kind, dtype=torch.float32, bias=True, grad=False, strided=False, batch=(5,)):
    """``(x, sketch, z, bias)`` of a ragged layer: K = 45 in groups of 32, N = 7 in blocks of 2."""
    x = torch.randn(*batch, 45, dtype=dtype)
    if strided:
        x = torch.randn(*batch, 90, dtype=dtype)[..., ::2]
    if kind == "rotation":
        sketch = SS1Structure.create(45, 7, 4, block_k=8, seed=3).code
    else:
        sketch = torch.randn(4, 2, 32, 8, dtype=dtype, requires_grad=grad)
    z = torch.randn(7, 16, dtype=dtype)
    b = torch.randn(7, dtype=dtype) if bias else None
    for tensor in (x, z, b):
        if tensor is not None and grad:
            tensor.requires_grad_()
    return x, sketch, z, b


both_kinds = pytest.mark.parametrize("kind", ["rotation", "learned"])


@both_kinds
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("bias", "batch"), [(True, (5,)), (False, (2, 3))])
def test_opcheck_linear(kind, strided, bias, batch):
    args = make(kind, bias=bias, grad=True, strided=strided, batch=batch)
    checks = (*OPCHECKS, "test_aot_dispatch_dynamic") if bias and not strided else OPCHECKS
    torch.library.opcheck(OPS.linear.default, args, test_utils=checks)


@both_kinds
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck_sketch_and_unsketch(kind, strided):
    checks = OPCHECKS if strided else (*OPCHECKS, "test_aot_dispatch_dynamic")
    x, sketch, _, _ = make(kind, grad=True, strided=strided)
    torch.library.opcheck(OPS.sketch.default, (x, sketch, 16), test_utils=checks)
    g = torch.randn(4, 5, 32)[..., ::2] if strided else torch.randn(4, 5, 16)
    args = (g.detach().requires_grad_(), sketch, 45)
    torch.library.opcheck(OPS.unsketch.default, args, test_utils=checks)


@both_kinds
def test_gradients_in_float64(kind):
    """``fast_mode``: random projections of the Jacobian, one pair of calls for each operand."""
    x, sketch, z, b = make(kind, torch.float64, grad=True, batch=(2,))
    g = torch.randn(4, 2, 16, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(OPS.linear, (x, sketch, z, b), fast_mode=True)
        assert check(lambda x, s: OPS.sketch(x, s, 16), (x, sketch), fast_mode=True)
        assert check(lambda g, s: OPS.unsketch(g, s, 45), (g, sketch), fast_mode=True)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 40), st.integers(0, 4), st.booleans())
def test_gradients_are_those_of_the_dense_layer(reduction, extra, out_features, rows, bias):
    structure = SS1Structure.create(reduction + extra, out_features, reduction, block_k=8)
    x = torch.randn(rows, reduction + extra, dtype=torch.float64, requires_grad=True)
    z = torch.randn(out_features, structure.reduced_features, dtype=torch.float64)
    z.requires_grad_()
    b = torch.randn(out_features, dtype=torch.float64, requires_grad=True) if bias else None
    inputs = [x, z, *([b] if b is not None else [])]
    y = OPS.linear(x, structure.code, z, b)
    dense = torch.nn.functional.linear(x, structure.materialize(z), b)
    torch.testing.assert_close(y, dense)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(dense, inputs, g)
    for actual, wanted in zip(torch.autograd.grad(y, inputs, g), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@both_kinds
def test_backward_of_an_empty_batch(kind):
    args = make(kind, grad=True, batch=(0,))
    y = OPS.linear(*args)
    assert y.shape == (0, 7)
    y.sum().backward()
    for tensor in args:
        if tensor.is_floating_point():
            assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@both_kinds
def test_float64_matches_the_reference_in_any_batch_shape(kind):
    for batch in ((), (3,), (2, 0), (2, 3, 4)):
        args = make(kind, torch.float64, batch=batch)
        y = OPS.linear(*args)
        assert y.shape == (*batch, 7)
        torch.testing.assert_close(y, reference.linear(*args))


@both_kinds
def test_autocast(kind):
    args = make(kind, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = OPS.linear(*args)
    assert y.dtype == torch.bfloat16
    low = [t.bfloat16() if t.is_floating_point() else t for t in args]
    assert torch.equal(y, OPS.linear(*low))
    y.float().sum().backward()
    assert args[2].grad.dtype == torch.float32
    assert torch.isfinite(args[2].grad).all()


@both_kinds
def test_autocast_leaves_float64_alone(kind):
    args = make(kind, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = OPS.linear(*args)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, reference.linear(*args))


def test_compiled_with_dynamic_shapes_is_one_graph():
    _, sketch, z, b = make("rotation")
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(lambda x: OPS.linear(x, sketch, z, b), backend=backend, dynamic=True)
    for rows in (3, 4, 9):
        x = torch.randn(rows, 45)
        assert torch.equal(compiled(x), OPS.linear(x, sketch, z, b))
    assert len(graphs) == 1


def replaced(index, tensor):
    args = list(make("rotation"))
    args[index] = tensor
    return args


wrong = {
    "x is torch.float16 but z is torch.float32": replaced(0, torch.randn(5, 45).half()),
    "x is torch.int64": replaced(0, torch.ones(5, 45, dtype=torch.int64)),
    "x must have": replaced(0, torch.tensor(1.0)),
    "x has 65": replaced(0, torch.randn(5, 65)),
    "x has 32": replaced(0, torch.randn(5, 32)),
    "sketch must be int32": replaced(1, torch.zeros(4, 2, 4, dtype=torch.int64)),
    "got torch.int32 (4, 2)": replaced(1, torch.zeros(4, 2, dtype=torch.int32)),
    "got torch.float32 (4, 2, 4)": replaced(1, torch.zeros(4, 2, 4)),
    "z must be": replaced(2, torch.randn(7)),
    "15 reduced features": replaced(2, torch.randn(7, 15)),
    "4 column blocks": replaced(2, torch.randn(3, 16)),
    "bias must be torch.float32 [7]": replaced(3, torch.randn(6)),
    "got torch.float64 (7,)": replaced(3, torch.randn(7).double()),
}


@pytest.mark.parametrize("message", wrong)
def test_wrong_operands_are_named(message):
    with pytest.raises(RuntimeError) as error:
        OPS.linear(*wrong[message])
    assert message in str(error.value)
    assert "ss1::linear" in str(error.value)


@pytest.mark.parametrize(("op", "size"), [*itertools.product(("sketch", "unsketch"), (15, 17))])
def test_wrong_sizes_of_the_sketch_are_named(op, size):
    code = make("rotation")[1]
    args = (
        (torch.randn(5, 45), code, size) if op == "sketch" else (torch.randn(4, 5, size), code, 45)
    )
    with pytest.raises(RuntimeError, match=f"ss1::{op}: {size} reduced features"):
        getattr(OPS, op)(*args)


def test_deterministic():
    args = make("rotation", batch=(64,))
    assert torch.equal(OPS.linear(*args), OPS.linear(*args))
