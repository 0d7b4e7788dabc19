"""The layers that each SS1 operator becomes: their types, dtypes and what they compute."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorrt_support import Network
from torch import nn

from ss1_compile import SS1Linear, SS1Structure
from ss1_compile.kernels import reference

DTYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}


class Operator(nn.Module):
    """An operator with its weights as buffers, or as inputs of ``forward``."""

    def __init__(self, name, *weights, **options):
        super().__init__()
        self.op, self.options = getattr(torch.ops.ss1, name), options
        self.count = len(weights)
        for i, weight in enumerate(weights):
            self.register_buffer(f"w{i}", weight)

    def forward(self, x, *weights):
        own = [getattr(self, f"w{i}") for i in range(self.count)]
        return self.op(x, *own, *weights, **self.options)


def network(torch_tensorrt, name, x, weights, as_inputs=False, batch=None, options=None, **kw):
    """The operator's network; ``batch`` makes the first dimension dynamic, up to that size."""
    module = Operator(name, *(() if as_inputs else weights), **(options or {}))
    args = (x, *weights) if as_inputs else (x,)
    shapes = None
    inputs = [torch_tensorrt.Input(shape=tuple(a.shape), dtype=a.dtype) for a in args]
    if batch:
        dim = torch.export.Dim("batch", min=1, max=batch)
        shapes = {"x": {0: dim}}
        tail = tuple(x.shape[1:])
        inputs[0] = torch_tensorrt.Input(
            min_shape=(1, *tail), opt_shape=tuple(x.shape), max_shape=(batch, *tail), dtype=x.dtype
        )
    program = torch.export.export(module, args, dynamic_shapes=shapes)
    return Network(program, inputs, **kw)


def rotation(k, n, c, j, bias=True, dtype=torch.float32, seed=0):
    structure = SS1Structure.create(k, n, c, num_hashes=j, seed=seed)
    z = torch.randn(n, structure.reduced_features, dtype=dtype)
    return [structure.code, z, *([torch.randn(n, dtype=dtype)] if bias else [])]


