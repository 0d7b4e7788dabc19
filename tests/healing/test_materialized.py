"""Layers with their dense weights: the same function and gradients, and one form for all blocks."""

import copy

import pytest
import torch
from test_healing import Stack, bert, masked_batches
from torch import nn

import ss1_compile
from ss1_compile.healing.materialized import DenseForm, Materialized
from ss1_compile.learned import LearnedStructure
from ss1_compile.modules import SS1Linear, put_layer
from ss1_compile.structure import SS1Structure

pytest.importorskip("accelerate")
CHOICES = ((16, 3, 1), (32, 5, 2), (12, 2, 3))  # of group size, rank and column blocks


def model_of_many_forms(blocks=3):
    """Blocks whose sketches differ, one of them dense in part."""
    model = Stack()
    model.blocks.extend(copy.deepcopy(model.blocks[0]) for _ in range(blocks - 2))
    for i, block in enumerate(model.blocks):
        for j, name in enumerate(("up", "down")):
            if (i, j) == (1, 0):
                continue
            old = getattr(block, name)
            size, rank, hashes = CHOICES[(i + j) % 3]
            structure = LearnedStructure(old.in_features, old.out_features, size, rank, hashes)
            put_layer(model, f"blocks.{i}.{name}", SS1Linear(structure))
    return model.eval()


def run(model, x, form=None):
    model.zero_grad()
    if form is None:
        y = model(x)
        y.square().sum().backward()
    else:
        with form.in_place():
            form.make_weights()
            y = model(x)
            y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_the_function_and_the_gradients_are_those_of_the_layers():
    torch.manual_seed(0)
    model = model_of_many_forms().double()
    before = dict(model.named_modules())
    form = Materialized(model, [f"blocks.{i}" for i in range(3)])
    x = torch.randn(5, 32, dtype=torch.float64)
    wanted, gradients = run(model, x)
    found, same = run(model, x, form)
    torch.testing.assert_close(found, wanted)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        torch.testing.assert_close(same[name], gradient, msg=lambda m, name=name: name + m)
    assert dict(model.named_modules()) == before
    with form.in_place():
        kinds = [type(m) for m in model.modules() if isinstance(m, SS1Linear | nn.Linear)]
        assert kinds == [nn.Linear]  # the head, which is in no block
        assert sum(isinstance(m, DenseForm) for m in model.modules()) == 6


def test_layers_are_found_wherever_they_are_and_rotations_left_alone():
    torch.manual_seed(1)
    shared = nn.Linear(32, 32)
    rotation = SS1Linear(SS1Structure.create(32, 32, reduction=2, block_k=8))
    model = nn.Sequential(shared, rotation, nn.ReLU(), shared).double()
    form = Materialized(model, [])
    with form.in_place():
        assert [type(m) for m in model] == [DenseForm, SS1Linear, nn.ReLU, DenseForm]
        assert model[0] is model[3]
    x = torch.randn(3, 32, dtype=torch.float64)
    wanted, gradients = run(model, x)
    found, same = run(model, x, form)
    torch.testing.assert_close(found, wanted)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient)


def test_weights_are_in_the_dtype_of_autocast():
    model = model_of_many_forms()
    form = Materialized(model, ["blocks.1"])
    with form.in_place(), torch.autocast("cpu", torch.bfloat16):
        form.make_weights()
        weights = [m.weight for m in model.modules() if isinstance(m, DenseForm)]
        assert [w.dtype for w in weights] == [torch.bfloat16] * 2
        assert not any(isinstance(w, nn.Parameter) for w in weights)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_healing_ends_at_nearly_the_same_weights(checkpointing):
    torch.manual_seed(0)
    teacher = bert()
    batches = masked_batches()
    model = copy.deepcopy(teacher)
    ss1_compile.compress(
        model, calibration=batches, reduction=2, warn_error=10.0, projection="learned",
        progress=False,
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # so that there is much to heal
    twin = copy.deepcopy(model)
    options = {"steps": 3, "learning_rate": 1e-4, "train": "all", "progress": False}
    first = ss1_compile.heal(model, teacher, batches, **options)
    second = ss1_compile.heal(
        twin, teacher, batches, materialize=True, gradient_checkpointing=checkpointing, **options
    )
    assert second.curve[0]["loss"] == pytest.approx(first.curve[0]["loss"], rel=1e-4)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if not name.endswith("key.bias"):  # it changes nothing: its gradient is rounding alone
            close = (a - b).abs() < 2e-5
            assert close.float().mean() > 0.98, name  # others of no effect are taken in stride
    assert {type(m) for m in twin.modules()} == {type(m) for m in model.modules()}


def test_blocks_of_all_forms_are_compiled_once(monkeypatch):
    torch._dynamo.reset()  # which sizes are dynamic is remembered from earlier tests
    torch.manual_seed(0)
    model, teacher = model_of_many_forms(4), Stack()
    teacher.blocks.extend(copy.deepcopy(teacher.blocks[0]) for _ in range(2))
    batches = [torch.randn(24, 32).requires_grad_()]  # as what an embedding gives
    seen = []

    def count(graph, inputs):
        seen.append([i.shape for i in inputs])
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=count))
    twin = copy.deepcopy(model)
    ss1_compile.heal(model, teacher, batches, steps=2, train="all", progress=False)
    ss1_compile.heal(
        twin, teacher, batches, steps=2, train="all", compile=True, materialize=True, progress=False
    )
    blocks = [shapes for shapes in seen if len(shapes) == 7]  # x, the norm's two, two linears' four
    # the teacher's, whose first input alone has a gradient, and the student's
    assert len(blocks) == 3
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
