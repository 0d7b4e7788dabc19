from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from saved_models import (
    CONFIG,
    TENSORS,
    TOKENS,
    Net,
    everything,
    identity,
    meta_net,
    same,
    saved_net,
    to_ss1,
)
from torch import nn

from ss1_compile.compression.compress import compress
from ss1_compile.config import SS1Config
from ss1_compile.errors import CheckpointError
from ss1_compile.modules import SS1Linear
from ss1_compile.serialization.checkpoint import read_config
from ss1_compile.serialization.layer import SavedLayer
from ss1_compile.serialization.load import load
from ss1_compile.serialization.save import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(saved_net(), tmp_path, config=SS1Config(reduction=2, min_features=8))
    return tmp_path


# --- round trips --------------------------------------------------------------------------------


def test_encoder_layers_compute_with_z_after_loading(tmp_path, monkeypatch):
    def make():
        return nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)).eval()

    model, x = make(), torch.randn(2, 5, 64)
    compress(model, reduction=2, warn_error=2.0, progress=False)
    save(model, tmp_path)
    with torch.no_grad():
        reloaded = load(make(), tmp_path)
        monkeypatch.setattr("ss1_compile.structure.SS1Structure.materialize", None)
        assert torch.equal(reloaded(x), model(x))


def test_into_a_meta_skeleton(folder):
    model, skeleton = saved_net(), meta_net()
    linears = {n for n, m in skeleton.named_modules() if isinstance(m, nn.Linear) and n != "head"}
    assert all(t.is_meta for t in everything(skeleton).values())
    assert load(skeleton, folder) is skeleton
    assert all(isinstance(skeleton.get_submodule(name), SS1Linear) for name in linears)
    assert all(t.device.type == "cpu" for t in everything(skeleton).values())
    assert same(skeleton, model)
    assert torch.equal(skeleton(TOKENS), model(TOKENS))
    dense_shapes = {(48, 32), (32, 48), (32, 32)}
    assert not dense_shapes & {tuple(p.shape) for p in skeleton.parameters()}


def test_ties_and_shared_modules_are_restored(folder):
    skeleton = load(meta_net(), folder)
    assert skeleton.head.weight is skeleton.embed.weight
    assert skeleton.blocks[0] is skeleton.blocks[1]
    assert "scale" not in skeleton.state_dict()  # still not persistent
    with safe_open(folder / TENSORS, framework="pt") as file:
        stored, aliases = set(file.keys()), json.loads(file.metadata()["ss1_aliases"])
    assert aliases == {
        "head.weight": "embed.weight",
        "blocks.1.z": "blocks.0.z",
        "blocks.1.bias": "blocks.0.bias",
        "blocks.1.sketch": "blocks.0.sketch",
    }
    assert not stored & aliases.keys()


def test_a_tie_that_the_model_lost_is_not_put_back(tmp_path):
    model = to_ss1(Net()).eval()  # the head is SS1 now, the embedding is not
    save(model, tmp_path)
    skeleton = load(meta_net(), tmp_path)
    assert isinstance(skeleton.head, SS1Linear)
    assert torch.equal(skeleton(TOKENS), model(TOKENS))