def learned(k, n, j, groups, size, rank, dtype=torch.float32):
    blocks = torch.randn(j, groups, size, rank, dtype=dtype)
    return [blocks, torch.randn(n, groups * rank, dtype=dtype), torch.randn(n, dtype=dtype)]


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    k=st.integers(8, 70),
    n=st.integers(1, 30),
    c=st.integers(1, 5),
    j=st.integers(1, 4),
    rank=st.integers(1, 4),
    bias=st.booleans(),
    as_inputs=st.booleans(),
)
def test_a_rotation_computes_the_layer(torch_tensorrt, k, n, c, j, rank, bias, as_inputs):
    weights = rotation(k, n, c, j, bias, seed=k)
    x = torch.randn(*(2, 3, 1)[: rank - 1], k)
    net = network(torch_tensorrt, "linear", x, weights, as_inputs)
    y = net.run(x, *(weights if as_inputs else ()))
    assert y.shape == (*x.shape[:-1], n)
    torch.testing.assert_close(y, reference.linear(x, *weights), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("as_inputs", [False, True])
@pytest.mark.parametrize(
    ("k", "n", "j", "groups", "size", "rank"), [(32, 10, 1, 2, 16, 5), (29, 7, 3, 4, 8, 2)]
)
def test_a_learned_sketch_computes_the_layer(
    torch_tensorrt, k, n, j, groups, size, rank, as_inputs
):
    weights = learned(k, n, j, groups, size, rank)
    x = torch.randn(2, 3, k)
    net = network(torch_tensorrt, "linear", x, weights, as_inputs)
    y = net.run(x, *(weights if as_inputs else ()))
    torch.testing.assert_close(y, reference.linear(x, *weights), rtol=1e-9, atol=1e-9)
    assert net.kinds().count("EINSUM") == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_a_rotation_run_in_float32_and_all_else_in_the_dtype(torch_tensorrt, dtype):
    x = torch.randn(4, 5, 64, dtype=dtype)
    net = network(torch_tensorrt, "linear", x, rotation(64, 24, 2, 2, dtype=dtype), batch=16)
    half = dtype != torch.float32
    assert net.kinds() == [
        "GATHER",
        *(["CAST"] if half else []),
        "SHUFFLE",
        "ELEMENTWISE",
        "REDUCE",
        *(["CAST"] if half else []),
        "EINSUM",
        "SHUFFLE",
        "SHUFFLE",
        "ELEMENTWISE",
    ]
    dtypes = {layer.type.name: layer.get_output(0).dtype.name for layer in net.layers}
    assert dtypes["REDUCE"] == "FLOAT"
    assert dtypes["GATHER"] == dtypes["EINSUM"] == DTYPES[dtype]
    assert net.net.get_output(0).dtype.name == DTYPES[dtype]
    assert tuple(net.net.get_output(0).shape) == (-1, 5, 24)
    assert len(net.build()) > 24 * 32 * dtype.itemsize


def test_float32_accumulation_is_honoured(torch_tensorrt):
    x = torch.randn(4, 64, dtype=torch.float16)
    weights = rotation(64, 24, 2, 2, dtype=torch.float16)
    net = network(torch_tensorrt, "linear", x, weights, use_fp32_acc=True)
    (product,) = [layer for layer in net.layers if layer.type.name == "EINSUM"]
    assert product.get_output(0).dtype.name == "FLOAT"
    assert net.net.get_output(0).dtype.name == "HALF"
    exact = reference.linear(x, *weights)
    torch.testing.assert_close(net.run(x), exact, rtol=1e-9, atol=1e-9)


def test_layers_of_one_structure_share_their_constants(torch_tensorrt):
    structure = SS1Structure.create(64, 64, 4)
    module = nn.Sequential(*(SS1Linear(structure) for _ in range(3)), SS1Linear(structure, False))
    x = torch.randn(2, 64)
    program = torch.export.export(module.eval(), (x,))
    net = Network(program, [torch_tensorrt.Input(shape=(2, 64))])
    assert len(net.constants("INT32")) == 1
    weights = [c for c in net.constants("FLOAT") if tuple(c.shape) == (4, 16, 16)]
    assert len(weights) == 4
    expected = module.double()(x.double())
    torch.testing.assert_close(net.run(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("as_inputs", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_int8_weights_are_dequantised_in_the_network(torch_tensorrt, groups, as_inputs):
    code, z, bias = rotation(48, 20, 3, 3)
    q = torch.randint(-127, 128, z.shape, dtype=torch.int8)
    weights = [code, q, torch.rand(20, groups), bias]
    x = torch.randn(4, 48)
    net = network(torch_tensorrt, "linear_quantized", x, weights, as_inputs)
    y = net.run(x, *(weights if as_inputs else ()))
    exact = reference.linear_weight_only(x, *weights)
    torch.testing.assert_close(y, exact, rtol=1e-9, atol=1e-9)
    assert net.kinds().count("DEQUANTIZE") == 1
    held = [math.prod(tuple(c.shape)) for c in net.constants("INT8")]
    assert held == ([] if as_inputs else [q.numel()])
    assert len(net.build()) > 0


def converters(torch_tensorrt, module, args):
    """Whether each SS1 node of the module has a converter."""
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS

    program = torch.export.export(module, args).run_decompositions({})
    nodes = [n for n in program.graph.nodes if str(n.target).startswith("ss1.")]
    return [DYNAMO_CONVERTERS.get(n) is not None for n in nodes]


def test_what_tensorrt_lacks_has_no_converter(torch_tensorrt):
    x = torch.randn(4, 64)
    single = Operator("linear", *rotation(64, 24, 2, 2))
    double = Operator("linear", *rotation(64, 24, 2, 2, dtype=torch.float64))
    assert converters(torch_tensorrt, single, (x,)) == [True]
    assert converters(torch_tensorrt, double, (x.double(),)) == [False]
    code, z, bias = rotation(64, 24, 2, 2)
    weights = [code, z.to(torch.int8), torch.rand(24, 1), bias]
    for dynamic in (False, True):
        op = Operator("linear_quantized", *weights, dynamic=dynamic)
        assert converters(torch_tensorrt, op, (x,)) == [not dynamic]
