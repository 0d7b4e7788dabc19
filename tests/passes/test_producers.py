"""Norms and activations in front of a sketch become part of it, in the forms models write them."""

import math

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, check, iadd, layer, randn, targets
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.passes.activations import find_activation
from ss1_compile.passes.order import Order
from ss1_compile.passes.producers import fuse_activations, fuse_norms
from ss1_compile.passes.share import share_sketches

K, N = 48, 24


def activations(graph, values):
    return fuse_activations(graph)


def norms(graph, values):
    return fuse_norms(graph)


# --- activations --------------------------------------------------------------------------------

GELU_TANH = {
    "F": lambda x: F.gelu(x, approximate="tanh"),
    "NewGELU": lambda x: (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "FastGELU": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "powers": lambda x: x * (1 + (0.7978845608028654 * (x + 0.044715 * x**3)).tanh()) / 2,
}
GELU = {
    "F": F.gelu,
    "GELUActivation": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "method": lambda x: x.mul(0.5).mul((x / 1.4142135623730951).erf().add(1)),
}
SILU = {
    "F": F.silu,
    "product": lambda x: x * torch.sigmoid(x),
    "swapped": lambda x: x.sigmoid() * x,
}
RELU = {
    "F": F.relu,
    "torch": torch.relu,
    "method": lambda x: x.relu(),
    "in place": lambda x: F.relu(x, inplace=True),
}
SPELLINGS = [
    pytest.param(name, function, id=f"{name}-{spelling}")
    for name, table in {"gelu_tanh": GELU_TANH, "gelu": GELU, "silu": SILU, "relu": RELU}.items()
    for spelling, function in table.items()
]


@pytest.mark.parametrize(("name", "activation"), SPELLINGS)
def test_activation(name, activation):
    def function(linear, x, s, z, b):
        h = activation(x + 1)
        return linear(F.dropout(h, 0.1, False).view(-1, K), s, z, b)

    gm, _ = check(
        activations,
        function,
        randn(2, 3, K) * 3,
        *layer(K, N),
        expect={name: 1},
        ops={"activation_sketch": 1, "matmul": 1},
        tolerance=1e-6,  # constants of seven digits
    )
    before = [node for node in gm.graph.nodes if node.op.startswith("call_")]
    assert [node.name for node in before][:2] == ["add", "flatten_using_ints"]


@pytest.mark.parametrize(("name", "activation"), [p for p in SPELLINGS if "place" not in p.id])
@pytest.mark.parametrize("swapped", [False, True])
def test_gated_activation(name, activation, swapped):
    def function(linear, x, s, z, b):
        gate, up = (x * 1).chunk(2, dim=-1)  # rows are strided
        h = activation(gate)
        return linear(up * h if swapped else h * up, s, z, b)

    check(
        activations,
        function,
        randn(2, 3, 2 * K) * 3,
        *layer(K, N),
        expect={f"gated {name}": 1},
        ops={"activation_sketch": 1, "matmul": 1},
        tolerance=1e-6,
    )


NEARLY = {
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "other constant": lambda x: 0.5 * x * (1 + torch.tanh(0.79 * (x + 0.044715 * x**3))),
    "squared": lambda x: F.silu(x) ** 2,
    "two inputs": lambda x: x * torch.sigmoid(x + x.mean()),
    "elu": F.elu,
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
}


@pytest.mark.parametrize("activation", NEARLY.values(), ids=NEARLY)
def test_what_is_nearly_an_activation_stays(activation):
    def function(linear, x, s, z, b):
        return linear(activation(x + 1), s, z, b)

    check(activations, function, randn(3, K) * 3, *layer(K, N), expect={})


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize("gated", [False, True])
def test_only_a_plain_gelu_goes_into_a_learned_sketch(name, gated):
    """The others are faster as a kernel of their own."""
    table = {"gelu": GELU, "gelu_tanh": GELU_TANH, "silu": SILU, "relu": RELU}
    activation = table[name]["F"]

    def function(linear, x, s, z, b):
        h = activation(x)
        return linear(h * (x + 1) if gated else h, s, z, b)

    fused = name == "gelu" and not gated
    check(
        activations,
        function,
        randn(2, 3, K) * 3,
        *(randn(1, 3, 16, 4), randn(N, 12), randn(N)),
        expect={"gelu": 1} if fused else {},
        ops={"activation_sketch": 1, "matmul": 1} if fused else {"linear": 1},
        tolerance=1e-6,
    )


def test_in_place_activation_of_one_half_stays():
    """What it overwrites is part of a tensor that is read later."""

    def function(linear, x, s, z, b):
        gate, up = (x * 1).chunk(2, dim=-1)
        return linear(F.relu(gate, inplace=True) * up, s, z, b)

    check(activations, function, randn(2, 3, 2 * K), *layer(K, N), expect={})


def test_activation_that_is_read_twice_stays():
    def function(linear, x, s, z, b):
        h = F.gelu(x)
        return linear(h, s, z, b), h

    check(activations, function, randn(3, K), *layer(K, N), expect={})


def test_activation_in_front_of_a_shared_sketch():
    def function(linear, x, s, z1, b1, z2, b2):
        h = F.silu(x)
        return linear(h, s, z1, b1) * 1, linear(h, s, z2, b2) * 1

    def run(graph, values):
        shared = share_sketches(graph, values)
        found = fuse_activations(graph)
        assert len(found.fusions[0].layers) == 2
        return shared, found

    sketch, *first = layer(K, N)
    check(
        run,
        function,
        randn(2, 3, K),
        sketch,
        *first,
        *layer(K, 8)[1:],
        expect={"shared": 1, "silu": 1},
        ops={"activation_sketch": 1, "matmul": 1},
    )


def test_a_write_to_the_input_of_an_activation_is_seen():
    def function(linear, x, s, z, b):
        h = x * 2
        y = F.gelu(h)
        h.zero_()
        return linear(y, s, z, b)

    check(activations, function, randn(3, K), *layer(K, N), expect={})


def test_in_place_activation_of_what_is_read_later_stays():
    def function(linear, x, s, z, b):
        h = x * 2
        rows = h.view(-1)
        return linear(torch.relu_(h), s, z, b), rows + 1

    check(activations, function, randn(3, K), *layer(K, N), expect={})


def test_a_spelt_out_activation_ends_at_its_input():
    """The input is itself a product, which must not count as part of the activation."""

    def function(linear, x, y):
        return GELU_TANH["NewGELU"](x * y)

    gm, *_ = capture(function, randn(3, K), randn(3, K))
    *_, root, _ = gm.graph.nodes
    found = find_activation(root, Order(gm.graph))
    assert found.name == "gelu_tanh"
    assert {node.name for node in found.x.all_input_nodes} == {"a0", "a1"}


# --- norms --------------------------------------------------------------------------------------


def layer_norm(x, w, b):
    return F.layer_norm(x, (K,), w, b, 1e-5)


def hf_rms_norm(x, w, b):
    h = x.to(torch.float64)
    variance = h.pow(2).mean(-1, keepdim=True)
    return w * (h * torch.rsqrt(variance + 1e-5)).to(x.dtype if not _traced(x) else torch.float64)


def _traced(x):
    return isinstance(x, torch.fx.Proxy)


def t5_rms_norm(x, w, b):
    variance = x.to(torch.float64).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-5))


