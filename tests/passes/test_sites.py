"""Every spelling of a linear layer is found or refused with a reason, on hand-built graphs."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from ss1_compile.passes import find_sites
from ss1_compile.passes.frozen import example

N, K, M = 24, 40, 6


def trace(function, **frozen):
    """A graph of ``function(x, *frozen)``; returns it with its frozen placeholders."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = frozen.pop("x", torch.randn(M, K))
    nodes = []
    for name, value in frozen.items():
        node = graph.placeholder(name)
        node.meta["example_value"] = value
        nodes.append(node)
    graph.output(function(graph, x, *nodes))
    for node in graph.nodes:  # shapes, as Dynamo would record them
        if "example_value" in node.meta or node.op == "output":
            continue
        values = fx.map_arg(node.args, example), fx.map_arg(node.kwargs, example)
        if node.op == "call_method":
            result = getattr(values[0][0], node.target)(*values[0][1:], **values[1])
        else:
            result = node.target(*values[0], **values[1])
        node.meta["example_value"] = result
    return graph, nodes


def call(target, *args, **kwargs):
    if isinstance(target, str):
        return lambda graph: graph.call_method(target, args, kwargs)
    return lambda graph: graph.call_function(target, args, kwargs)


NK, KN, B = torch.randn(N, K), torch.randn(K, N), torch.randn(N)

