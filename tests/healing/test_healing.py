"""Healing: it helps, resumes exactly, leaves everything else alone, and says what is wrong."""

import copy

import pytest
import torch
from torch import nn

import ss1_compile
from ss1_compile.errors import CalibrationError, CheckpointError, ConfigError, TrainingError
from ss1_compile.healing.loss import Distillation, blocks_of, output_loss
from ss1_compile.healing.state import STATE_FILE

pytest.importorskip("accelerate")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(self.up(self.norm(x)).relu()))


class Stack(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    teacher = Stack().eval()
    mixing = torch.randn(16, 32)
    batches = [torch.randn(24, 16) @ mixing for _ in range(8)]
    model = copy.deepcopy(teacher)
    ss1_compile.compress(
        model, calibration=batches, projection="learned", reduction=4, exclude=("head",),
        warn_error=10.0, weigh_outputs=False, progress=False,  # there is the more to heal
    )  # fmt: skip
    return model, teacher, batches, [torch.randn(24, 16) @ mixing for _ in range(4)]


def heal(case, **options):
    model, teacher, batches, held_out = case
    model = copy.deepcopy(model)
    options = {"steps": 60, "learning_rate": 3e-3, "progress": False, **options}
    return model, ss1_compile.heal(model, teacher, batches, held_out=held_out, **options)


@pytest.mark.parametrize("blocks", [0, 40])
def test_the_cosine_on_unseen_inputs_climbs(case, blocks):
    before = {name: p.clone() for name, p in case[1].state_dict().items()}
    model, result = heal(case, block_steps=blocks, evaluate_every=30)
    start, end = result.figures
    assert 1 - end < 0.6 * (1 - start)
    with torch.no_grad():
        x = torch.cat(case[3])
        cosine = nn.functional.cosine_similarity(model(x), case[1](x), dim=-1).mean().item()
    assert cosine == pytest.approx(end, abs=1e-5)
    assert result.steps == 60 + blocks
    phases = [entry["phase"] for entry in result.curve]
    assert phases == sorted(phases)  # blocks, then model
    assert {"blocks", "model"} >= set(phases)
    assert ("blocks" in phases) == bool(blocks)
    losses = [e["loss"] for e in result.curve if e["phase"] == "model" and e["loss"] is not None]
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], p) for name, p in case[1].state_dict().items())
    assert "cosine" in str(result)
    assert f"{end:.4f}" in str(result)


