"""Sequential calibration: what layers read in the compressed model, and in the dense one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ss1_compile import SS1Config, SS1Linear, compress
from ss1_compile.calibration.blocks import find_chain
from ss1_compile.calibration.observer import LinearObserver, Quietly
from ss1_compile.calibration.sequential import SequentialCalibration
from ss1_compile.compression.layers import find_layers

D = 32


class Block(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q, self.k = nn.Linear(D, D, bias=bias), nn.Linear(D, D, bias=bias)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D, bias=bias)
        self.calls = 0

    def forward(self, x, scale=None):
        self.calls += 1
        h = self.norm(x)
        x += 0.5 * self.q(h) * torch.sigmoid(self.k(h)) * (1 if scale is None else scale)
        return x + self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    """Layers before, in and after a stack of blocks, which change their input in place."""

    def __init__(self, skip=False, depth=3):
        super().__init__()
        self.embed, self.head = nn.Linear(D, D), nn.Linear(D, D)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.skip = skip

    def forward(self, x, attention_mask=None):
        first = x = torch.tanh(self.embed(x))
        scale = None if attention_mask is None else attention_mask[..., None].float()
        for block in self.blocks:
            x = block(x + first if self.skip else x, scale=scale)
        return self.head(x)


def make(skip=False, depth=3):
    torch.manual_seed(3)
    return Stack(skip, depth).eval()


def batches(count=5, masked=True, size=3):
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(D, D, generator=generator) / D**0.5
    rows = [torch.randn(size, 7, D, generator=generator) @ mix for _ in range(count)]
    mask = torch.arange(7) < torch.tensor([[7], [4], [6]]).repeat(size // 3, 1)
    return [{"x": x, "attention_mask": mask.long()} if masked else x for x in rows]


def inputs_of(model, data, names):
    """What each layer reads in every batch, by plain hooks; kept rows only."""
    found = {name: [] for name in names}

    def keep(name, mask):
        def hook(module, args):
            x = args[0].double()
            found[name].append(x.flatten(0, -2) if mask is None else x[mask])

        return model.get_submodule(name).register_forward_pre_hook(hook)

    for batch in data:
        mask = batch["attention_mask"].bool() if isinstance(batch, dict) else None
        handles = [keep(name, mask) for name in names]
        with torch.no_grad():
            model(**batch) if isinstance(batch, dict) else model(batch)
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_statistics_are_those_of_the_compressed_prefix_and_its_drift(skip, masked):
    model, data = make(skip), batches(masked=masked)
    dense = copy.deepcopy(model)
    layers = find_layers(model, SS1Config(), {})
    wanted = inputs_of(dense, data, [layer.name for layer in layers])
    order = []
    with SequentialCalibration(model, layers, data, paired=True, held_out=True) as walk:
        for group in walk.groups(progress=False):
            for layer, statistics in group:
                # what the layers before it have become; it is itself still dense
                prefix = copy.deepcopy(model)
                rows = inputs_of(prefix, data, [layer.name])[layer.name]
                check(statistics, rows, wanted[layer.name])
                order.append(layer.name)
            for layer, _ in group:
                weight = layer.weight.detach() * 0.9
                layer.replacement = nn.Linear(*weight.T.shape, bias=layer.bias is not None)
                layer.replacement.weight = nn.Parameter(weight)
                layer.replacement.bias = layer.bias
    assert order[0] == "embed"
    assert order[-1] == "head"
    assert order[1:5] == [f"blocks.0.{x}" for x in ("q", "k", "up", "down")]
    assert len(order) == 14
    assert all(model.get_submodule(layer.name) is layer.module for layer in layers)


def summands_of(model, data, name):
    """What the outputs of a block's last layer are added to, kept rows only."""
    found, block, kept = [], model.get_submodule(name.rpartition(".")[0]), {}
    for batch in data:
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda m, a, y: kept.update(y=y)),
            block.register_forward_hook(lambda m, a, out: kept.update(out=out.clone())),
        ]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
        mask = batch["attention_mask"].bool()
        found.append((kept["out"].double() - kept["y"].double())[mask])
    return found


@pytest.mark.parametrize("skip", [False, True])
def test_the_shortfall_is_that_of_what_the_outputs_are_added_to(skip):
    model, data = make(skip), batches()
    dense = copy.deepcopy(model)
    layers = find_layers(model, SS1Config(), {})
    followed = []
    with SequentialCalibration(model, layers, data, paired=True, held_out=True) as walk:
        for group in walk.groups(progress=False):
            for layer, statistics in group:
                name, short = layer.name, statistics.shortfall
                if short is None or not short.cross_moment.any():
                    assert not name.endswith("down")
                else:
                    x = inputs_of(copy.deepcopy(model), data, [name])[name]
                    mine, its = (summands_of(m, data, name) for m in (model, dense))
                    s = [b - a for a, b in zip(mine, its, strict=True)]
                    close = {"rtol": 1e-4, "atol": 1e-5}
                    wanted = torch.cat(s).T @ torch.cat(x) / statistics.count
                    torch.testing.assert_close(short.cross_moment, wanted, **close)
                    torch.testing.assert_close(short.mean, torch.cat(s).mean(0), **close)
                    apart = statistics.held_out.shortfall
                    torch.testing.assert_close(apart.mean, s[3].mean(0), **close)
                    kept = statistics.without_held_out().shortfall
                    rest = torch.cat([*s[:3], *s[4:]]).mean(0)
                    torch.testing.assert_close(kept.mean, rest, **close)
                    followed.append(name)
                layer.replacement = nn.Linear(*layer.weight.shape[::-1])
                layer.replacement.weight = nn.Parameter(layer.weight.detach() * 0.9)
                layer.replacement.bias = layer.bias
    assert followed == [f"blocks.{i}.down" for i in range(3)]


