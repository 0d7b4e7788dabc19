from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ss1_compile.errors import StructureError
from ss1_compile.kernels import reference
from ss1_compile.modules import SS1Linear
from ss1_compile.structure import SS1Structure

SIZES = [(64, 48, 4), (100, 30, 3), (37, 5, 2), (16, 7, 1)]


@pytest.fixture
def layer() -> SS1Linear:
    torch.manual_seed(0)
    return SS1Linear(SS1Structure.create(64, 48, 4))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("k", "n", "c"), SIZES)
def test_forward_weight_and_to_linear_agree_with_the_reference(k, n, c, bias):
    layer = SS1Linear(SS1Structure.create(k, n, c, seed=3), bias)
    x = torch.randn(2, 5, k)
    w = reference.materialize(layer.sketch, layer.z, k)
    assert torch.equal(layer.weight.double(), w)
    expected = reference.linear(x, layer.sketch, layer.z, layer.bias)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert (linear.bias is not None) == bias


def test_to_linear_is_independent_and_keeps_modes(layer):
    layer.eval()
    layer.z.requires_grad_(False)
    linear = layer.to_linear()
    assert not linear.training
    assert not linear.weight.requires_grad
    assert linear.bias.requires_grad
    z, bias = layer.z.clone(), layer.bias.clone()
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert torch.equal(layer.z, z)
    assert torch.equal(layer.bias, bias)


def test_attributes(layer):
    assert (layer.in_features, layer.out_features, layer.reduction) == (64, 48, 4)
    assert layer.structure == SS1Structure.create(64, 48, 4)
    assert set(dict(layer.named_parameters())) == {"z", "bias"}
    assert set(layer.state_dict()) == {"z", "bias", "sketch"}
    for text in ("in_features=64", "out_features=48", "reduction=4", "bias=True"):
        assert text in repr(layer)


def test_trains(layer):
    torch.manual_seed(1)
    target = SS1Linear(SS1Structure.create(64, 48, 4))
    x = torch.randn(256, 64)
    y = target(x).detach()
    optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
    losses = []
    for _ in range(200):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]
    torch.testing.assert_close(layer.weight, target.weight, atol=2e-2, rtol=0)


def test_gradients_equal_those_through_the_dense_weight():
    layer = SS1Linear(SS1Structure.create(50, 12, 3)).double()
    x = torch.randn(4, 50, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 12, dtype=torch.float64)
    operands = (x, layer.z, layer.bias)
    ours = torch.autograd.grad(layer(x), operands, g)
    through_w = torch.autograd.grad(nn.functional.linear(x, layer.weight, layer.bias), operands, g)
    for a, b in zip(ours, through_w, strict=True):
        torch.testing.assert_close(a, b)


