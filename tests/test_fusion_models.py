"""Fused equals unfused on real architectures, and what is fused in each of them, counted."""

import copy
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ss1_compile
from ss1_compile import Report, SS1Linear, SS1Warning, fusion
from ss1_compile.learned import LearnedStructure
from ss1_compile.modules import put_layer
from ss1_compile.report import LayerReport

transformers = pytest.importorskip("transformers")

SLOW = pytest.mark.slow
LAYERS = 2
TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 120,
}


def bert(layers=LAYERS):
    return transformers.BertModel(transformers.BertConfig(**{**TEXT, "num_hidden_layers": layers}))


def gpt2(layers=LAYERS):
    sizes = {"vocab_size": 97, "n_embd": 64, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_layer=layers))


def llama(layers=LAYERS):
    config = {**TEXT, "num_hidden_layers": layers, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def phi3(layers=LAYERS):
    """Gate and up are one layer."""
    config = {**TEXT, "num_hidden_layers": layers, "num_key_value_heads": 2, "pad_token_id": 0}
    config |= {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**config))


def vit(layers=LAYERS):
    sizes = {name: size for name, size in TEXT.items() if name != "vocab_size"}
    sizes |= {"num_hidden_layers": layers, "image_size": 32, "patch_size": 8}
    return transformers.ViTModel(transformers.ViTConfig(**sizes))


class MixerBlock(nn.Module):
    def __init__(self, tokens=64, channels=64):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(tokens, 96), nn.GELU(), nn.Linear(96, tokens))
        self.channels = nn.Sequential(
            nn.Linear(channels, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, channels)
        )

    def forward(self, x):
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


def mixer(layers=LAYERS):
    return nn.Sequential(*(MixerBlock() for _ in range(layers)))


class Decoder(nn.Module):
    """Pre-norm cross-attention: keys and values read the memory, the query the normed state."""

    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, memory):
        q, k, v = self.q(self.norm(x)), self.k(memory), self.v(memory)
        return x + self.out(F.scaled_dot_product_attention(q, k, v))


MODELS = {f.__name__: f for f in (bert, gpt2, llama, vit, mixer)}
COUNTS = {
    # the embedding's norm and both of each layer, but the last is the output
    "bert": {
        "shared": LAYERS,
        "norm": 2 * LAYERS,
        "gelu": LAYERS,
        "residual": 2 * LAYERS,
        "joined": LAYERS,
    },
    "gpt2": {
        "norm": 2 * LAYERS,
        "gelu_tanh": LAYERS,
        "residual": 2 * LAYERS,
        "joined": LAYERS,
    },
    # and the norm in front of the head; a gated activation reads two products, which stay
    "llama": {
        "shared": 2 * LAYERS,
        "norm": 2 * LAYERS + 1,
        "gated silu": LAYERS,
        "residual": 2 * LAYERS,
    },
    "vit": {
        "shared": LAYERS,
        "norm": 2 * LAYERS,
        "gelu": LAYERS,
        "residual": 2 * LAYERS,
        "joined": LAYERS,
    },
    # token mixing works on transposed tensors, so that its addition goes to the norm behind it
    "mixer": {
        "residual + norm": LAYERS,
        "gelu": 2 * LAYERS,
        "residual": LAYERS,
        "joined": 2 * LAYERS,
    },
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(name, dtype=torch.float32):
    torch.manual_seed(3)
    model = (MODELS | {"phi3": phi3})[name]().eval().to(dtype)
    if name == "mixer":
        return model, {"input": torch.randn(2, 64, 64, dtype=dtype)}
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 32, 32, dtype=dtype)}
    return model, {"input_ids": torch.randint(0, 97, (2, 11))}


def output(model, inputs):
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


def compiled(model, inner="eager", **options):
    options = {"inner_backend": inner, "warn_error": 2.0, "fuse": True, **options}
    return torch.compile(model, backend="ss1", options=options)


