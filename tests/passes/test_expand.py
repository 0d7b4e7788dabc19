"""Layers in other forms become ``aten.linear`` and views that compute the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from ss1_compile.passes import expand_linears, find_sites, inline_checkpoints
from ss1_compile.passes.frozen import example

aten = torch.ops.aten


def graph_of(target, *args, frozen, **kwargs):
    """A module that calls ``target``, its inputs, and its frozen placeholders."""
    graph, values, nodes = fx.Graph(), [], []

    def placeholder(value):
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"a{len(values)}")
        node.meta["example_value"] = value
        values.append(value)
        if any(value is other for other in frozen):
            nodes.append(node)
        return node

    def placed(value):
        return [placeholder(v) for v in value] if isinstance(value, list) else placeholder(value)

    args = tuple(placed(value) for value in args)
    out = graph.call_function(target, args, kwargs)
    out.meta["example_value"] = target(*fx.map_arg(args, example), **kwargs)
    graph.output(out)
    return fx.GraphModule({}, graph), values, nodes


def check(gm, values, nodes, shape):
    """The expansion computes the same and holds one site of ``shape``."""
    expected = gm(*values)
    asked = []
    assert expand_linears(gm.graph, nodes, lambda *a: asked.append(a[1:]) or True) == 1
    gm.graph.lint()
    gm.recompile()
    actual = gm(*values)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    (site,), skipped = find_sites(gm.graph, nodes)
    assert not skipped
    assert asked == [shape] == [site.shape]
    for node in gm.graph.nodes:
        if node.op == "call_function":
            assert isinstance(example(node), torch.Tensor)
    return actual, expected


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1), (1, 0.5), (-3, 2)])
@pytest.mark.parametrize("bias", [(24,), (5, 24), (1,)])
def test_addmm(alpha, beta, bias):
    weight = randn(40, 24)
    made = graph_of(
        torch.addmm, randn(*bias), randn(5, 40), weight, frozen=[weight], alpha=alpha, beta=beta
    )
    check(*made, (24, 40))


@pytest.mark.parametrize("beta", [0, 1])
def test_addmm_that_needs_nothing_or_ignores_its_bias_is_kept(beta):
    weight = randn(40, 24)
    gm, _, nodes = graph_of(
        torch.addmm, randn(24), randn(5, 40), weight, frozen=[weight], alpha=1, beta=beta
    )
    assert expand_linears(gm.graph, nodes, lambda *_: True) == 0


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 2, 3]), st.booleans(), st.booleans(), st.integers(1, 3), st.booleans())
def test_pointwise_convolution(spatial, bias, batched, stride, atenop):
    target = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[spatial]
    if atenop:
        target = getattr(aten, f"conv{spatial}d").default
        batched = True
    weight = randn(24, 40, *[1] * spatial)
    x = randn(*([2] if batched else []), 40, *range(3, 3 + spatial))
    args = (x, weight, randn(24) if bias else None, [stride] * spatial)
    outputs = check(*graph_of(target, *args, frozen=[weight]), (24, 40))
    assert all(output.is_contiguous() for output in outputs)


def test_decomposed_pointwise_convolution():
    weight = randn(24, 40, 1, 1)
    args = (randn(2, 40, 3, 3), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    check(*graph_of(aten.convolution.default, *args, frozen=[weight]), (24, 40))


@pytest.mark.parametrize(
    "rest", [(None, 1, 1), (None, 1, 0, 1, 2), (None, (1, 1), (0, 1)), (None, 1, "same")]
)
def test_other_convolutions_are_kept(rest):
    groups = rest[-1] if len(rest) == 5 else 1
    size = 3 if "same" in rest else 1
    weight = randn(24, 40 // groups, size, size)
    gm, _, nodes = graph_of(torch.conv2d, randn(2, 40, 5, 5), weight, *rest, frozen=[weight])
    assert expand_linears(gm.graph, nodes, lambda *_: True) == 0


EINSUMS = {
    "btd,df->btf": ((2, 5, 40), (40, 24), (24, 40)),
    "btd,fd->btf": ((2, 5, 40), (24, 40), (24, 40)),
    "btd,fd->bft": ((2, 5, 40), (24, 40), (24, 40)),
    "btd, dhk -> bthk": ((2, 5, 40), (40, 4, 6), (24, 40)),
    "btd,dhk->bhtk": ((2, 5, 40), (40, 4, 6), (24, 40)),
    "bthk,hkd->btd": ((2, 5, 4, 10), (4, 10, 24), (24, 40)),
    "bhtk,khd->tbd": ((2, 4, 5, 10), (10, 4, 24), (24, 40)),
    "d,df->f": ((40,), (40, 24), (24, 40)),
    "...d,df->...f": ((2, 5, 40), (40, 24), (24, 40)),
    "d...,fd->...f": ((40, 2, 5), (24, 40), (24, 40)),
}


@pytest.mark.parametrize("equation", EINSUMS)
@pytest.mark.parametrize("form", ["torch", "weight first", "aten"])
def test_einsum(equation, form):
    of_x, of_w, shape = EINSUMS[equation]
    x, weight = randn(*of_x), randn(*of_w)
    args = (equation, x, weight)
    target = torch.einsum
    if form == "weight first":
        terms, out = equation.split("->")
        args = (",".join(reversed(terms.split(","))) + "->" + out, weight, x)
    elif form == "aten":
        target, args = aten.einsum.default, (equation, [x, weight])
    check(*graph_of(target, *args, frozen=[weight]), shape)


@pytest.mark.parametrize(
    ("of_x", "of_w", "dims"),
    [
        ((2, 5, 40), (40, 24), 1),
        ((5, 4, 10), (4, 10, 24), 2),
        ((2, 5, 40), (24, 40), ([-1], [1])),
        ((4, 5, 10), (10, 24, 4), ((0, 2), (2, 0))),
    ],
)
@pytest.mark.parametrize("form", ["torch", "weight first", "aten"])
def test_tensordot(of_x, of_w, dims, form):
    x, weight = randn(*of_x), randn(*of_w)
    if form == "torch":
        gm = graph_of(torch.tensordot, x, weight, dims=dims, frozen=[weight])
    else:
        if isinstance(dims, int):
            dims = (range(x.dim() - dims, x.dim()), range(dims))
        args = (x, weight, *map(tuple, dims))
        if form == "weight first":
            args = (weight, x, *map(tuple, reversed(dims)))
        gm = graph_of(aten.tensordot.default, *args, frozen=[weight])
    check(*gm, (24, 40))


@pytest.mark.parametrize(
    ("equation", "of_x", "of_w"),
    [
        ("btd,df->bf", (2, 5, 40), (40, 24)),  # a sum over tokens as well
        ("btd,de->btde", (2, 5, 40), (40, 24)),  # nothing is summed over
        ("...d,...df->...f", (2, 5, 40), (5, 40, 24)),  # a weight per token
        ("abtd,abdf->abtf", (2, 2, 5, 40), (2, 2, 40, 24)),  # groups in two dimensions
        ("tdd,df->tf", (5, 40, 40), (40, 24)),
    ],
)
def test_other_einsums_are_kept_with_a_reason(equation, of_x, of_w):
    weight = randn(*of_w)
    gm, _, nodes = graph_of(torch.einsum, equation, randn(*of_x), weight, frozen=[weight])
    assert expand_linears(gm.graph, nodes, lambda *_: True) == 0
    sites, (skipped,) = find_sites(gm.graph, nodes)
    assert not sites
    assert equation in skipped.reason


@pytest.mark.parametrize(
    "equation", ["gtd,gdf->gtf", "tgd,gdf->gtf", "tgd,fgd->tfg", "gt...d,gdf->gt...f"]
)
def test_a_weight_per_group_becomes_bmm(equation):
    sizes = {"g": 4, "t": 5, "d": 40, "f": 24}
    of_x, of_w = equation.split("->")[0].replace("...", "").split(",")
    x, weight = (randn(*(sizes[i] for i in term)) for term in (of_x, of_w))
    gm, values, nodes = graph_of(torch.einsum, equation, x, weight, frozen=[weight])
    expected = gm(*values)
    asked = []
    assert expand_linears(gm.graph, nodes, lambda *a: asked.append(a[1:]) or True) == 1
    gm.recompile()
    torch.testing.assert_close(gm(*values), expected, rtol=1e-9, atol=1e-9)
    (site,), skipped = find_sites(gm.graph, nodes)
    assert not skipped
    assert site.operands.per_group
    assert asked == [(24, 40)] == [site.shape]


def test_unwanted_layers_keep_their_form():
    weight = randn(40, 24)
    gm, _, nodes = graph_of(torch.einsum, "td,df->tf", randn(5, 40), weight, frozen=[weight])
    before = str(gm.graph)
    assert expand_linears(gm.graph, nodes, lambda *_: False) == 0
    assert str(gm.graph) == before


def test_checkpoints_are_inlined_also_inside_others():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 40)

        def inner(self, x):
            return torch.utils.checkpoint.checkpoint(self.second, x, use_reentrant=False).relu()

        def outer(self, x):
            return self.inner(self.first(x)), x.sum()

        def forward(self, x):
            y, total = torch.utils.checkpoint.checkpoint(self.outer, x, use_reentrant=False)
            return y * total

    seen = []

    def backend(gm, inputs):
        assert inline_checkpoints(gm) == 2
        gm.graph.lint()
        gm.recompile()
        seen.append(gm)
        return gm

    model, x = Model(), torch.randn(5, 40)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    names = {n.name for n in seen[0].graph.nodes if n.op == "placeholder" and "self" in n.name}
    sites, skipped = find_sites(seen[0].graph, [n for n in seen[0].graph.nodes if n.name in names])
    assert len(sites) == 2
    assert not skipped