def test_a_shared_sketch_is_stored_once(tmp_path):
    block = saved_net().blocks[0]
    model = nn.ModuleDict({"a": block, "b": copy.deepcopy(block)})
    model.b.sketch = model.a.sketch
    save(model, tmp_path)
    skeleton = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    load(skeleton, tmp_path)
    assert skeleton.a.sketch is skeleton.b.sketch
    assert same(skeleton, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_come_from_the_file(tmp_path, dtype):
    model = saved_net().to(dtype)
    save(model, tmp_path)
    assert {layer.dtype for layer in read_config(tmp_path).layers.values()} == {
        str(dtype).removeprefix("torch.")
    }
    skeleton = load(meta_net(), tmp_path)
    assert same(skeleton, model)
    assert torch.equal(skeleton(TOKENS), model(TOKENS))


def test_into_a_materialised_or_an_ss1_model(folder):
    model = saved_net()
    dense = Net().eval()
    again = to_ss1(Net(), skip=("head",)).eval()
    for skeleton in (dense, again):
        before = skeleton(TOKENS)
        assert load(skeleton, folder) is skeleton
        assert not torch.equal(skeleton(TOKENS), before)
        assert same(skeleton, model)


def test_modes_and_requires_grad_are_the_skeletons(folder):
    skeleton = meta_net().train()
    skeleton.up.eval()
    skeleton.down.weight.requires_grad_(False)
    skeleton.up.bias.requires_grad_(False)
    skeleton.embed.weight.requires_grad_(False)
    load(skeleton, folder)
    assert skeleton.down.training
    assert skeleton.blocks[1].training
    assert not skeleton.up.training
    assert not skeleton.down.z.requires_grad
    assert skeleton.up.z.requires_grad
    assert not skeleton.up.bias.requires_grad
    assert not skeleton.embed.weight.requires_grad
    assert skeleton.norm.weight.requires_grad
    skeleton(TOKENS).sum().backward()
    assert skeleton.up.z.grad is not None


def test_inside_a_meta_device_context(folder):
    with torch.device("meta"):
        skeleton = load(Net().eval(), folder)
    assert same(skeleton, saved_net())


def test_loaded_tensors_do_not_depend_on_the_file(folder):
    skeleton = load(meta_net(), folder)
    (folder / TENSORS).write_bytes(bytes((folder / TENSORS).stat().st_size))
    assert same(skeleton, saved_net())
    save(skeleton, folder)
    assert same(load(meta_net(), folder), saved_net())


def test_a_layer_that_is_the_whole_model(tmp_path):
    layer = saved_net().up
    save(layer, tmp_path)
    loaded = load(nn.Linear(32, 48, device="meta"), tmp_path)
    assert isinstance(loaded, SS1Linear)
    assert same(loaded, layer)


def test_compiled_models_are_unwrapped(tmp_path):
    model = saved_net()
    save(torch.compile(model, backend="eager"), tmp_path)
    assert same(load(meta_net(), tmp_path), model)


def test_modules_that_keep_a_second_list_of_their_parameters(tmp_path):
    def build() -> nn.Module:
        return nn.Sequential(nn.LSTM(16, 16), nn.Identity(), nn.Linear(16, 8)).eval()

    model = to_ss1(build())
    save(model, tmp_path)
    with torch.device("meta"):
        skeleton = build()
    load(skeleton, tmp_path)
    x = torch.randn(3, 2, 16)
    expected = model[2](model[0](x)[0])
    assert torch.equal(skeleton[2](skeleton[0](x)[0]), expected)


def test_views_of_one_storage_and_strange_strides(tmp_path):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.randn(6, 4)
            self.linear = nn.Linear(32, 32)
            self.register_buffer("top", base[:4])
            self.register_buffer("bottom", base[2:])
            self.register_buffer("turned", base.t())
            self.register_buffer("wide", torch.ones(1, 4).expand(3, 4))
            self.register_buffer("empty", torch.zeros(0, 4))
            self.register_buffer("scalar", torch.tensor(3))
            self.register_buffer("absent", None)

    model = to_ss1(Views())
    save(model, tmp_path)
    assert same(load(Views(), tmp_path), model)


@pytest.mark.gpu
def test_to_and_from_cuda(folder, tmp_path):
    skeleton = load(meta_net(), folder, device="cuda")
    assert all(t.is_cuda for t in everything(skeleton).values())
    assert skeleton.head.weight is skeleton.embed.weight
    on_gpu = tmp_path / "gpu"
    save(skeleton, on_gpu)
    assert same(load(meta_net(), on_gpu), saved_net())
    stays = load(Net().eval().cuda(), folder)
    assert all(t.is_cuda for t in everything(stays).values())


def test_device_argument(folder):
    assert all(
        t.device.type == "cpu" for t in everything(load(meta_net(), folder, device="cpu")).values()
    )


def transformer(kind: str) -> tuple[Callable[[], nn.Module], tuple[str, ...]]:
    transformers = pytest.importorskip("transformers")
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=32,
        )  # fmt: skip
        return lambda: transformers.AutoModel.from_config(config), ()
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=32
        )
        return lambda: transformers.AutoModelForCausalLM.from_config(config), ("lm_head",)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    return lambda: transformers.AutoModelForCausalLM.from_config(config), ()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_transformers(tmp_path, kind):
    build, skip = transformer(kind)
    torch.manual_seed(0)
    model = to_ss1(build(), skip).eval()
    count = sum(isinstance(m, SS1Linear) for m in model.modules())
    assert count == {"bert": 13, "gpt2": 8, "llama": 15}[kind]
    save(model, tmp_path)
    with torch.device("meta"):
        skeleton = build().eval()
    assert all(t.is_meta for t in everything(skeleton).values())
    load(skeleton, tmp_path)
    assert not any(t.is_meta for t in everything(skeleton).values())
    assert sum(isinstance(m, SS1Linear) for m in skeleton.modules()) == count
    if kind == "gpt2":
        assert skeleton.lm_head.weight is skeleton.transformer.wte.weight
    tokens = torch.randint(50, (2, 9))
    with torch.no_grad():
        ours, theirs = skeleton(input_ids=tokens)[0], model(input_ids=tokens)[0]
    assert torch.equal(ours, theirs)


