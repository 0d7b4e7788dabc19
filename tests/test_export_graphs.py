"""``compress_exported`` on graphs it was not written for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from export_support import D, Mlp, Tied, assert_same, exported, kinds, ss1
from torch import nn
from torch.export import Dim
from torch.export.graph_signature import InputKind

import ss1_compile
from ss1_compile import (
    SS1Config,
    UnhandledLinearError,
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- graphs it was not written for ----------------------------------------------------------------


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))
        self.register_buffer("table", torch.randn(D, D))
        self.register_buffer("fleeting", torch.randn(D, D), persistent=False)
        self.plain = torch.randn(D, D)

    def forward(self, x):
        return (self.weight @ x.t()).t() @ self.table @ self.fleeting @ self.plain


@pytest.mark.parametrize("decompose", [False, True])
def test_weights_on_the_left_buffers_and_constants(decompose):
    model, x = Constant(), torch.randn(5, D)
    ep = exported(model, x, decompose=decompose)
    new, report = ss1(ep, reduction=1)
    assert_same(new.module()(x), model(x))
    assert [row.name for row in report.compressed] == ["weight", "table", "fleeting", "plain"]
    assert kinds(new)["z"] == InputKind.PARAMETER
    assert {kinds(new)[f"{n}_z"] for n in ("table", "fleeting", "plain")} == {InputKind.BUFFER}
    assert not set(new.constants) & {"fleeting", "plain"}
    new.run_decompositions()


class Strided(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(D, D)

    def forward(self, x):
        return self.out(x.transpose(0, 1))


@pytest.mark.parametrize("dynamic", [None, {"x": {1: Dim("b", min=2, max=64)}}])
def test_linear_on_a_strided_input_decomposes_to_bmm_and_is_found(dynamic):
    model, x = Strided(), torch.randn(6, 3, D)
    ep = exported(model, x, decompose=True, dynamic_shapes=dynamic)
    assert torch.ops.aten.bmm.default in {node.target for node in ep.graph.nodes}
    new, report = ss1(ep, reduction=1)
    assert [row.op for row in report.compressed] == ["aten.bmm"]
    assert "out.weight" not in new.state_dict
    assert_same(new.module()(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_tied_linears_share_one_z(strict):
    model, x = Tied(embedding=False), torch.randn(5, D)
    new, report = ss1(exported(model, x, strict=strict), reduction=4)
    assert [row.name for row in report.compressed] == ["first", "second"]
    assert len([name for name in new.state_dict if name.endswith("z")]) == 1
    assert not [name for name in new.state_dict if name.endswith("weight")]
    structure = SS1Config().structure_for("", D, D)
    weight = structure.materialize(ss1_compile.project(model.first.weight, structure).z)
    assert_same(new.module()(x), F.linear(x @ weight.t(), weight, model.second.bias))


@pytest.mark.parametrize("strict", [False, True])
def test_weight_tied_to_an_embedding_stays_dense(strict):
    ep = exported(Tied(embedding=True), torch.tensor([1, 2]), strict=strict)
    new, report = ss1(ep, allow_empty=True)
    assert [row.name for row in report.left] == ["second"]
    assert "embedding" in report["second"].reason
    new.validate()


class Control(nn.Module):
    def __init__(self):
        super().__init__()
        self.quiet = nn.Linear(D, D)
        self.yes = nn.Linear(D, D)
        self.free = nn.Linear(D, D)

    def forward(self, x):
        with torch.no_grad():
            y = self.quiet(x)
        z = torch.cond(x.sum() > 0, lambda t: self.yes(t), lambda t: t.clone(), (y,))
        return self.free(z)


def test_linears_inside_bodies_are_reported():
    model, x = Control(), torch.randn(3, D)
    ep = exported(model, x)
    new, report = ss1(ep, reduction=1)
    assert [row.name for row in report] == ["quiet", "yes", "free"]
    assert [row.name for row in report.compressed] == ["free"]
    assert "cond" in report["yes"].reason
    assert_same(new.module()(x), model(x))
    with pytest.raises(UnhandledLinearError, match="quiet"):
        ss1(ep, strict=True)


class Moving(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.randn(D, D))
        self.fixed = nn.Linear(D, D)

    def forward(self, x):
        y = self.fixed(x) @ self.w
        self.w.copy_(x.t() @ x)
        return y


def test_a_weight_that_the_program_writes_stays_dense():
    model, x = Moving(), torch.randn(3, D)
    for decompose in (False, True):
        ep = exported(copy.deepcopy(model), x, decompose=decompose)
        new, report = ss1(ep, reduction=1)
        assert [row.name for row in report.compressed] == ["fixed"]
        assert [row.name for row in report.left] == ["w"]
        module, expected = new.module(), copy.deepcopy(model)
        for _ in range(2):
            assert_same(module(x), expected(x))


def test_outputs_and_preserved_submodules_keep_their_names():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Mlp()
            self.last = nn.Linear(D, D)

        def forward(self, input):
            y = self.inner(input)
            return {"y": y, "z": self.last(y)}

    model, x = Outer(), torch.randn(3, D)
    ep = exported(model, x, preserve_module_call_signature=("inner",))
    new, _ = ss1(ep, reduction=1)
    assert new.graph_signature.user_outputs == ep.graph_signature.user_outputs
    assert new.graph_signature.user_inputs == ep.graph_signature.user_inputs
    flat = torch.export.unflatten(new)
    assert_same(flat(x)["z"], model(x)["z"])
    assert tuple(flat.inner.up.z.shape) == (2 * D, D)
