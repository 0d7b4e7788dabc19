"""Steps that are recorded in CUDA graphs are those that run one by one."""

import copy

import pytest
import torch
from test_healing import Stack, bert, masked_batches

import ss1_compile
from ss1_compile.errors import ConfigError
from ss1_compile.healing.state import STATE_FILE

pytest.importorskip("accelerate")
gpu = pytest.mark.gpu


def compressed(teacher, batches):
    model = copy.deepcopy(teacher)
    ss1_compile.compress(
        model, calibration=batches, reduction=2, warn_error=10.0, projection="learned",
        progress=False,
    )  # fmt: skip
    return model


def agree(model, twin):
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: name + m)


def test_graphs_need_cuda():
    teacher = Stack()
    batches = [torch.randn(24, 32)]
    with pytest.raises(ConfigError, match="cuda_graphs.*is on cpu"):
        ss1_compile.heal(compressed(teacher, batches), teacher, batches, cuda_graphs=True)


@gpu
@pytest.mark.parametrize(
    ("compile", "materialize"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_recorded_steps_are_those_of_the_eager_model(compile, materialize):
    torch.manual_seed(0)
    teacher = Stack().cuda()
    batches = [torch.randn(rows, 32) for rows in (24, 24, 16, 24, 16)]
    model = compressed(teacher, [batch.cuda() for batch in batches])
    twin = copy.deepcopy(model)
    # Adam's first steps have the size of the rate, whatever the gradients: few and small ones
    options = {
        "steps": 8, "block_steps": 4, "learning_rate": 1e-4, "progress": False,
        "precision": "float32",
    }  # fmt: skip
    first = ss1_compile.heal(model, teacher, batches, **options)
    second = ss1_compile.heal(
        twin, teacher, batches, cuda_graphs=True, compile=compile, materialize=materialize,
        **options,
    )  # fmt: skip
    agree(model, twin)
    for a, b in zip(first.curve, second.curve, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@gpu
def test_recorded_steps_of_a_transformer_with_padding():
    teacher = bert().cuda()
    batches = masked_batches()
    batches.append({**batches[0], "attention_mask": torch.ones(3, 9, dtype=torch.bool)})
    model = compressed(teacher, [{k: v.cuda() for k, v in b.items()} for b in batches])
    twin = copy.deepcopy(model)
    options = {"steps": 10, "learning_rate": 1e-4, "progress": False, "precision": "float32"}
    ss1_compile.heal(model, teacher, batches, **options)
    ss1_compile.heal(twin, teacher, batches, cuda_graphs=True, **options)
    agree(model, twin)


@gpu
def test_what_cannot_be_recorded_runs_as_it_is():
    class Waiting(Stack):
        def forward(self, x):
            assert x.sum().item() is not None
            return super().forward(x)

    teacher = Waiting().cuda()
    batches = [torch.randn(24, 32), torch.randn(16, 32)]
    model = compressed(teacher, [batch.cuda() for batch in batches])
    twin = copy.deepcopy(model)
    options = {"steps": 4, "learning_rate": 1e-4, "progress": False, "precision": "float32"}
    ss1_compile.heal(model, teacher, batches, **options)
    with pytest.warns(ss1_compile.SS1Warning, match="without CUDA graphs") as caught:
        ss1_compile.heal(twin, teacher, batches, cuda_graphs=True, **options)
    assert len([w for w in caught if "CUDA graphs" in str(w.message)]) == 1
    agree(model, twin)


@gpu
def test_recorded_steps_go_on_from_a_state(tmp_path):
    torch.manual_seed(0)
    teacher = Stack().cuda()
    batches = [torch.randn(rows, 32) for rows in (24, 16, 24)]
    model = compressed(teacher, [batch.cuda() for batch in batches])
    twin = copy.deepcopy(model)
    options = {
        "steps": 8, "learning_rate": 1e-4, "progress": False, "precision": "float32",
        "cuda_graphs": True, "save_every": 3, "evaluate_every": 5,
    }  # fmt: skip
    ss1_compile.heal(model, teacher, batches, metric=lambda m: 0.0, **options)

    def interrupt(m):
        if (tmp_path / STATE_FILE).is_file():
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        ss1_compile.heal(twin, teacher, batches, metric=interrupt, directory=tmp_path, **options)
    ss1_compile.heal(twin, teacher, batches, metric=lambda m: 0.0, directory=tmp_path, **options)
    agree(model, twin)