NORMS = {
    "layer_norm": layer_norm,
    "layer_norm without weight": lambda x, w, b: F.layer_norm(x, (K,)),
    "torch.layer_norm": lambda x, w, b: torch.layer_norm(x, (K,), w, b),
    "rms_norm": lambda x, w, b: F.rms_norm(x, (K,), w, 1e-5),
    "rms_norm without eps": lambda x, w, b: F.rms_norm(x, (K,), w),
    "Llama": hf_rms_norm,
    "T5": t5_rms_norm,
    "square": lambda x, w, b: x * (torch.mean(x.square(), dim=-1, keepdim=True) + 1e-5).rsqrt() * w,
    "division": lambda x, w, b: x / torch.sqrt((x * x).mean(2, True) + 1e-5) * w,
    "without weight": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean((-1,), keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norm(norm):
    def function(linear, x, w, v, s, z, b):
        return linear(norm(x, w, v).view(-1, K), s, z, b)

    check(
        norms,
        function,
        randn(2, 3, K) + 1,
        randn(K),
        randn(K),
        *layer(K, N),
        expect={"norm": 1},
        ops={"norm_sketch": 1, "matmul": 1},
    )


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norm_and_sum_that_are_read_elsewhere(norm):
    def function(linear, x, r, w, v, s, z, b):
        h = x + r
        y = norm(h, w, v)
        return linear(F.dropout(y, 0.1, False), s, z, b), y * 2, h * 3

    check(
        norms,
        function,
        randn(2, 3, K),
        randn(2, 3, K) + 1,
        randn(K),
        randn(K),
        *layer(K, N),
        expect={"residual + norm": 1},
        ops={"norm_sketch": 1, "matmul": 1},
    )


@settings(deadline=None, max_examples=20)
@given(
    lead=st.sampled_from([(5,), (2, 3), (2, 1, 3), (1, 1)]),
    k=st.sampled_from([16, 40, 72]),
    reduction=st.integers(1, 4),
    read_norm=st.booleans(),
    read_sum=st.booleans(),
    rms=st.booleans(),
)
def test_any_shape_and_any_readers(lead, k, reduction, read_norm, read_sum, rms):
    def function(linear, x, r, w, s, z, b):
        h = x + r
        y = F.rms_norm(h, (k,), w, 1e-6) if rms else F.layer_norm(h, (k,), w)
        out = [linear(y, s, z, b)]
        if read_norm:
            out.append(y.exp())
        if read_sum:
            out.append(h.exp())
        return out

    gm, _ = check(
        norms,
        function,
        randn(*lead, k),
        randn(*lead, k),
        randn(k),
        *layer(k, N, reduction),
        expect={"residual + norm": 1},
    )
    (node,) = [n for n in gm.graph.nodes if n.target is torch.ops.ss1.norm_sketch.default]
    assert node.args[-1] is read_norm


NOT_NORMS = {
    "two dimensions": lambda x, w: F.layer_norm(x, (3, K)),
    "mean over rows": lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5),
    "cube": lambda x, w: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-5),
    "of another input": lambda x, w: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5),
    "through float32": lambda x, w: (
        x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    ).to(torch.float64),
    "sum": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5),
    "weight per row": lambda x, w: F.layer_norm(x, (K,)) * x[..., :1],
}


