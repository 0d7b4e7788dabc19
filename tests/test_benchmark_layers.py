"""The layers that the GPU benchmarks put into models share sketches as ``compress`` makes them."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ss1_compile import SS1Linear

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import compiled

    yield compiled
    sys.modules.pop("compiled")


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width // 2)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, 96), nn.Linear(width, 96)
        self.down = nn.Linear(96, width)

    def forward(self, x):
        k = torch.cat([self.k(x), self.k(x)], -1)
        x = x + self.out(self.q(x) * k + self.v(x))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def swapped(compiled, kind, choose=lambda name: 2):
    model = nn.Sequential(Block(), Block()).eval()
    count = compiled.swap(model, choose, kind, (torch.randn(3, 64),))
    found = {n: m for n, m in model.named_modules() if isinstance(m, SS1Linear)}
    assert len(found) == count
    return found


def test_layers_of_one_input_share_a_learned_sketch(compiled):
    layers = swapped(compiled, "learned")
    for block in ("0", "1"):
        for a, b, shared in (
            ("q", "k", True),
            ("gate", "up", True),
            ("q", "v", False),  # one has a bias, the other none
            ("q", "out", False),
            ("q", "gate", False),
            ("up", "down", False),
        ):
            same = layers[f"{block}.{a}"].sketch is layers[f"{block}.{b}"].sketch
            assert same is shared, (a, b)
    # 64·(64 + 32)/2 parameters for q and k together, the sketch counted once
    q, k = layers["0.q"], layers["0.k"]
    assert q.z.numel() + k.z.numel() + q.sketch.numel() <= 64 * 96 / 2
    assert layers["0.q"].sketch is not layers["1.q"].sketch


def test_rotations_of_one_input_are_equal(compiled):
    layers = swapped(compiled, "rotation")
    assert torch.equal(layers["0.q"].sketch, layers["0.k"].sketch)
    assert torch.equal(layers["0.gate"].sketch, layers["0.up"].sketch)


def test_layers_of_other_reductions_and_dense_ones_stay_apart(compiled):
    layers = swapped(compiled, "learned", {"0.gate": 2, "0.up": 4, "0.q": 2}.get)
    assert sorted(layers) == ["0.gate", "0.q", "0.up"]
    assert layers["0.gate"].sketch is not layers["0.up"].sketch
    with pytest.raises(ValueError, match="no linear layer was chosen"):
        swapped(compiled, "learned", lambda name: None)


class _NothingIsReadBack(TorchDispatchMode):
    """Refuses what waits for the GPU, which a stream that is being captured does too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_models_run_in_a_cuda_graph_as_they_do_when_launched(compiled, family):
    """Or the graph's time would be another program's, or recording it would fail."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "use_cache": False,
        "vocab_size": 50,
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
    }
    torch.manual_seed(0)
    if family == "bert":
        config = transformers.BertConfig(**sizes, num_attention_heads=2)
        model = transformers.BertModel(config, add_pooling_layer=False)
    elif family == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2)
        model = transformers.LlamaForCausalLM(config)
    model.config.use_cache = False
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        expected = model.eval()(ids)[0]
        with compiled.as_launched(), _NothingIsReadBack():
            assert torch.equal(model(ids)[0], expected)
