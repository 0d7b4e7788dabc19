"""A product and the sketch that alone reads it become one operator."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from graphs import check, layer, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.passes.epilogue import fuse_epilogues
from ss1_compile.passes.fuse import fuse
from ss1_compile.passes.join import join_products
from ss1_compile.passes.producers import fuse_activations
from ss1_compile.passes.share import share_sketches

K, N = 32, 48


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def learned(k, n, gsize=16, rank=4):
    """``(sketch, z, bias)`` of a learned layer; the last group may be ragged."""
    groups = -(-k // gsize)
    return randn(1, groups, gsize, rank), randn(n, groups * rank), randn(n)


def join(graph, values):
    return join_products(graph)


def feed_forward(linear, x, s1, z1, b1, s2, z2, b2):
    return linear(F.dropout(F.gelu(linear(x, s1, z1, b1)), 0.1, False), s2, z2, b2)


@pytest.mark.parametrize("kind", [layer, learned])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_activation_of_the_sketch_or_of_the_product(kind, activation):
    """Which of the two took it depends on the kind; it is the joined operator's in the end."""
    functions = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
    }

    def block(linear, x, s1, z1, b1, s2, z2, b2):
        h = functions[activation](linear(x, s1, z1, b1))
        return x + linear(F.dropout(h.view(-1, N), 0.1, False).view(2, 3, N), s2, z2, b2)

    in_sketch = kind is layer or activation == "gelu"
    gm, _ = check(
        fuse,
        block,
        *(randn(2, 3, K), *kind(K, N), *kind(N, K)),
        expect={
            activation if in_sketch else f"{activation} behind": 1,
            "residual": 1,
            "joined": 1,
        },
        ops={"sketch": 1, "matmul_sketch": 1, "matmul": 1},
    )
    (node,) = (n for n in gm.graph.nodes if n.target is torch.ops.ss1.matmul_sketch.default)
    assert node.args[5] == activation


@settings(deadline=None, max_examples=15)
@given(
    lead=st.sampled_from([(5,), (2, 3), (2, 1, 3), (1, 1)]),
    k=st.sampled_from([16, 40]),
    n=st.sampled_from([24, 72]),
    kinds=st.tuples(*[st.sampled_from([layer, learned])] * 2),
    biases=st.booleans(),
)
def test_any_shape_and_kind(lead, k, n, kinds, biases):
    def function(linear, x, s1, z1, b1, s2, z2, b2):
        return linear(linear(x, s1, z1, b1), s2, z2, b2)

    (s1, z1, b1), (s2, z2, b2) = kinds[0](k, n), kinds[1](n, k)
    if not biases:
        b1 = b2 = None
    check(
        join,
        function,
        *(randn(*lead, k), s1, z1, b1, s2, z2, b2),
        expect={"joined": 1},
        ops={"sketch": 1, "matmul_sketch": 1, "matmul": 1},
    )


def test_a_chain():
    def chain(linear, x, *operands):
        for i in range(0, len(operands), 3):
            x = F.relu(linear(x, *operands[i : i + 3]))
        return x

    widths = [16, 40, 24, 32, 16]
    layers = [t for k, n in pairwise(widths) for t in layer(k, n)]
    _, results = check(
        fuse,
        chain,
        *(randn(5, 16), *layers),
        expect={"relu": 3, "relu behind": 1, "joined": 3},
        ops={"sketch": 1, "matmul_sketch": 3, "matmul": 1},
    )
    joined = results[-1].fusions
    assert [len(fusion.layers) for fusion in joined] == [2, 2, 2]
    assert joined[0].layers[1] is joined[1].layers[0]


def test_the_sketch_of_several_layers():
    def function(linear, x, s1, z1, b1, s2, z2, b2, z3, b3):
        h = F.silu(linear(x, s1, z1, b1))
        return linear(h, s2, z2, b2) * 1, linear(h, s2, z3, b3) * 1

    _, results = check(
        fuse,
        function,
        *(randn(2, 3, K), *layer(K, N), *layer(N, K), *layer(N, K)[1:]),
        expect={"shared": 1, "silu": 1, "joined": 1},
        ops={"sketch": 1, "matmul_sketch": 1, "matmul": 1},
    )
    assert len(results[-1].fusions[0].layers) == 3


# --- gated --------------------------------------------------------------------------------------

SILU = {"F": F.silu, "product": lambda x: x * torch.sigmoid(x)}


