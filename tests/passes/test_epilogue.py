"""Bias, activation and residual behind an SS1 product become part of it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import check, iadd, layer, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.passes.epilogue import fuse_epilogues

K, N = 48, 32
FUSED = {"sketch": 1, "matmul": 1}


def run(graph, values):
    return fuse_epilogues(graph)


@settings(deadline=None, max_examples=20)
@given(
    lead=st.sampled_from([(5,), (2, 3), (2, 1, 3), (0,)]),
    n=st.sampled_from([8, 24, 40]),
    reduction=st.integers(1, 4),
    bias=st.booleans(),
    swapped=st.booleans(),
)
def test_residual(lead, n, reduction, bias, swapped):
    def function(linear, x, r, s, z, b):
        y = linear(x, s, z, b)
        return r + y if swapped else y + r

    check(
        run,
        function,
        randn(*lead, K),
        randn(*lead, n),
        *layer(K, n, reduction, bias=bias),
        expect={"residual": 1},
        ops=FUSED,
    )


@pytest.mark.parametrize(
    "add",
    [operator.add, torch.add, lambda y, r: y.add(r), lambda y, r: torch.add(y, r, alpha=1)],
    ids=["+", "torch.add", "method", "alpha=1"],
)
def test_spellings_of_the_addition(add):
    def function(linear, x, r, s, z, b):
        y = F.dropout(linear(x.view(-1, K), s, z, b).view(2, 3, N), 0.1, False)
        return add(y, r)

    check(
        run,
        function,
        randn(2, 3, K),
        randn(2, 3, N),
        *layer(K, N),
        expect={"residual": 1},
        ops=FUSED,
    )


def test_scaled_addition_stays():
    def function(linear, x, r, s, z, b):
        return torch.add(linear(x, s, z, b), r, alpha=2)

    check(run, function, randn(3, K), randn(3, N), *layer(K, N), expect={})


def test_broadcast_residual_stays():
    def function(linear, x, r, s, z, b):
        return linear(x, s, z, b) + r

    check(run, function, randn(2, 3, K), randn(1, 3, N), *layer(K, N), expect={})


def test_output_that_is_read_twice_stays():
    def function(linear, x, r, s, z, b):
        y = linear(x, s, z, b)
        return y + r, y

    check(run, function, randn(3, K), randn(3, N), *layer(K, N), expect={})


def test_transposed_output_stays():
    def function(linear, x, r, s, z, b):
        return linear(x, s, z, b).transpose(1, 2) + r

    check(run, function, randn(2, 3, K), randn(2, N, 3), *layer(K, N), expect={})


def test_in_place_addition_to_the_output():
    def function(linear, x, r, s, z, b):
        y = linear(x, s, z, b)
        return iadd(y, r) * 2

    check(run, function, randn(3, K), randn(3, N), *layer(K, N), expect={"residual": 1})


def test_in_place_addition_to_a_residual_that_dies():
    def function(linear, x, r, s, z, b):
        h = r * 2
        y = linear(x, s, z, b) + 0 * h.sum()
        return iadd(h, y) * 2

    # h is read before it is overwritten, which is no hindrance
    check(run, function, randn(3, K), randn(3, N), *layer(K, N), expect={})

    def plain(linear, x, r, s, z, b):
        h = r * 2
        return h.add_(linear(x, s, z, b)) * 2

    check(run, plain, randn(3, K), randn(3, N), *layer(K, N), expect={"residual": 1})


def test_in_place_addition_that_is_seen_elsewhere_stays():
    def function(linear, x, r, s, z, b):
        h = r * 2
        rows = h.view(-1)
        return iadd(h, linear(x, s, z, b)) * 2, rows

    check(run, function, randn(3, K), randn(3, N), *layer(K, N), expect={})

    def of_an_input(linear, x, r, s, z, b):
        return iadd(r, linear(x, s, z, b)) * 2

    check(run, of_an_input, randn(3, K), randn(3, N), *layer(K, N), expect={})


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_activation_then_residual(name, residual):
    functions = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}
    activation = functions.get(name, lambda x: F.gelu(x, approximate="tanh"))

    def function(linear, x, r, s, z, b):
        y = activation(linear(x, s, z, b))
        return y + r if residual else y * r

    expect = {f"{name} behind": 1, **({"residual": 1} if residual else {})}
    check(run, function, randn(2, 3, K), randn(2, 3, N), *layer(K, N), expect=expect, ops=FUSED)


def test_activation_of_a_sum_keeps_only_the_sum():
    def function(linear, x, r, s, z, b):
        return torch.relu(linear(x, s, z, b) + r)

    gm, _ = check(run, function, randn(3, K), randn(3, N), *layer(K, N), expect={"residual": 1})
    assert any(node.target is torch.relu for node in gm.graph.nodes)


def test_bias_then_residual():
    def function(linear, x, r, s, z, b):
        return linear(x, s, z) + b + r

    check(
        run,
        function,
        randn(2, 3, K),
        randn(2, 3, N),
        *layer(K, N),
        expect={"bias": 1, "residual": 1},
        ops=FUSED,
    )


def test_second_vector_stays():
    def function(linear, x, v, s, z, b):
        return linear(x, s, z, b) + v

    check(run, function, randn(2, 3, K), randn(N), *layer(K, N), expect={})


def test_parallel_branches_are_added_once_each():
    """As in GPT-NeoX: ``x + attention(x) + mlp(x)``."""

    def function(linear, x, s1, z1, b1, s2, z2, b2):
        return linear(x, s1, z1, b1) + linear(x.sin(), s2, z2, b2) + x

    check(
        run,
        function,
        randn(3, K),
        *layer(K, K),
        *layer(K, K),
        expect={"residual": 1},
        ops={"sketch": 1, "matmul": 1, "linear": 1},
    )


def test_a_write_to_the_weight_between_is_seen():
    def function(linear, x, r, s, z, b):
        y = linear(x, s, z, b)
        z.mul_(2)
        return y + r

    check(run, function, randn(3, K), randn(3, N), *layer(K, N), expect={})
