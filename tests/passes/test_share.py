"""Linears that read the same input with the same sketch become one sketch and one product."""

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, check, layer, randn, targets
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.passes.share import share_sketches

K = 48


def two(linear, x, s1, z1, b1, s2, z2, b2):
    return linear(x, s1, z1, b1), linear(x, s2, z2, b2)


@settings(deadline=None, max_examples=25)
@given(
    lead=st.sampled_from([(5,), (2, 3), (2, 1, 3), (0,), (2, 0)]),
    sizes=st.lists(st.sampled_from([8, 24, 40]), min_size=2, max_size=4),
    reduction=st.integers(1, 4),
    bias=st.booleans(),
    returned=st.booleans(),
)
def test_any_number_of_layers_and_any_leading_shape(lead, sizes, reduction, bias, returned):
    """One product; for layers that are outputs one each, as a slice would have to be copied."""
    layers = [layer(K, n, reduction, bias=bias) for n in sizes]

    def function(linear, x, *operands):
        found = [linear(x, *operands[i : i + 3]) for i in range(0, len(operands), 3)]
        return found if returned else [y + 1 for y in found]

    flat = [operand for triple in layers for operand in triple]
    _, result = check(
        share_sketches,
        function,
        randn(*lead, K),
        *flat,
        expect={"shared": 1},
        ops={"sketch": 1, "matmul": len(sizes) if returned else 1},
    )
    assert len(result.fusions[0].layers) == len(sizes)
    assert len(result.equal) == len(sizes) - 1
    assert {pair[1].name for pair in result.equal} == {"a1"}


def test_one_sketch_input_needs_no_check():
    (sketch, z1, b1), (_, z2, b2) = layer(K, 16), layer(K, 32)

    def function(linear, x, s, z1, b1, z2, b2):
        return linear(x, s, z1, b1), linear(x, s, z2, b2)

    _, result = check(
        share_sketches, function, randn(3, K), sketch, z1, b1, z2, b2, expect={"shared": 1}
    )
    assert result.equal == []


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"seed": 1}, id="other hash"),
        pytest.param({"reduction": 3}, id="other reduction"),
    ],
)
def test_different_sketches_stay(other):
    check(share_sketches, two, randn(3, K), *layer(K, 16), *layer(K, 16, **other), expect={})


def test_different_inputs_stay():
    def function(linear, x, y, s1, z1, b1, s2, z2, b2):
        return linear(x, s1, z1, b1), linear(y, s2, z2, b2)

    check(
        share_sketches, function, randn(3, K), randn(3, K), *layer(K, 16), *layer(K, 16), expect={}
    )


def test_sketches_of_unknown_value_stay():
    gm, _, values = capture(two, randn(3, K), *layer(K, 16), *layer(K, 16))
    assert len(share_sketches(gm.graph, {})) == 0
    known = {node: value for node, value in values.items() if node.name != "a4"}
    assert len(share_sketches(gm.graph, known)) == 0
    assert targets(gm) == {"linear": 2}


def test_inference_tensors_stay():
    with torch.inference_mode():
        operands = [randn(3, K), *layer(K, 16), *layer(K, 16)]
        check(share_sketches, two, *operands, expect={})


def test_views_of_the_same_rows_are_the_same_input():
    def function(linear, x, s1, z1, b1, s2, z2, b2):
        first = linear(x.view(-1, K), s1, z1, b1)
        return first, linear(F.dropout(x, 0.1, False).contiguous(), s2, z2, b2)

    check(
        share_sketches, function, randn(2, 3, K), *layer(K, 16), *layer(K, 8), expect={"shared": 1}
    )


def test_a_write_to_the_input_between_is_seen():
    def function(linear, x, s1, z1, b1, s2, z2, b2):
        h = x + 1
        first = linear(h, s1, z1, b1)
        h.view(-1)[::2].mul_(2)
        return first, linear(h, s2, z2, b2)

    check(share_sketches, function, randn(3, K), *layer(K, 16), *layer(K, 16), expect={})


def test_a_write_elsewhere_is_no_hindrance():
    def function(linear, x, s1, z1, b1, s2, z2, b2):
        first = linear(x, s1, z1, b1)
        first.mul_(2)
        return first, linear(x, s2, z2, b2)

    check(share_sketches, function, randn(3, K), *layer(K, 16), *layer(K, 16), expect={"shared": 1})


def test_a_bias_that_comes_later_stays():
    def function(linear, x, s1, z1, b1, s2, z2, b2):
        first = linear(x, s1, z1, b1)
        return first, linear(x, s2, z2, b2 + first[0])

    check(share_sketches, function, randn(3, K), *layer(K, 16), *layer(K, 16), expect={})


def test_distant_layers_share_the_sketch_and_not_the_product():
    """As the keys and values of all decoder layers, that read one encoder output."""
    kv = [layer(K, 16, bias=False)[:2] for _ in range(4)]
    between = layer(16, 16)

    def function(linear, x, s, z, b, s1, z1, s2, z2, s3, z3, s4, z4):
        k, v = linear(x, s1, z1), linear(x, s2, z2)
        h = linear(k + v, s, z, b)
        k, v = linear(x, s3, z3), linear(x, s4, z4)
        return h + k * v

    flat = [operand for pair in kv for operand in pair]
    check(
        share_sketches,
        function,
        randn(3, K),
        *between,
        *flat,
        expect={"shared": 1},
        ops={"sketch": 1, "matmul": 2, "linear": 1},
    )


@pytest.mark.parametrize("view", ["view", "output", "as_strided"])
def test_users_that_need_contiguous_outputs_get_them(view):
    def function(linear, x, s1, z1, b1, s2, z2, b2, s3, z3, b3):
        third = linear(x, s3, z3, b3) * 2
        first, second = linear(x, s1, z1, b1), linear(x, s2, z2, b2)
        if view == "view":
            return first.view(-1) * 2, second.view(2, 3, 4, 4).transpose(1, 2) * 2, third
        if view == "as_strided":
            return first.as_strided((2, 24), (1, 2)) * 2, second * 2, third
        return first, second * 2, third

    gm, _ = check(
        share_sketches,
        function,
        randn(2, 3, K),
        *(operand for n in (8, 16, 24) for operand in layer(K, n)),
        expect={"shared": 1},
        ops={"sketch": 1, "matmul": 2},
    )
    products = [n for n in gm.graph.nodes if n.target is torch.ops.ss1.matmul.default]
    assert sorted(len(product.args[1]) for product in products) == [1, 2]