SPELLINGS = {
    "F.linear": (lambda g, x, w, b: call(F.linear, x, w, b)(g), {"w": NK, "b": B}),
    "F.linear bias=": (lambda g, x, w, b: call(F.linear, x, w, bias=b)(g), {"w": NK, "b": B}),
    "C linear": (lambda g, x, w: call(torch._C._nn.linear, x, w)(g), {"w": NK}),
    "aten.linear": (
        lambda g, x, w, b: call(torch.ops.aten.linear.default, x, w, b)(g),
        {"w": NK, "b": B},
    ),
    "addmm [K, N]": (lambda g, x, w, b: call(torch.addmm, b, x, w)(g), {"w": KN, "b": B}),
    "aten.addmm t": (
        lambda g, x, w, b: call(
            torch.ops.aten.addmm.default, b, x, call(torch.ops.aten.t.default, w)(g)
        )(g),
        {"w": NK, "b": B},
    ),
    "mm": (lambda g, x, w: call(torch.mm, x, w)(g), {"w": KN}),
    "aten.mm": (lambda g, x, w: call(torch.ops.aten.mm.default, x, w)(g), {"w": KN}),
    "matmul t()": (lambda g, x, w: call(torch.matmul, x, call("t", w)(g))(g), {"w": NK}),
    "@ .T": (lambda g, x, w: call(operator.matmul, x, call(getattr, w, "T")(g))(g), {"w": NK}),
    "method matmul": (lambda g, x, w: call("matmul", x, w)(g), {"w": KN}),
    "cast": (lambda g, x, w: call(F.linear, x, call("to", w, torch.float32)(g))(g), {"w": NK}),
    "transpose": (
        lambda g, x, w: call(torch.matmul, x, call(torch.transpose, w, 0, 1)(g))(g),
        {"w": NK},
    ),
    "weight first": (
        lambda g, x, w: call(torch.mm, w, call("t", x)(g))(g),
        {"w": NK},
    ),
    "inner": (lambda g, x, w: call(torch.inner, x, w)(g), {"w": NK}),
    "method inner": (lambda g, x, w: call("inner", x, w)(g), {"w": NK}),
    "aten.inner": (lambda g, x, w: call(torch.ops.aten.inner.default, x, w)(g), {"w": NK}),
    "linalg.matmul": (lambda g, x, w: call(torch.linalg.matmul, x, w)(g), {"w": KN}),
    "aten.linalg_matmul": (
        lambda g, x, w: call(torch.ops.aten.linalg_matmul.default, x, w)(g),
        {"w": KN},
    ),
    "mv": (lambda g, x, w: call(torch.mv, w, x)(g), {"x": torch.randn(K), "w": NK}),
    "addmv": (
        lambda g, x, w, b: call(torch.addmv, b, w, x)(g),
        {"x": torch.randn(K), "w": NK, "b": B},
    ),
    "method addmv": (
        lambda g, x, w, b: call("addmv", b, w, x)(g),
        {"x": torch.randn(K), "w": NK, "b": B},
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_found(name):
    graph, frozen = trace(SPELLINGS[name][0], **SPELLINGS[name][1])
    sites, skipped = find_sites(graph, frozen)
    assert not skipped
    (site,) = sites
    assert site.shape == (N, K)
    # The operands reproduce the node, whatever its spelling.
    dense = site.weight.function()(frozen[0].meta["example_value"])
    if site.operands.weight_is_kn:
        dense = dense.t()
    x = site.operands.x.meta["example_value"]
    if site.operands.x_is_right:
        x = x.t()
    bias = site.bias.function()(frozen[1].meta["example_value"]) if site.bias else None
    expected = site.node.meta["example_value"]
    actual = F.linear(x, dense, bias)
    torch.testing.assert_close(actual.t() if site.operands.x_is_right else actual, expected)
    assert (site.bias is not None) == ("b" in SPELLINGS[name][1])


def test_chunked_weight_gives_a_site_per_part():
    def function(g, x, w):
        q, k = (call(operator.getitem, call("chunk", w, 2)(g), i)(g) for i in range(2))
        return call(torch.add, call(F.linear, x, q)(g), call(F.linear, x, k)(g))(g)

    graph, frozen = trace(function, w=NK)
    sites, skipped = find_sites(graph, frozen)
    assert [site.shape for site in sites] == [(N // 2, K), (N // 2, K)]
    assert not skipped
    parts = [site.weight.function()(NK) for site in sites]
    torch.testing.assert_close(torch.cat(parts), NK)
    assert sites[0].weight.key != sites[1].weight.key


REFUSED = {
    "alpha": (
        lambda g, x, w, b: call(torch.addmm, b, x, w, alpha=2)(g),
        {"w": KN, "b": B},
        "alpha or beta",
    ),
    "einsum": (lambda g, x, w: call(torch.einsum, "mk,nk->mn", x, w)(g), {"w": NK}, "einsum"),
    "baddbmm": (
        lambda g, x, w: call(torch.baddbmm, x, w, x)(g),
        {"x": torch.randn(2, K, K), "w": torch.randn(2, K, K)},
        "weight on the left",
    ),
    "3-D matmul": (
        lambda g, x, w: call(torch.matmul, x, w)(g),
        {"x": torch.randn(2, M, K), "w": torch.randn(2, K, N)},
        "3 dimensions",
    ),
    "1x1 convolution": (
        lambda g, x, w: call(torch.conv2d, x, w)(g),
        {"x": torch.randn(1, K, 4, 4), "w": torch.randn(N, K, 1, 1)},
        "1×1 convolution",
    ),
    "addmv alpha": (
        lambda g, x, w, b: call(torch.addmv, b, w, x, alpha=2)(g),
        {"x": torch.randn(K), "w": NK, "b": B},
        "alpha or beta",
    ),
    "inner, weight first": (lambda g, x, w: call(torch.inner, w, x)(g), {"w": NK}, "on the left"),
    "tensordot": (
        lambda g, x, w: call(torch.tensordot, x, w, dims=([1], [1]))(g),
        {"w": NK},
        "contraction",
    ),
    "vecdot": (
        lambda g, x, w: call(torch.linalg.vecdot, x, w)(g),
        {"x": torch.randn(N, K), "w": NK},
        "contraction",
    ),
    "addbmm": (
        lambda g, x, w, v: call(torch.addbmm, v, x, w)(g),
        {"x": torch.randn(2, K, K), "w": torch.randn(2, K, K), "v": torch.randn(K, K)},
        "contraction",
    ),
    "chain_matmul": (
        lambda g, x, w: call(torch.ops.aten.chain_matmul.default, [x, w])(g),
        {"w": KN},
        "chain",
    ),
    "multi_dot": (lambda g, x, w: call(torch.linalg.multi_dot, [x, w])(g), {"w": KN}, "chain"),
    "int8": (
        lambda g, x, w: call(torch._int_mm, x, w)(g),
        {"x": torch.ones(32, K, dtype=torch.int8), "w": torch.ones(K, N, dtype=torch.int8)},
        "quantised",
    ),
    "constant": (lambda g, x, w, v: call(torch.mm, w, v)(g), {"w": NK, "v": KN}, "constant"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    function, frozen, reason = REFUSED[name]
    sites, skipped = find_sites(*trace(function, **frozen))
    assert not sites
    assert reason in skipped[0].reason
    assert len(skipped) == 1


def test_weight_that_is_no_frozen_input_is_refused():
    def function(g, x, w):
        return call(F.linear, x, call(torch.mul, w, 2.0)(g))(g)

    sites, skipped = find_sites(*trace(function, w=NK))
    assert not sites
    assert "computed in the graph" in skipped[0].reason


@pytest.mark.parametrize(
    "other",
    [
        lambda g, w: g.call_function(F.embedding, (torch.tensor([1]), w)),
        lambda g, w: g.call_method("add_", (w, 1.0)),
        lambda g, w: g.call_function(torch.sum, (g.call_method("t", (w,)),)),
    ],
)
def test_weight_with_another_use_stays_dense(other):
    def function(g, x, w):
        used = other(g, w)
        return (call(F.linear, x, w)(g), used)

    sites, skipped = find_sites(*trace(function, w=NK.clone()))
    assert not sites
    assert "also used by" in skipped[0].reason


def test_weight_used_by_two_linears_is_two_sites():
    def function(g, x, w):
        return (call(F.linear, x, w)(g), call(F.linear, x, w)(g))

    sites, skipped = find_sites(*trace(function, w=NK))
    assert len(sites) == 2
    assert not skipped


def test_products_of_activations_and_real_convolutions_are_nobody_s_business():
    def function(g, x, w):
        scores = call(torch.matmul, x, call("t", x)(g))(g)
        return (scores, w)

    assert find_sites(*trace(function, w=NK)) == ([], [])


@pytest.mark.parametrize("overload", [False, True])
def test_custom_operators_that_take_a_weight_have_a_reason(overload):
    with torch.library._scoped_library("ss1_sites_test", "FRAGMENT") as library:
        library.define("odd(Tensor x, Tensor w) -> Tensor")
        library.impl("odd", lambda x, w: x @ w.t(), "CompositeExplicitAutograd")
        target = torch.ops.ss1_sites_test.odd
        target = target.default if overload else target
        sites, (skipped,) = find_sites(*trace(lambda g, x, w: call(target, x, w)(g), w=NK))
    assert not sites
    assert "custom operator" in skipped.reason
    assert skipped.weight.root.name == "w"