@pytest.mark.parametrize("silu", SILU.values(), ids=SILU)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_gate_and_up_of_learned_sketches(silu, swapped, biases):
    """Which half is the gate depends on the order of the layers, not on that of the product."""

    def function(linear, x, s1, z1, b1, z2, b2, s3, z3, b3):
        a, b = linear(x, s1, z1, b1), linear(x, s1, z2, b2)
        h = a.view(-1, N) * silu(b.view(-1, N)) if swapped else silu(a) * b
        return x + linear(F.dropout(h, 0.1, False).view(2, 3, N), s3, z3, b3)

    inputs = [randn(2, 3, K), *learned(K, N), *learned(K, N)[1:], *learned(N, K)]
    inputs = [t if biases or i not in (3, 5) else None for i, t in enumerate(inputs)]
    gm, results = check(
        fuse,
        function,
        *inputs,
        expect={"shared": 1, "residual": 1, "gated silu": 1, "joined": 1},
        ops={"sketch": 1, "matmul_sketch": 1, "matmul": 1},
    )
    (node,) = (n for n in gm.graph.nodes if n.target is torch.ops.ss1.matmul_sketch.default)
    first, second = "a2", "a4"
    up, gate = (first, second) if swapped else (second, first)
    assert (node.args[1].name, node.args[3].name) == (up, gate)
    assert len(results[-1].fusions[-1].layers) == 3


def halves_of(function):
    """The block around ``function(linear, whole)``, which gives what the last layer reads."""

    def block(linear, x, w, s1, z1, b1, s2, z2, b2):
        n = F.layer_norm(x, (K,), w)
        return x + linear(function(linear(n, s1, z1, b1)), s2, z2, b2)

    return block


HALVES = {
    "gate first": lambda y: (lambda gate, up: F.silu(gate) * up)(*two(y.chunk(2, dim=-1))),
    "up first": lambda y: (lambda up, gate: up * F.silu(gate))(*two(y.chunk(2, -1))),
    "split": lambda y: (lambda gate, up: F.silu(gate) * up)(*two(y.split(N, -1))),
    "function": lambda y: (lambda gate, up: F.silu(gate) * up)(*two(torch.chunk(y, 2, -1))),
    "rows": lambda y: (lambda gate, up: F.silu(gate) * up)(*two(y.view(-1, 2 * N).chunk(2, -1))),
}


def two(parts):
    return parts[0], parts[1]


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("biases", [False, True])
def test_gate_and_up_in_one_layer(name, biases):
    """As in Phi-3, ModernBERT and GEGLU."""
    inputs = [randn(2, 3, K), randn(K), *learned(K, 2 * N), *learned(N, K)]
    inputs[4] = inputs[4] if biases else None

    def function(y):
        h = HALVES[name](y)
        return h.view(2, 3, N) if name == "rows" else h

    gm, results = check(
        fuse,
        halves_of(function),
        *inputs,
        expect={"norm": 1, "residual": 1, "gated silu": 1, "joined": 1},
        ops={"norm_sketch": 1, "matmul_sketch": 1, "matmul": 1},
    )
    assert len(results[-1].fusions[-1].layers) == 2
    assert "chunk" not in gm.code