def test_what_compress_made(tmp_path):
    build, _ = transformer("gpt2")
    torch.manual_seed(0)
    model = build().eval()
    config = SS1Config(reduction=4, projection="average", warn_error=10.0)
    report = compress(model, config, progress=False)
    save(model, tmp_path, config=config)
    saved = read_config(tmp_path)
    assert saved.config == config
    assert list(saved.layers) == [layer.name for layer in report.compressed]
    with torch.device("meta"):
        skeleton = build().eval()
    tokens = torch.randint(50, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=tokens)[0]
        assert torch.equal(load(skeleton, tmp_path)(input_ids=tokens)[0], expected)


# --- saving -------------------------------------------------------------------------------------


def test_read_config(folder):
    saved = read_config(folder)
    assert saved.format_version == 1
    assert saved.package_version
    assert saved.config == SS1Config(reduction=2, min_features=8)
    assert list(saved.layers) == ["up", "down", "blocks.0", "blocks.1"]
    assert saved.layers["down"] == SavedLayer(48, 32, 2, "float32", False, reduction=2, block_k=8)
    assert saved.layers["down"].block_k == saved_net().down.block_k
    save(saved_net(), folder)
    assert read_config(folder).config is None


def test_saving_is_deterministic_and_leaves_nothing_else(tmp_path):
    for name in ("a", "b"):
        save(saved_net(), tmp_path / "deep" / name)
        assert {p.name for p in (tmp_path / "deep" / name).iterdir()} == {TENSORS, CONFIG}
    for file in (TENSORS, CONFIG):
        texts = [(tmp_path / "deep" / name / file).read_bytes() for name in ("a", "b")]
        assert texts[0] == texts[1]


def test_saving_keeps_the_model_and_other_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    model = saved_net()
    before = identity(model)
    save(model, tmp_path)
    assert identity(model) == before
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("failing_call", range(4))
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_save_leaves_the_old_files(folder, monkeypatch, failing_call, error):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = saved_net()
    other.up.z.data.add_(1)
    calls = iter(range(99))
    real = os.replace

    def replace(*paths: Any) -> None:
        if next(calls) == failing_call:
            raise error("interrupted")
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(error, match="interrupted"):
        save(other, folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert same(load(meta_net(), folder), saved_net())


def test_an_interrupted_first_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(saved_net(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_ss1_layers_names_compress(tmp_path):
    with pytest.raises(CheckpointError, match=r"Net has no SS1 layers.*compress"):
        save(Net(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def spoil(change: Callable[[Any], None]) -> nn.Module:
    model = saved_net()
    with torch.no_grad():
        change(model)
    return model


class Stateful(nn.Identity):
    def get_extra_state(self) -> object:
        return object()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.up.z[0, 0].fill_(float("nan")), "layer 'up': z has values that are not fin"),
        (lambda m: m.up.bias[3].fill_(float("inf")), "layer 'up': bias has values that are not"),
        (lambda m: m.down.sketch.add_(1), "layer 'down': sketch: rotation"),
        (lambda m: setattr(m, "up", m.up.to("meta")), "up.z is on meta"),
        (lambda m: m.register_buffer("s", torch.eye(2).to_sparse()), "s is of layout torch.spars"),
        (lambda m: m.add_module("odd", Stateful()), r"odd \(Stateful\) has extra state"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(folder, change, message):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(CheckpointError, match=message):
        save(spoil(change), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
