"""``torch.func`` through the operators, against the same transform of the dense layer."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from ss1_compile import SS1Linear, SS1Structure
from ss1_compile.kernels import layout

K, N = 64, 48


def operands(kind):
    """``x``, ``sketch``, ``z``, ``bias`` in float64, and a differentiable dense ``W``."""
    structure = SS1Structure.create(K, N, 4, seed=3)
    sketch = structure.code
    if kind == "learned":
        sketch = torch.randn(2, 2, K // 2, 8, dtype=torch.float64)
    width = structure.reduced_features
    z = torch.randn(N, width, dtype=torch.float64)
    x = torch.randn(5, K, dtype=torch.float64)
    return x, sketch, z, torch.randn(N, dtype=torch.float64)


def dense_weight(sketch, z):
    """``W`` as plain differentiable PyTorch: one column per unit vector, one block per hash."""
    unit = torch.eye(K, dtype=z.dtype)
    if sketch.dtype == torch.int32:
        sketched = torch.ops.ss1.sketch(unit, sketch, z.shape[1])
    else:
        groups, size = sketch.shape[1:3]
        sketched = torch.einsum("mgk,jgkr->jmgr", unit.view(K, groups, size), sketch).flatten(2)
    width = layout.block_n(N, sketch.shape[0])
    blocks = z.split(width)
    return torch.cat([b @ s.t() for b, s in zip(blocks, sketched, strict=True)])


KINDS = pytest.mark.parametrize("kind", ["rotation", "learned"])


def both(kind):
    x, sketch, z, bias = operands(kind)

    def ss1(x, z, bias):
        return torch.ops.ss1.linear(x, sketch, z, bias)

    def dense(x, z, bias):
        return F.linear(x, dense_weight(sketch, z), bias)

    return ss1, dense, (x, z, bias)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@KINDS
def test_grad_and_grad_of_grad(kind):
    ss1, dense, inputs = both(kind)
    expected = grad(lambda *a: dense(*a).pow(3).sum(), argnums=(0, 1, 2))(*inputs)
    assert_close(grad(lambda *a: ss1(*a).pow(3).sum(), argnums=(0, 1, 2))(*inputs), expected)

    def twice(layer):
        once = grad(lambda x, z: layer(x, z, inputs[2]).pow(3).sum(), argnums=(0, 1))
        return grad(lambda x, z: sum(g.square().sum() for g in once(x, z)), argnums=(0, 1))

    assert_close(twice(ss1)(*inputs[:2]), twice(dense)(*inputs[:2]))


@KINDS
def test_jvp_is_not_silently_zero(kind):
    ss1, dense, inputs = both(kind)
    tangents = tuple(torch.randn_like(value) for value in inputs)
    assert_close(jvp(ss1, inputs, tangents), jvp(dense, inputs, tangents))
    for i in range(3):  # each operand alone
        one = tuple(t if i == j else torch.zeros_like(t) for j, t in enumerate(tangents))
        actual = jvp(ss1, inputs, one)[1]
        assert_close(actual, jvp(dense, inputs, one)[1])
        assert actual.abs().max() > 0.1


@KINDS
def test_jacobians_and_hessian(kind):
    ss1, dense, (x, z, bias) = both(kind)
    for transform in (jacrev, jacfwd):
        actual = transform(lambda x: ss1(x, z, bias))(x[0])
        assert_close(actual, transform(lambda x: dense(x, z, bias))(x[0]))
    small = x[:1]
    actual = hessian(lambda x: ss1(x, z, bias).pow(3).sum())(small)
    assert_close(actual, hessian(lambda x: dense(x, z, bias).pow(3).sum())(small))


@KINDS
@pytest.mark.parametrize("batched", [(0, None, None), (1, None, None), (None, 0, 0), (0, 0, 0)])
def test_vmap(kind, batched):
    ss1, dense, inputs = both(kind)
    stacked = [
        value if dim is None else torch.stack([value, 2 * value, -value], dim)
        for value, dim in zip(inputs, batched, strict=True)
    ]
    assert_close(vmap(ss1, batched)(*stacked), vmap(dense, batched)(*stacked))


@KINDS
def test_gradients_per_sample(kind):
    ss1, dense, (x, z, bias) = both(kind)

    def per_sample(layer):
        loss = grad(lambda x, z, bias: layer(x, z, bias).pow(3).sum(), argnums=(0, 1, 2))
        return vmap(loss, (0, None, None))(x, z, bias)

    assert_close(per_sample(ss1), per_sample(dense))


@KINDS
def test_sketch_and_unsketch(kind):
    x, sketch, z, _ = operands(kind)
    width = z.shape[1]
    g = torch.randn(sketch.shape[0], 5, width, dtype=torch.float64)
    for function, value in (
        (lambda x: torch.ops.ss1.sketch(x, sketch, width), x),
        (lambda g: torch.ops.ss1.unsketch(g, sketch, K), g),
    ):
        tangent = torch.randn_like(value)
        assert_close(jvp(function, (value,), (tangent,))[1], function(tangent))  # both are linear
        for dim in range(value.dim() + 1):
            stacked = torch.stack([value, tangent], dim)
            expected = torch.stack([function(value), function(tangent)])
            assert_close(vmap(function, dim)(stacked), expected)
        back = grad(lambda v, f=function: f(v).square().sum() / 2)(value)
        expected = torch.autograd.functional.vjp(function, value, function(value))[1]
        assert_close(back, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_a_compiled_function(backend):
    torch._dynamo.reset()
    ss1, dense, inputs = both("rotation")

    def step(layer, x, z, bias):
        gradient = grad(lambda z: layer(x, z, bias).pow(3).sum())(z)
        return gradient, vmap(lambda row: layer(row, z, bias))(x)

    fast = torch.compile(lambda *a: step(ss1, *a), backend=backend, fullgraph=True)
    assert_close(fast(*inputs), step(dense, *inputs))


def test_functional_call_of_a_module():
    layer = SS1Linear(SS1Structure.create(K, N, 4)).double()
    x = torch.randn(5, K, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return functional_call(layer, parameters, (x,)).square().sum()

    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    assert_close(tuple(grad(loss)(parameters).values()), expected)


def test_no_transform_no_detour():
    """Outside of torch.func the registered backward serves alone."""
    x, sketch, z, bias = operands("rotation")
    y = torch.ops.ss1.linear(x, sketch, z.requires_grad_(), bias)
    assert "GeneratedBackwardFor_ss1_linear" in type(y.grad_fn).__name__