def assert_same(actual, expected, dtype=torch.float32):
    actual, expected = actual.double(), expected.double()
    assert ((actual - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]


def fused_around(report):
    """What was fused, counted once for each group of layers that shares a sketch or is joined."""
    found = Counter()
    for row in report:
        shared = [what for what in row.fused if what.startswith("shared")]
        group = 1 + len(shared[0].split(",")) if shared else 1
        found["shared"] += bool(shared) / group
        for what in row.fused:
            if what.startswith("joined"):
                found["joined"] += 1 / (1 + len(what.split(",")))
            elif what not in shared:
                found[what] += (1 / group) if "norm" in what else 1
    return {what: round(number) for what, number in found.items() if number}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_fused_equals_unfused(name, dtype):
    model, inputs = make(name, dtype)
    expected = output(compiled(model, fuse=False), inputs)
    report = Report()
    actual = output(compiled(model, "aot_eager", report=report), inputs)
    assert_same(actual, expected, dtype)
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    assert fused_around(report) == COUNTS[name]


INDUCTOR = [
    pytest.param(name, dtype, marks=() if (name, dtype) == ("llama", torch.float32) else SLOW)
    for name in ("bert", "gpt2", "llama", "vit")
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("name", "dtype"), INDUCTOR)
def test_fused_equals_unfused_through_inductor(name, dtype):
    model, inputs = make(name, dtype)
    expected = output(compiled(model, fuse=False), inputs)
    assert_same(output(compiled(model, "inductor"), inputs), expected, dtype)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compressed_models_fuse_alike(name):
    """Each layer holds its own sketch there; equal ones are recognised by their values."""
    model, inputs = make(name)
    ss1_compile.compress(model, reduction=4, warn_error=2.0, progress=False)
    expected = output(model, inputs)
    names = [n for n, m in model.named_modules() if isinstance(m, ss1_compile.SS1Linear)]
    report = Report([LayerReport(n, "Linear", (1, 1), 1, 1) for n in names])
    options = {"include": (), "allow_empty": True, "report": report}
    assert_same(output(compiled(model, "aot_eager", **options), inputs), expected)
    assert fused_around(report) == COUNTS[name]


def learned(model):
    """Random learned layers; those of one parent and input size share their blocks."""
    first = {}
    for name, module in list(model.named_modules()):
        if "head" in name or not isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D):
            continue
        sizes = module.weight.shape
        n, k = sizes if isinstance(module, nn.Linear) else sizes[::-1]
        layer = SS1Linear(LearnedStructure(k, n, 16, 8), module.bias is not None)
        layer.to(module.weight.dtype).eval()
        shared = first.setdefault((name.rpartition(".")[0], k), layer)
        layer.sketch.data.copy_(shared.sketch.data)
        put_layer(model, name, layer)
    return [name for name, module in model.named_modules() if isinstance(module, SS1Linear)]


LEARNED = {
    "gpt2": {"norm": 4, "gelu_tanh behind": 2, "residual": 4, "joined": 2},
    "llama": {"shared": 4, "norm": 4, "gated silu": 2, "residual": 4, "joined": 2},
    "phi3": {"norm": 4, "gated silu": 2, "residual": 4, "joined": 2},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gpt2", torch.float32), ("llama", torch.bfloat16), ("phi3", torch.float32)],
)
def test_learned_sketches_are_joined_with_the_products_in_front(name, dtype):
    model, inputs = make(name, dtype)
    report = Report([LayerReport(n, "Linear", (1, 1), 1, 1) for n in learned(model)])
    expected = output(model, inputs)
    options = {"include": (), "allow_empty": True, "report": report}
    assert_same(output(compiled(model, **options), inputs), expected, dtype)
    assert fused_around(report) == LEARNED[name]
    if name == "llama":
        row = report["model.layers.0.mlp.down_proj"]
        assert row.fused == ("residual", "gated silu", "joined with gate_proj, up_proj")


