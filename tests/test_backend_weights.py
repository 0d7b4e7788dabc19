"""``backend="ss1"`` sees the weights as they are: changed, replaced, shared, gone."""

import copy
import gc
import weakref

import pytest
import torch
from backend_support import D, Mlp, assert_same, compiled, in_place, ss1_of
from torch import nn

from ss1_compile import Report
from ss1_compile import binding as binding_module


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counted(monkeypatch):
    """Counts projections."""
    calls = []
    real = binding_module.project_layer

    def project(*args, **kwargs):
        calls.append(kwargs["name"])
        return real(*args, **kwargs)

    monkeypatch.setattr(binding_module, "project_layer", project)
    return calls


def test_second_instance_reuses_the_graph_with_its_own_weights(counted):
    first, second = Mlp().eval(), Mlp().eval()
    x = torch.randn(4, D)
    report = Report()

    @torch.compile(
        backend="ss1", options={"inner_backend": "eager", "report": report, "warn_error": 2.0}
    )
    def call(model, x):
        return model(x)

    with torch.no_grad():
        call(first, x)
        assert_same(call(second, x), ss1_of(second)(x))
        assert_same(call(first, x), ss1_of(first)(x))


def new_parameter(model):
    model.up.weight = nn.Parameter(torch.randn_like(model.up.weight))


def new_data(model):
    model.up.weight.data = torch.randn_like(model.up.weight)


def load_state(model):
    model.load_state_dict(Mlp().state_dict())


def load_state_assign(model):
    model.load_state_dict(Mlp().state_dict(), assign=True)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize(
    "change", [in_place, new_parameter, new_data, load_state, load_state_assign]
)
def test_changed_weights_are_seen(change, inner):
    model, x = Mlp().eval(), torch.randn(4, D)
    fast = compiled(model, inner)
    with torch.no_grad():
        before = fast(x)
        change(model)
        after = fast(x)
        assert_same(after, ss1_of(model)(x))
        assert not torch.allclose(before, after)


def test_unchanged_weights_are_projected_once(counted):
    model = Mlp().eval()
    fast = compiled(model)
    with torch.no_grad():
        for rows in (2, 3, 4, 5):  # recompiles for a dynamic batch on the way
            fast(torch.randn(rows, D))
    assert sorted(counted) == ["down", "up"]


def test_projections_die_with_their_weights():
    gc.collect()
    before = len(binding_module._bound)
    model = Mlp().eval()
    with torch.no_grad():
        compiled(model)(torch.randn(2, D))
    assert len(binding_module._bound) == before + 2
    z = weakref.ref(next(reversed(binding_module._bound.values())).projection.z)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(binding_module._bound) == before
    assert z() is None


def test_weights_of_a_given_structure_are_recovered_exactly():
    small = ss1_of(Mlp().eval(), reduction=4, seed=9, block_k=8)
    structures = {name: small.get_submodule(name).structure for name in ("up", "down")}
    dense = copy.deepcopy(small)
    for name in structures:
        dense.set_submodule(name, small.get_submodule(name).to_linear())
    report, x = Report(), torch.randn(3, D)
    with torch.no_grad():
        fast = compiled(dense, structures=structures, report=report, warn_error=1e-5)
        assert_same(fast(x), small(x))
    assert all(row.exact for row in report.compressed)
