"""The passes together: their order, when none is run, and what hinders a fusion."""

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, check, layer, randn

from ss1_compile.passes.fuse import fuse, why_not
from ss1_compile.passes.order import Order, written

K = 32


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def block(linear, x, w, *operands):
    """A pre-norm attention-like block: q, k, v; out; gate, up; down."""
    q, k, v, out, gate, up, down = (operands[i : i + 3] for i in range(0, len(operands), 3))
    h = F.rms_norm(x, (K,), w, 1e-6)
    h = linear(h, *q) * linear(h, *k).sigmoid() + linear(h, *v).tanh()
    x = x + linear(h, *out)
    h = F.rms_norm(x, (K,), w, 1e-6)
    return x + linear(F.silu(linear(h, *gate)) * linear(h, *up), *down)


def operands():
    layers = [layer(K, K) for _ in range(4)]
    layers += [layer(K, 48), layer(K, 48), layer(48, K)]
    return [randn(2, 3, K), randn(K), *(operand for triple in layers for operand in triple)]


def test_a_whole_block():
    check(
        fuse,
        block,
        *operands(),
        expect={"shared": 2, "gated silu": 1, "residual": 2, "norm": 2},
        ops={"norm_sketch": 2, "activation_sketch": 1, "sketch": 1, "matmul": 4},
    )


def test_a_second_run_finds_nothing():
    gm, _, values = capture(block, *operands())
    fuse(gm.graph, values)
    gm.recompile()
    code = gm.code
    assert all(len(result) == 0 for result in fuse(gm.graph, values))
    gm.recompile()
    assert gm.code == code


def test_an_addition_goes_to_the_product_in_front_of_it():
    """Where there is none, because that linear stayed dense, it goes to the norm behind it."""

    def sparse(linear, x, w, s1, z1, b1, s2, z2, b2):
        h = x + linear(x.sin(), s1, z1, b1)
        return linear(F.layer_norm(h, (K,), w), s2, z2, b2), h * 2

    inputs = [randn(3, K), randn(K), *layer(K, K), *layer(K, K)]
    check(fuse, sparse, *inputs, expect={"residual": 1, "norm": 1})

    def dense(linear, x, w, v, s, z, b):
        h = x + x.sin() @ v
        return linear(F.layer_norm(h, (K,), w), s, z, b), h * 2

    inputs = [randn(3, K), randn(K), randn(K, K), *layer(K, K)]
    check(fuse, dense, *inputs, expect={"residual + norm": 1})


def test_none_is_run_with_gradients_or_under_autocast():
    gm, _, values = capture(block, *operands())
    code = gm.code
    with torch.enable_grad():
        assert why_not(gm.graph) == "gradients are on"
        assert fuse(gm.graph, values) == ()
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not(gm.graph) == "autocast is on"
        assert fuse(gm.graph, values) == ()
    gm.recompile()
    assert gm.code == code
    assert why_not(gm.graph) is None


@pytest.mark.parametrize(
    ("target", "args", "reason"),
    [
        (torch._C._set_grad_enabled, (True,), "gradients are turned on inside"),
        (torch._C._set_grad_enabled, (False,), None),
        (
            torch.amp.autocast_mode._enter_autocast,
            ("cpu", torch.bfloat16, True, None),
            "autocast is turned on inside",
        ),
        (torch.amp.autocast_mode._enter_autocast, ("cpu", None, False, None), None),
    ],
)
def test_regions_inside_the_graph(target, args, reason):
    gm, *_ = capture(block, *operands())
    first = next(node for node in gm.graph.nodes if node.op == "call_function")
    with gm.graph.inserting_before(first):
        gm.graph.call_function(target, args)
    assert why_not(gm.graph) == reason


def test_no_layer_no_passes():
    gm, *_ = capture(lambda linear, x: F.gelu(x) + x, randn(3, K))
    assert why_not(gm.graph) == "it holds no SS1 layer"


# --- writes in place ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda x: x.mul_(2), True),
        (lambda x: torch.relu_(x), True),
        (lambda x: F.silu(x, inplace=True), True),
        (lambda x: F.silu(x, True), True),
        (lambda x: F.silu(x), False),
        (lambda x: F.dropout(x, 0.5, False, True), False),
        (lambda x: F.dropout(x, 0.5, True, True), True),
        (lambda x: torch.add(x, 1), False),
        (lambda x: x.__repr__ and x.t(), False),
        (lambda x: torch.ops.aten.add_.Tensor(x, x), True),
        (lambda x: torch.ops.aten.add.Tensor(x, x), False),
        (lambda x: torch.neg(x, out=x), True),
    ],
)
def test_what_writes(write, expected):
    graph = torch.fx.symbolic_trace(lambda x: write(x)).graph
    (node,) = [n for n in graph.nodes if n.op.startswith("call")]
    assert bool(written(node)) is expected


def test_every_operator_in_place_counts():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for name in dir(operator):
        if name.startswith("__i") and name not in ("__index__", "__inv__", "__invert__"):
            node = graph.call_function(getattr(operator, name), (x, x))
            assert written(node) == ([x] if name != "__iconcat__" else []), name


def test_a_write_of_unknown_reach_holds_everything():
    gm, *_ = capture(lambda linear, x: (x + 1).relu() * 2, randn(3, K))
    add, _, mul = [n for n in gm.graph.nodes if n.op.startswith("call")]
    assert Order(gm.graph).may_move([add], add, mul)
    with gm.graph.inserting_before(mul):
        gm.graph.call_method("mul_", (gm.graph.call_function(torch.ops.aten.alias, (add,)), 2))
    assert not Order(gm.graph).may_move([add], add, mul)