def test_deepcopy_and_pickle(layer):
    x = torch.randn(3, 64)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
        assert copied.z.data_ptr() != layer.z.data_ptr()
        assert copied.structure == layer.structure
        with torch.no_grad():
            copied.z.add_(1)
        assert not torch.equal(copied(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_leave_the_sketch_alone(layer, dtype):
    code = layer.sketch.clone()
    for cast in (layer.to(dtype), SS1Linear(layer.structure, dtype=dtype)):
        assert cast.z.dtype == cast.bias.dtype == dtype
        assert cast.sketch.dtype == torch.int32
        assert torch.equal(cast.sketch, code)
        y = cast(torch.randn(3, 64, dtype=dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()
    assert layer.half().z.dtype == torch.float16
    assert layer.sketch.dtype == torch.int32


def test_state_dict_round_trip(layer):
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = SS1Linear(SS1Structure.create(64, 48, 4, seed=99))
    x = torch.randn(3, 64)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), layer(x))  # the structure came with the weights
    assert other.structure == layer.structure
    on_meta = SS1Linear(SS1Structure.create(64, 48, 4, seed=99), device="meta")
    on_meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(on_meta(x), layer(x))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda code: code + 1, "not a multiple of 8"),
        (lambda code: torch.full_like(code, 8 * 1024), "8192"),
        (lambda code: torch.full_like(code, -(2**31)), "2147483647"),
        (lambda code: code.long(), "int32"),
        (lambda code: code[0], "int32 .J, G, c."),
        (lambda code: code[:, :, :3], "shape|need"),
    ],
)
def test_a_tampered_sketch_is_refused_by_name(layer, tamper, message):
    model = nn.Sequential(nn.ReLU(), nn.ModuleDict({"inner": layer})["inner"])
    model = nn.ModuleDict({"block": model})
    state = copy.deepcopy(model.state_dict())
    state["block.1.sketch"] = tamper(state["block.1.sketch"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StructureError, match=rf"block\.1\.sketch in the state dict: .*({message})"):
        model.load_state_dict(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_missing_sketch_is_reported_as_usual(layer):
    state = layer.state_dict()
    del state["sketch"]
    with pytest.raises(RuntimeError, match=r"Missing key.*sketch"):
        layer.load_state_dict(state)


def test_construction_on_meta():
    structure = SS1Structure.create(64, 48, 4)
    with torch.device("meta"):
        in_context = SS1Linear(structure)
    for layer in (in_context, SS1Linear(structure, device="meta")):
        assert layer.z.is_meta
        assert layer.bias.is_meta
        assert layer.sketch.is_meta
        assert layer(torch.empty(2, 64, device="meta")).shape == (2, 48)
        with pytest.raises(StructureError, match="on meta"):
            layer.structure  # noqa: B018
        layer.to_empty(device="cpu").load_state_dict(SS1Linear(structure).state_dict())
        assert layer.structure == structure


def test_from_tensors_wraps_without_copying():
    structure = SS1Structure.create(64, 48, 4)
    z = nn.Parameter(torch.randn(48, structure.reduced_features), requires_grad=False)
    bias = nn.Parameter(torch.randn(48))
    layer = SS1Linear.from_tensors(structure, z, bias)
    assert layer.z is z
    assert layer.bias is bias
    assert layer.structure == structure
    layer.sketch.zero_()  # the layer has its own copy of the code
    assert structure == SS1Structure.create(64, 48, 4)
    assert SS1Linear.from_tensors(structure, z, None).bias is None


def test_from_tensors_refuses_wrong_shapes():
    structure = SS1Structure.create(64, 48, 4)
    good = nn.Parameter(torch.zeros(48, 16))
    with pytest.raises(StructureError, match=r"z must be \[48, 16\].*got \[48, 64\]"):
        SS1Linear.from_tensors(structure, nn.Parameter(torch.zeros(48, 64)), None)
    with pytest.raises(StructureError, match=r"the bias \[48\].*got .*\[16\]"):
        SS1Linear.from_tensors(structure, good, nn.Parameter(torch.zeros(16)))


def test_construction_does_not_disturb_the_random_state():
    structure = SS1Structure.create(64, 48, 4)
    before = torch.get_rng_state()
    SS1Linear.from_tensors(structure, nn.Parameter(torch.zeros(48, 16)), None)
    assert torch.equal(torch.get_rng_state(), before)


def test_functional_call(layer):
    x = torch.randn(3, 64)
    z, bias = torch.randn_like(layer.z), torch.zeros(48, requires_grad=True)
    y = functional_call(layer, {"z": z, "bias": bias}, (x,))
    expected = reference.linear(x, layer.sketch, z)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.square().sum(), bias)
    torch.testing.assert_close(gradient, 2 * y.sum(0))
    assert layer.bias.grad is None


def test_initialised_like_a_dense_linear():
    torch.manual_seed(0)
    layer = SS1Linear(SS1Structure.create(1024, 512, 4))
    linear = nn.Linear(1024, 512)
    bound = 1 / 32
    for ours, theirs in ((layer.weight, linear.weight), (layer.bias, linear.bias)):
        assert ours.abs().max() <= bound
        assert ours.abs().max() > 0.98 * bound
        assert abs(ours.std() / theirs.std() - 1) < 0.1
        assert abs(ours.mean()) < 0.1 * bound
    x = torch.randn(256, 1024)
    assert abs(layer(x).std() / linear(x).std() - 1) < 0.05


def test_wrong_input_width_is_an_error(layer):
    with pytest.raises(RuntimeError, match="input features"):
        layer(torch.randn(2, 80))
    with pytest.raises(RuntimeError, match="float64"):
        layer(torch.randn(2, 64, dtype=torch.float64))
