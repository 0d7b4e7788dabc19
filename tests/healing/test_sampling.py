"""Texts that a language model samples: from its own distribution, repeatable, of full length."""

import pytest
import torch
from torch import nn

import ss1_compile
from ss1_compile.errors import ConfigError

transformers = pytest.importorskip("transformers")


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.layers:
            for p in block.parameters():
                p.mul_(4)
        model.lm_head.weight.mul_(30)  # far from uniform
    return model


def test_pairs_of_tokens_are_as_frequent_as_the_model_says():
    model, count = llama(), 6000
    model.train()
    state = torch.get_rng_state()
    batches = ss1_compile.sample_texts(model, count, 4, batch=700, at_once=2500, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert model.config.use_cache
    assert [len(b["input_ids"]) for b in batches] == [700] * 8 + [400]
    ids = torch.cat([b["input_ids"] for b in batches])
    assert ids.shape == (count, 4)
    assert ids.dtype == torch.int64
    assert (ids[:, 0] == 1).all()
    # the second is uniform but for the special ones, the third follows it as the model says
    allowed = torch.tensor([i for i in range(13) if i not in (1, 2)])
    with torch.no_grad():
        prompts = torch.stack([torch.ones_like(allowed), allowed], 1)
        logits = model.eval()(prompts).logits[:, -1].double()
    logits[:, [1, 2]] = -torch.inf
    wanted = torch.zeros(13, 13, dtype=torch.float64)
    wanted[allowed] = logits.softmax(-1) / len(allowed)
    found = torch.zeros(13, 13, dtype=torch.float64)
    found.index_put_((ids[:, 1], ids[:, 2]), torch.tensor(1 / count).double(), accumulate=True)
    # the variation distance of so many samples from so few cells is below 0.05 but once in 1e6
    assert (found - wanted).abs().sum() / 2 < 0.1
    uniform = (wanted > 0) / (wanted > 0).sum()
    assert (uniform - wanted).abs().sum() / 2 > 0.2


def test_the_seed_decides():
    model = llama()
    first, again, other = (
        torch.cat([b["input_ids"] for b in ss1_compile.sample_texts(model, 9, 12, seed=seed)])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_prompts_are_continued():
    model = llama()
    prompts = torch.tensor([[3, 4, 5], [6, 7, 8]])
    (batch,) = ss1_compile.sample_texts(model, 30, 8, prompts=prompts, at_once=7)
    beginnings = batch["input_ids"][:, :3].unique(dim=0)
    assert torch.equal(beginnings, prompts)


def test_a_model_is_healed_on_its_own_texts_alone():
    pytest.importorskip("accelerate")
    import copy

    teacher = llama()
    batches = ss1_compile.sample_texts(teacher, 48, 16, batch=16)
    model = copy.deepcopy(teacher)
    ss1_compile.compress(
        model, calibration=batches, reduction=2, warn_error=10.0, exclude=("lm_head",),
        projection="learned", progress=False,
    )  # fmt: skip
    unseen = ss1_compile.sample_texts(teacher, 16, 16, seed=9)
    result = ss1_compile.heal(
        model, teacher, batches, steps=40, learning_rate=3e-3, held_out=unseen, progress=False
    )
    before, after = result.figures
    assert 1 - after < 0.8 * (1 - before)


def test_bad_input_is_named():
    model = llama()
    with pytest.raises(ConfigError, match="Sequential cannot sample texts"):
        ss1_compile.sample_texts(nn.Sequential(nn.Linear(2, 2)), 1, 4)
    for options, name in (
        ({"count": 0}, "count"), ({"batch": 0}, "batch"), ({"at_once": 1.5}, "at_once"),
        ({"temperature": 0.0}, "temperature"), ({"length": 2}, "length"),
        ({"prompts": torch.zeros(2, 3)}, "prompts"),
        ({"prompts": torch.zeros(2, 8, dtype=torch.int64)}, "length"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^{name} must be"):
            ss1_compile.sample_texts(model, **{"count": 4, "length": 8, **options})