def test_dynamic_batch_and_sequence():
    model, _ = make("llama")
    plain = copy.deepcopy(model)
    ss1_compile.compress(plain, reduction=4, warn_error=2.0, progress=False)
    graphs = []

    def inner(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.register_backend(inner, name="counting")
    try:
        fast = compiled(model, "counting")
        for batch, length in ((2, 11), (3, 11), (4, 7), (5, 9)):
            ids = torch.randint(0, 97, (batch, length))
            torch._dynamo.mark_dynamic(ids, 0)
            torch._dynamo.mark_dynamic(ids, 1)
            assert_same(output(fast, {"input_ids": ids}), output(plain, {"input_ids": ids}))
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("counting")
        torch._dynamo.backends.registry._BACKENDS.pop("counting", None)
    assert len(graphs) == 1
    norms = [n for n in graphs[0].graph.nodes if n.target is torch.ops.ss1.norm_sketch.default]
    assert len(norms) == COUNTS["llama"]["norm"]


def test_cross_attention_shares_keys_and_values():
    model, x, memory = Decoder().eval(), torch.randn(2, 5, 64), torch.randn(2, 7, 64)
    report = Report()
    with torch.no_grad():
        expected = compiled(model, fuse=False)(x, memory)
        assert_same(compiled(model, "aot_eager", report=report)(x, memory), expected)
    assert {row.name: row.fused for row in report} == {
        "q": ("norm",),
        "k": ("shared with v",),
        "v": ("shared with k",),
        "out": ("residual",),
    }
    assert "fused: shared with v" in str(report)
    assert report.to_dict()["layers"][0]["fused"] == ("norm",)


# --- where nothing is fused ---------------------------------------------------------------------


class Plain(nn.Module):
    """None of the patterns: no norm, no residual, an activation that the kernels do not know."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def codes(model, x, **options):
    found = []

    def inner(gm, example_inputs):
        found.append(gm.code)
        return gm.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(inner, name="code")
    try:
        result = compiled(model, "code", **options)(x)
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("code")
        torch._dynamo.backends.registry._BACKENDS.pop("code", None)
    return found, result.detach()


def test_a_model_without_the_patterns_is_untouched():
    model, x, report = Plain().eval(), torch.randn(3, 64), Report()
    with torch.no_grad():
        fused, actual = codes(model, x, report=report)
        plain, expected = codes(model, x, fuse=False)
    assert fused == plain
    assert torch.equal(actual, expected)
    assert [row.fused for row in report] == [(), ()]


def test_nothing_is_fused_on_a_cpu_unless_asked():
    model, x = MixerBlock().eval(), torch.randn(2, 64, 64)
    with torch.no_grad():
        assert codes(model, x, fuse=None)[0] == codes(model, x, fuse=False)[0]
        assert codes(model, x)[0] != codes(model, x, fuse=False)[0]


def test_nothing_is_fused_under_autocast_or_with_gradients():
    model, x = MixerBlock().eval(), torch.randn(2, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert codes(model, x)[0] == codes(model, x, fuse=False)[0]
    ss1_compile.compress(model, reduction=4, warn_error=2.0, progress=False)
    options = {"include": (), "allow_empty": True}
    trained, _ = codes(model, x, **options)
    assert trained == codes(model, x, fuse=False, **options)[0]
    assert "ss1.linear" in trained[0]


def test_fuse_must_be_a_truth_value():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="fuse must be True, False"):
        compiled(Plain().eval(), fuse="yes")(torch.randn(3, 64))


# --- sketches that change later -----------------------------------------------------------------


def test_sketches_that_stop_being_equal_are_noticed():
    torch.manual_seed(0)
    model, x, memory = Decoder().eval(), torch.randn(2, 5, 64), torch.randn(2, 7, 64)
    ss1_compile.compress(model, reduction=4, warn_error=2.0, progress=False)
    fast = compiled(model, "aot_eager", include=(), allow_empty=True)
    with torch.no_grad():
        before = fast(x, memory)
        assert_same(before, model(x, memory))
        model.k.sketch.copy_(model.k.sketch.clone())  # written, and still equal
        assert_same(fast(x, memory), before)
        model.k.sketch.copy_(~model.k.sketch)  # every sign turned
        with pytest.warns(SS1Warning, match="different sketches"):
            after = fast(x, memory)
        assert_same(after, model(x, memory))
        assert not torch.allclose(after, before)
        model.k.sketch.copy_(~model.k.sketch)
        assert_same(fast(x, memory), before)


# --- cost ---------------------------------------------------------------------------------------


def test_the_work_grows_with_the_layers(monkeypatch):
    """Calls of the passes' functions: with four times the layers no more than four times."""
    calls = Counter()

    def counted(*args):
        def count(frame, event, argument):
            calls[layers] += event == "call" and "passes" in frame.f_code.co_filename

        sys.setprofile(count)
        try:
            return real(*args)
        finally:
            sys.setprofile(None)

    real = fusion.fuse
    monkeypatch.setattr(fusion, "fuse", counted)
    for layers in (6, 24):
        torch._dynamo.reset()
        with torch.no_grad():
            compiled(mixer(layers).eval())(torch.randn(2, 64, 64))
    assert 0 < calls[24] <= 4.1 * calls[6]