@pytest.mark.parametrize("norm", NOT_NORMS.values(), ids=NOT_NORMS)
def test_what_is_nearly_a_norm_stays(norm):
    def function(linear, x, w, s, z, b):
        return linear(norm(x, w), s, z, b)

    check(norms, function, randn(2, 3, K), randn(K), *layer(K, N), expect={}, tolerance=1e-5)


def test_weight_of_another_type_stays():
    def function(linear, x, w, s, z, b):
        return linear(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w, s, z, b)

    weight = randn(K, dtype=torch.float32)
    check(norms, function, randn(2, 3, K), weight, *layer(K, N), expect={})


def test_two_sketches_of_one_norm():
    """The second reads the norm that the first one keeps."""

    def function(linear, x, w, s1, z1, b1, s2, z2, b2):
        y = F.layer_norm(x, (K,), w)
        return linear(y, s1, z1, b1), linear(y, s2, z2, b2)

    check(
        norms,
        function,
        randn(2, 3, K),
        randn(K),
        *layer(K, N),
        *layer(K, N, seed=1),
        expect={"norm": 1},
        ops={"norm_sketch": 1, "matmul": 1, "linear": 1},
    )


def test_sum_that_is_read_before_the_norm_stays_outside():
    def function(linear, x, r, w, s, z, b):
        h = x + r
        early = h.exp()
        return linear(F.layer_norm(h, (K,), w), s, z, b), early

    check(norms, function, randn(3, K), randn(3, K), randn(K), *layer(K, N), expect={"norm": 1})


def test_sum_behind_a_view_with_readers_on_both_sides():
    """As in OPT: ``h = (x + r).reshape(-1, K)``, and ``h`` goes on as the residual."""

    def function(linear, x, r, w, s, z, b):
        h = x + r
        rows = h.reshape(-1, K)
        y = linear(F.layer_norm(rows, (K,), w), s, z, b)
        return y, rows * 2, h * 3

    check(
        norms,
        function,
        randn(2, 3, K),
        randn(2, 3, K),
        randn(K),
        *layer(K, N),
        expect={"residual + norm": 1},
    )


def test_sum_in_place():
    def dying(linear, x, r, w, s, z, b):
        h = iadd(x * 2, r)
        return linear(F.layer_norm(h, (K,), w), s, z, b), h * 2

    operands = [randn(3, K), randn(3, K), randn(K), *layer(K, N)]
    check(norms, dying, *operands, expect={"residual + norm": 1})

    def seen(linear, x, r, w, s, z, b):
        h = x * 2
        rows = h.view(-1)
        h = iadd(h, r)
        return linear(F.layer_norm(h, (K,), w), s, z, b), rows * 2

    check(norms, seen, *operands, expect={"norm": 1})


def test_writes_between_norm_and_sketch_are_seen():
    def to_the_norm(linear, x, w, s, z, b):
        y = F.layer_norm(x, (K,), w)
        y.mul_(2)
        return linear(y, s, z, b)

    operands = [randn(3, K), randn(K), *layer(K, N)]
    check(norms, to_the_norm, *operands, expect={})

    def to_the_input(linear, x, w, s, z, b):
        h = x * 2
        y = F.layer_norm(h, (K,), w)
        h.mul_(2)
        return linear(y, s, z, b), h

    gm, _ = check(norms, to_the_input, *operands, expect={"norm": 1})
    assert targets(gm) == {"norm_sketch": 1, "matmul": 1}


def test_transposed_norm_stays():
    """As in the token mixing of MLP-Mixer."""

    def function(linear, x, w, s, z, b):
        return linear(F.layer_norm(x, (3,), w).transpose(1, 2), s, z, b)

    check(norms, function, randn(2, K, 3), randn(3), *layer(K, N), expect={})
