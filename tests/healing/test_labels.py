"""The text's own next tokens beside the teacher's outputs."""

import copy

import pytest
import torch

import ss1_compile
from ss1_compile.errors import ConfigError
from ss1_compile.healing.loss import Distillation, label_loss

pytest.importorskip("accelerate")


def test_next_tokens_against_float64():
    logits = torch.randn(3, 7, 11, dtype=torch.float64)
    ids = torch.randint(11, (3, 7))
    likely = logits.softmax(-1)
    lost = torch.tensor(
        [[-likely[b, t, ids[b, t + 1]].log() for t in range(6)] for b in range(3)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(label_loss(logits, ids).double(), lost.mean(), rtol=1e-5, atol=1e-6)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    wanted = (lost[0].sum() + lost[1, :3].sum()) / 9
    torch.testing.assert_close(label_loss(logits, ids, mask).double(), wanted, rtol=1e-5, atol=1e-6)


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_model_gets_to_know_the_text():
    teacher = llama()
    torch.manual_seed(1)
    text = [{"input_ids": torch.arange(12).remainder(5).repeat(4, 1) + 3} for _ in range(2)]
    model = copy.deepcopy(teacher)
    ss1_compile.compress(
        model, calibration=text, reduction=2, warn_error=10.0, projection="learned", progress=False
    )
    with torch.no_grad():
        parts = [
            Distillation(model, teacher, 0.0, None, weight).end_to_end(text[0])
            for weight in (0.0, 1.0, 0.5)
        ]
        lost = label_loss(model(**text[0]).logits, text[0]["input_ids"])
    torch.testing.assert_close(parts[1] - parts[0], lost)
    torch.testing.assert_close(parts[2] - parts[0], lost / 2)
    options = {"steps": 30, "metric": "perplexity", "held_out": text, "progress": False}
    faithful = ss1_compile.heal(copy.deepcopy(model), teacher, text, **options).figures
    taught = ss1_compile.heal(model, teacher, text, label_weight=1.0, **options).figures
    assert taught[1] < 0.8 * faithful[1]


def test_models_without_next_tokens_are_refused():
    from test_healing import bert, masked_batches

    teacher = bert()
    model = copy.deepcopy(teacher)
    ss1_compile.compress(
        model, calibration=masked_batches(), reduction=2, warn_error=10.0, projection="learned",
        progress=False,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="label_weight needs a language model"):
        ss1_compile.heal(
            model, teacher, masked_batches(), steps=1, label_weight=1.0, progress=False
        )
    with pytest.raises(ConfigError, match="label_weight"):
        ss1_compile.HealConfig(label_weight=-1.0)