NO_HALVES = {
    "thirds": lambda y: F.silu(y.split([N, N // 2, N // 2], -1)[0]) * y.chunk(2, -1)[1],
    "twice": lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
    "of rows": lambda y: (F.silu(y.chunk(2, 0)[0]) * y.chunk(2, 0)[1])[..., :N].repeat(2, 1, 1),
    "read on": lambda y: (lambda p: F.silu(p[0]) * p[1] + y.mean())(y.chunk(2, -1)),
    "the same": lambda y: (lambda p: F.silu(p[0]) * p[0] + 0 * p[1].sum())(y.chunk(2, -1)),
}


@pytest.mark.parametrize("function", NO_HALVES.values(), ids=NO_HALVES)
def test_what_is_no_two_halves_stays(function):
    inputs = [randn(2, 3, K), randn(K), *learned(K, 2 * N), *learned(N, K)]
    check(join, halves_of(function), *inputs, expect={})


GATED_STAYS = {
    "read twice": lambda linear, x, s1, z1, b1, z2, b2, s3, z3, b3: (
        (up := linear(x, s1, z2, b2)) * 1,
        linear(F.silu(linear(x, s1, z1, b1)) * up, s3, z3, b3),
    ),
    "gate read twice": lambda linear, x, s1, z1, b1, z2, b2, s3, z3, b3: (
        (gate := linear(x, s1, z1, b1)) * 1,
        linear(F.silu(gate) * linear(x, s1, z2, b2), s3, z3, b3),
    ),
    "of itself": lambda linear, x, s1, z1, b1, z2, b2, s3, z3, b3: (
        linear(F.silu(h := linear(x, s1, z1, b1)) * h, s3, z3, b3),
        linear(x, s1, z2, b2) * 1,
    ),
    "of another": lambda linear, x, s1, z1, b1, z2, b2, s3, z3, b3: linear(
        F.silu(linear(x, s1, z1, b1)) * linear(x.sin(), s1, z2, b2), s3, z3, b3
    ),
    "no activation": lambda linear, x, s1, z1, b1, z2, b2, s3, z3, b3: linear(
        linear(x, s1, z1, b1) * linear(x, s1, z2, b2), s3, z3, b3
    ),
}


@pytest.mark.parametrize("function", GATED_STAYS.values(), ids=GATED_STAYS)
def test_gated_products_that_stay(function):
    def run(graph, values):
        return share_sketches(graph, values), join_products(graph)

    inputs = (randn(2, 3, K), *learned(K, N), *learned(K, N)[1:], *learned(N, K))
    shared = "sin" not in str(function.__code__.co_names)
    check(run, function, *inputs, expect={"shared": 1} if shared else {})


@pytest.mark.parametrize("kinds", [(layer, learned), (learned, layer), (layer, layer)])
def test_gated_products_of_rotations_stay(kinds):
    def function(linear, x, s1, z1, b1, z2, b2, s3, z3, b3):
        h = F.silu(linear(x, s1, z1, b1)) * linear(x, s1, z2, b2)
        return linear(h, s3, z3, b3)

    _, results = check(
        fuse,
        function,
        *(randn(2, 3, K), *kinds[0](K, N), *kinds[0](K, N)[1:], *kinds[1](N, K)),
        expect={"shared": 1, **({"gated silu": 1} if kinds[1] is layer else {})},
    )
    assert len(results[-1]) == 0


# --- what stays ---------------------------------------------------------------------------------


def residual(linear, x, s1, z1, b1, s2, z2, b2):
    return linear(x.sin() + linear(x, s1, z1, b1), s2, z2, b2)


def read_twice(linear, x, s1, z1, b1, s2, z2, b2):
    h = linear(x, s1, z1, b1)
    return linear(h, s2, z2, b2), h.sum()


def view_read_twice(linear, x, s1, z1, b1, s2, z2, b2):
    h = linear(x, s1, z1, b1).reshape(-1, K)
    return linear(h, s2, z2, b2), h + 1


def transposed(linear, x, s1, z1, b1, s2, z2, b2):
    h = linear(x, s1, z1, b1)
    return linear(h.transpose(0, 1).reshape(-1, K), s2, z2, b2)


def regrouped(linear, x, s1, z1, b1, s2, z2, b2):
    return linear(linear(x, s1, z1, b1).view(-1, 2, K // 2).view(-1, K), s2, z2, b2)


def unknown_activation(linear, x, s1, z1, b1, s2, z2, b2):
    return linear(linear(x, s1, z1, b1).tanh(), s2, z2, b2)


STAYS = (residual, read_twice, view_read_twice, transposed, regrouped, unknown_activation)


@pytest.mark.parametrize("function", STAYS, ids=lambda f: f.__name__)
def test_what_stays(function):
    def epilogues_and_join(graph, values):
        fused = fuse_epilogues(graph)
        assert len(fused) == (function is residual)
        joined = join_products(graph)
        assert len(joined) == 0
        return (fused, joined)

    inputs = (randn(4, K), *layer(K, K), *layer(K, K))
    expect = {"residual": 1} if function is residual else {}
    check(epilogues_and_join, function, *inputs, expect=expect)


def test_an_activation_on_both_sides_stays():
    """Two in a row, of which the product's is none that the sketch has left over."""

    def function(linear, x, s1, z1, b1, s2, z2, b2):
        return linear(F.gelu(F.relu(linear(x, s1, z1, b1))), s2, z2, b2)

    def run(graph, values):
        return fuse_activations(graph), fuse_epilogues(graph), join_products(graph)

    check(
        run,
        function,
        *(randn(2, 3, K), *layer(K, N), *layer(N, K)),
        expect={"gelu": 1, "relu behind": 1},
        ops={"sketch": 1, "matmul": 2, "activation_sketch": 1},
    )


def test_products_of_several_layers_stay():
    def function(linear, x, s1, z1, b1, z2, b2, s3, z3, b3):
        a, b = linear(x, s1, z1, b1), linear(x, s1, z2, b2)
        return linear(torch.relu(a), s3, z3, b3) + b.sum()

    def run(graph, values):
        return share_sketches(graph, values), fuse_activations(graph), join_products(graph)

    check(
        run,
        function,
        *(randn(2, 3, K), *layer(K, N), *layer(K, N)[1:], *layer(N, K)),
        expect={"shared": 1, "relu": 1},
        ops={"sketch": 1, "matmul": 2, "activation_sketch": 1},
    )


def test_a_write_between_product_and_sketch_is_seen():
    """The product runs where the sketch did: what it reads must be the same there."""

    def changed(linear, x, s1, z1, b1, s2, z2, b2):
        b = b1 * 1
        h = linear(x, s1, z1, b)
        b.zero_()
        return linear(h, s2, z2, b2)

    inputs = (randn(3, K), *layer(K, N), *layer(N, K))
    check(join, changed, *inputs, expect={})

    def input_changed(linear, x, s1, z1, b1, s2, z2, b2):
        rows = x * 1
        h = linear(rows, s1, z1, b1)
        rows.zero_()
        return linear(h, s2, z2, b2)

    check(join, input_changed, *inputs, expect={"joined": 1})  # the first sketch stays in front