def test_only_the_small_parts_are_trained_and_flags_come_back(case):
    model, teacher, batches, _ = case
    model = copy.deepcopy(model).train()
    model.blocks[0].up.z.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = ss1_compile.heal(model, teacher, batches, steps=3, progress=False)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(before) - {"head.weight"}
    assert result.trained == sum(before[name].numel() for name in changed)
    assert not model.blocks[0].up.z.requires_grad
    assert model.head.weight.requires_grad
    assert model.training
    assert model.blocks[1].dropout.training
    assert all(p.grad is None for p in model.parameters())
    assert result.figures is None
    ss1_compile.heal(model, teacher, batches, steps=1, train="all", progress=False)
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_the_same_seed_gives_the_same_model_also_when_resumed(case, tmp_path):
    once, whole = heal(case, steps=40, block_steps=10, seed=3)
    again, _ = heal(case, steps=40, block_steps=10, seed=3)
    other, _ = heal(case, steps=40, block_steps=10, seed=4)

    class Interrupted(Exception):
        pass

    calls = 0

    def metric(model):
        nonlocal calls
        calls += 1
        if calls == 4:  # at the beginning, after the blocks, at step 20, and at step 40
            raise Interrupted
        return 0.0

    options = {
        "steps": 40, "block_steps": 10, "seed": 3, "evaluate_every": 20, "save_every": 10,
        "directory": tmp_path,
    }  # fmt: skip
    with pytest.raises(Interrupted):
        heal(case, metric=metric, **options)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    resumed, result = heal(case, metric=lambda model: 1.0, **options)
    assert result.steps == 50
    assert [e["step"] for e in result.curve if e["loss"] is not None] == [10, 20, 30, 40, 50]
    assert [e["step"] for e in whole.curve if e["loss"] is not None] == [10, 20, 30, 40, 50]
    for (name, a), b, c, d in zip(
        once.named_parameters(), again.parameters(), resumed.parameters(), other.parameters(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name
        assert torch.equal(a, d) == (name == "head.weight"), name


def test_states_of_other_runs_are_refused(case, tmp_path):
    heal(case, steps=5, directory=tmp_path)
    with pytest.raises(CheckpointError, match="learning_rate"):
        heal(case, steps=5, learning_rate=1e-4, directory=tmp_path)
    model, teacher, batches, _ = case
    with pytest.raises(CheckpointError, match=r"number of batches \(8, now 7\)"):
        ss1_compile.heal(
            copy.deepcopy(model), teacher, batches[:7], steps=5, learning_rate=3e-3,
            directory=tmp_path, progress=False,
        )  # fmt: skip
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        heal(case, steps=5, directory=tmp_path)


def test_16_bit_models_train_in_float32_and_autocast(case):
    model, teacher, batches, _ = case
    model = copy.deepcopy(model).bfloat16()
    dense = copy.deepcopy(teacher).bfloat16()
    batches = [batch.bfloat16() for batch in batches]
    result = ss1_compile.heal(
        model, dense, batches, steps=60, learning_rate=3e-3, precision="bfloat16", progress=False,
        held_out=batches[:2],
    )  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert result.figures[1] > result.figures[0]
    with pytest.raises(ConfigError, match="16 bits"):
        ss1_compile.heal(model, dense, batches, steps=1, precision="float32", progress=False)


def test_losses_against_float64():
    a, b = torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = b.softmax(-1), a.softmax(-1)
    wanted = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(output_loss(a, b, True).double(), wanted, rtol=1e-5, atol=1e-6)
    cosine = ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean()
    wanted = 1 - cosine + (a - b).square().sum() / b.square().sum()
    torch.testing.assert_close(output_loss(a, b, False).double(), wanted, rtol=1e-5, atol=1e-6)


def test_block_by_block_keeps_gradients_inside_the_block(case):
    model, teacher, batches, _ = case
    model = copy.deepcopy(model)
    assert list(blocks_of(model)) == ["blocks.0", "blocks.1"]
    loss = Distillation(model, teacher, 1.0, None).block_by_block(batches[0])
    # each block on the dense hidden state: the mean of what each loses there
    x, errors = batches[0], []
    for mine, dense in zip(model.blocks, teacher.blocks, strict=True):
        wanted = dense(x)
        errors.append((mine(x) - wanted).square().sum() / wanted.square().sum())
        x = wanted.detach()
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    loss.backward()
    (alone,) = torch.autograd.grad(errors[0] / 2, model.blocks[0].up.z)
    torch.testing.assert_close(model.blocks[0].up.z.grad, alone)


def test_gradient_checkpointing_changes_nothing_but_memory():
    teacher = bert()
    batches = [{"input_ids": ids} for ids in torch.randint(50, (4, 3, 9))]
    model = copy.deepcopy(teacher)
    ss1_compile.compress(
        model, calibration=batches, reduction=2, warn_error=10.0, projection="learned",
        progress=False,
    )  # fmt: skip
    twin = copy.deepcopy(model)
    for one, checkpointing in ((model, False), (twin, True)):
        ss1_compile.heal(
            one, teacher, batches, steps=3, gradient_checkpointing=checkpointing, progress=False
        )
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in twin.modules())


def test_bad_input_is_named(case):
    model, teacher, batches, _ = case
    quantised = copy.deepcopy(model)
    ss1_compile.quantize(quantised, quantization="int8_weight_only")
    with pytest.raises(ConfigError, match=r"is quantised \(int8_weight_only\).*heal, then quan"):
        ss1_compile.heal(quantised, teacher, batches)
    with pytest.raises(ConfigError, match="no SS1 layers"):
        ss1_compile.heal(teacher, teacher, batches)
    with pytest.raises(CalibrationError, match="no batches"):
        ss1_compile.heal(model, teacher, [])
    with pytest.raises(ConfigError, match="learning_rate"):
        ss1_compile.heal(model, teacher, batches, learning_rat=1.0)
    with pytest.raises(ConfigError, match="gradient_checkpointing_enable"):
        heal(case, gradient_checkpointing=True)
    one = nn.Sequential(copy.deepcopy(model.blocks[0]))
    with pytest.raises(ConfigError, match="block_steps"):
        ss1_compile.heal(one, teacher.blocks[0], batches, block_steps=2)
    for bad in (
        {"steps": 0}, {"steps": -1}, {"steps": 1.5}, {"learning_rate": 0}, {"clip": float("inf")},
        {"train": "none"}, {"precision": "float16"}, {"save_every": 0},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            ss1_compile.HealConfig(**bad)
    with pytest.raises(TrainingError, match="learning_rate"):
        ss1_compile.heal(
            copy.deepcopy(model), teacher, [b * float("nan") for b in batches], steps=2,
            progress=False,
        )  # fmt: skip


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def masked_batches():
    lengths = torch.tensor([9, 4, 6])
    masks = [torch.arange(t) < lengths[:, None] for t in (9, 9, 12, 10)]
    return [{"input_ids": torch.randint(50, m.shape), "attention_mask": m} for m in masks]


def test_padding_does_not_count():
    teacher = bert()
    model = copy.deepcopy(teacher)
    (batch, *_), width = masked_batches(), 32
    ss1_compile.compress(
        model, calibration=[batch], reduction=2, warn_error=10.0, projection="learned",
        progress=False,
    )  # fmt: skip
    loss = Distillation(model, teacher, 0.7, None).end_to_end(batch)
    keep = batch["attention_mask"]
    with torch.no_grad():
        batch["output_hidden_states"] = True
        mine, dense = (one(**batch).hidden_states[1:] for one in (model, teacher))
    errors = []
    for a, b in zip(mine, dense, strict=True):
        a, b = (t.double()[keep].reshape(-1, width) for t in (a, b))
        errors.append((a - b).square().sum() / b.square().sum())
    wanted = output_loss(mine[-1][keep], dense[-1][keep], False) + 0.7 * torch.stack(errors).mean()
    torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-4, atol=1e-6)


def compile_with_little(monkeypatch):
    """Let ``torch.compile`` leave out the slow compiler; what it was called on."""
    real, functions = torch.compile, []

    def compile_little(function, **options):
        functions.append(function)
        return real(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_little)
    return functions


def test_compiled_steps_are_those_of_the_eager_model(case, monkeypatch):
    functions = compile_with_little(monkeypatch)
    options = {"steps": 4, "block_steps": 2}
    model, first = heal(case, **options)
    assert not functions
    twin, second = heal(case, compile=True, **options)
    assert len(functions) == 2 * 2 + 2  # the blocks of both models, and two losses
    assert second.figures == pytest.approx(first.figures, abs=1e-5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    for module in (*twin.modules(), *case[1].modules()):
        assert "forward" not in vars(module)


@pytest.mark.slow
def test_compiled_steps_of_a_transformer_with_padding_and_checkpointing(monkeypatch):
    compile_with_little(monkeypatch)
    teacher = bert()
    model = copy.deepcopy(teacher)
    batches = masked_batches()
    ss1_compile.compress(
        model, calibration=batches, reduction=2, warn_error=10.0, projection="learned",
        progress=False,
    )  # fmt: skip
    options = {"steps": 3, "gradient_checkpointing": True, "progress": False}
    twin = copy.deepcopy(model)
    ss1_compile.heal(model, teacher, batches, **options)
    ss1_compile.heal(twin, teacher, batches, compile=True, **options)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_steps_compiled_for_real(case):
    options = {"steps": 4}
    model, _ = heal(case, **options)
    twin, _ = heal(case, compile=True, **options)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_compiler_that_fails_is_done_without(case, monkeypatch):
    def broken(function, **options):
        def fail(*args, **kwargs):
            raise RuntimeError("no C compiler\nfound")

        return fail

    eager, _ = heal(case, steps=3)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(ss1_compile.SS1Warning, match="without torch.compile.*no C compiler$"):
        model, result = heal(case, steps=3, compile=True)
    assert result.steps == 3
    for a, b in zip(eager.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_cache_of_keys_and_values_is_filled():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    teacher = transformers.LlamaForCausalLM(config).eval()
    model = copy.deepcopy(teacher)
    batches = [{"input_ids": torch.randint(40, (2, 8))} for _ in range(2)]
    ss1_compile.compress(
        model, calibration=batches, reduction=2, warn_error=10.0, exclude=("lm_head",),
        progress=False, projection="learned",
    )  # fmt: skip
    seen = []
    for one in (model, teacher):
        one.register_forward_hook(lambda module, args, result: seen.append(result.past_key_values))
    ss1_compile.heal(model, teacher, batches, steps=2, progress=False)
    assert seen == [None] * 4
    assert model.config.use_cache
    assert teacher.config.use_cache