def check(found, rows, dense_rows):
    x, away = torch.cat(rows), torch.cat(dense_rows) - torch.cat(rows)
    assert found.count == len(x)
    close = {"rtol": 1e-4, "atol": 1e-5}  # the models run in float32
    torch.testing.assert_close(found.mean, x.mean(0), **close)
    torch.testing.assert_close(found.second_moment, x.T @ x / len(x), **close)
    torch.testing.assert_close(found.drift.mean, away.mean(0), **close)
    torch.testing.assert_close(found.drift.second_moment, away.T @ away / len(x), **close)
    torch.testing.assert_close(found.drift.cross_moment, away.T @ x / len(x), **close)
    apart = rows[3]
    assert found.held_out.count == len(apart)
    torch.testing.assert_close(found.held_out.second_moment, apart.T @ apart / len(apart), **close)
    rest = torch.cat([*rows[:3], *rows[4:]])
    torch.testing.assert_close(found.without_held_out().mean, rest.mean(0), **close)


def test_a_prefix_of_bare_layers_is_run_compressed():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D))
    data = [torch.randn(20, D) for _ in range(2)]
    layers = find_layers(model, SS1Config(), {})
    with SequentialCalibration(model, layers, data, paired=False, held_out=False) as walk:
        for group in walk.groups(progress=False):
            for layer, statistics in group:
                rows = torch.cat(data)
                for before in model[: int(layer.name)]:
                    rows = F.linear(rows, before.weight, before.bias)
                wanted = rows.double().mean(0).detach()
                torch.testing.assert_close(statistics.mean, wanted, rtol=1e-4, atol=1e-5)
                layer.replacement = nn.Linear(D, D)


def test_a_chain_of_blocks_is_run_block_by_block():
    counts = {}
    for skip in (False, True):  # with a skip connection the model is run as a whole
        model = make(skip, depth=6)
        compress(model, reduction=2, calibration=batches(), sequential=True, warn_error=2.0,
                 progress=False)  # fmt: skip
        counts[skip] = sum(block.calls for block in model.blocks)
    assert counts[False] < counts[True] / 1.5


@pytest.mark.parametrize("projection", ["calibrated", "learned"])
def test_asymmetric_calibration_comes_closest_to_the_dense_model(projection):
    data, unseen = batches(8, size=30), batches(10, size=30)[8:]
    error = {}
    for label, options in {
        "one-shot": {},
        "sequential": {"sequential": True, "asymmetry": 0},
        "asymmetric": {"sequential": True},
    }.items():
        dense, model = make(), make()
        report = compress(model, reduction=2, projection=projection, calibration=data,
                          warn_error=2.0, progress=False, **options)  # fmt: skip
        assert all(isinstance(block.down, SS1Linear) for block in model.blocks)
        assert all(row.error_of == "output" for row in report.compressed)
        with torch.no_grad():
            pairs = [(dense(**b), model(**b)) for b in unseen]
        lost = sum((a - b)[x["attention_mask"].bool()].square().sum()
                   for (a, b), x in zip(pairs, unseen, strict=True))  # fmt: skip
        error[label] = lost.sqrt().item()
    assert error["asymmetric"] < error["sequential"]
    assert error["asymmetric"] < error["one-shot"]


def test_a_lossless_prefix_does_not_drift_and_changes_nothing():
    model, x = make(), batches(1)[0]
    expected = model(**x)
    report = compress(model, reduction=1, calibration=batches(), sequential=True, progress=False)
    assert all(row.error < 1e-5 for row in report.compressed)
    torch.testing.assert_close(model(**x), expected, rtol=1e-4, atol=1e-5)


def test_it_is_deterministic():
    states = []
    for _ in range(2):
        model = make()
        compress(model, reduction=2, projection="learned", calibration=batches(), sequential=True,
                 warn_error=2.0, progress=False)  # fmt: skip
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_causal_language_model_is_a_chain_and_keeps_its_cache():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(50, (2, 9))} for _ in range(4)]
    with Quietly(model), LinearObserver({}, lambda *_: None):
        names = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        assert find_chain(model, names, data[0]).names[0] == "model.layers.0"
    report = compress(model, reduction=2, calibration=data, sequential=True, warn_error=2.0,
                      progress=False)  # fmt: skip
    assert len(report.compressed) == 22
    layer = model.model.layers[1]
    assert layer.self_attn.q_proj.sketch is layer.self_attn.v_proj.sketch
    assert layer.mlp.gate_proj.sketch is layer.mlp.up_proj.sketch
    assert model(**data[0]).past_key_values is not None
