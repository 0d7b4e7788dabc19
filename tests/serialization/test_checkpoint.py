from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_models import (
    CONFIG,
    TENSORS,
    Net,
    identity,
    meta_net,
    same,
    saved_net,
    to_ss1,
)
from torch import nn

from ss1_compile.config import SS1Config
from ss1_compile.errors import CheckpointError
from ss1_compile.modules import SS1Linear
from ss1_compile.serialization.checkpoint import read_config
from ss1_compile.serialization.load import load
from ss1_compile.serialization.save import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(saved_net(), tmp_path, config=SS1Config(reduction=2, min_features=8))
    return tmp_path


# --- tampering ----------------------------------------------------------------------------------


class Files:
    """The content of a saved model, to be changed and written back with a matching checksum."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.document = json.loads((folder / CONFIG).read_text())
        self.tensors = load_file(folder / TENSORS)
        with safe_open(folder / TENSORS, framework="pt") as file:
            self.aliases = json.loads(file.metadata()["ss1_aliases"])

    @property
    def layers(self) -> dict[str, Any]:
        return self.document["layers"]

    def write(self) -> None:
        path = self.folder / TENSORS
        aliases = self.aliases if isinstance(self.aliases, str) else json.dumps(self.aliases)
        tensors = {name: t.contiguous().clone() for name, t in self.tensors.items()}
        save_file(tensors, path, {"ss1_aliases": aliases})
        self.document["tensors_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (self.folder / CONFIG).write_text(json.dumps(self.document))


def layer(key: str, value: Any) -> Callable[[Files], Any]:
    return lambda f: f.layers["up"].update({key: value})


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Files], Any]:
    return lambda f: f.tensors.update({name: change(f.tensors[name])})


def top(key: str, value: Any) -> Callable[[Files], Any]:
    return lambda f: f.document.update({key: value})


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t.view(-1)[-1] = value
        return t

    return change


def rename(old: str, new: str) -> Callable[[Files], Any]:
    return lambda f: f.layers.update({new: f.layers.pop(old)})


TAMPERED: dict[str, tuple[Callable[[Files], Any], str]] = {
    "format": (top("format", "gguf"), r"ss1_config.json: format must be .* got 'gguf'"),
    "format type": (top("format", ["ss1-compile"]), "format must be"),
    "no format": (lambda f: f.document.pop("format"), "format must be .* got None"),
    "newer": (top("format_version", 5), "format_version 5 is newer.*upgrade"),
    "much newer": (top("format_version", 10**400), "is newer.*upgrade"),
    "version 0": (top("format_version", 0), "format_version must be .* got 0"),
    "version text": (top("format_version", "1"), "format_version must be .* got '1'"),
    "version bool": (top("format_version", True), "format_version must be .* got True"),
    "package_version": (top("package_version", 1), "package_version must be a string, got 1"),
    "unknown key": (top("pickle", "x"), r"ss1_config.json: .*unknown keys \['pickle'\]"),
    "missing key": (lambda f: f.document.pop("package_version"), r"lacks \['package_version'\]"),
    "config type": (top("config", 5), "config must be an object, got 5"),
    "config key": (top("config", {"reducton": 2}), "config: unknown option 'reducton'; did you"),
    "config value": (top("config", {"damping": 10**400}), "config: damping must be"),
    "layers list": (top("layers", []), "layers must be a non-empty object"),
    "layers empty": (top("layers", {}), "layers must be a non-empty object"),
    "layer type": (lambda f: f.layers.update(up=[1]), r"layer 'up' must be an object, got \[1\]"),
    "layer key": (layer("rotations", []), r"layer 'up' has unknown keys \['rotations'\]"),
    "layer lacks": (lambda f: f.layers["up"].pop("bias"), r"layer 'up' lacks \['bias'\]"),
    "K text": (layer("in_features", "32"), "layer 'up': in_features must be an integer"),
    "K float": (layer("in_features", 32.0), "layer 'up': in_features must be .* got 32.0"),
    "K bool": (layer("in_features", True), "layer 'up': in_features must be .* got True"),
    "K null": (layer("in_features", None), "layer 'up': in_features must be .* got None"),
    "K negative": (layer("in_features", -32), "layer 'up': in_features must be .* got -32"),
    "K other": (layer("in_features", 64), "layer 'up' has in_features.* = 64, 48; .* 32, 48"),
    "K huge": (layer("in_features", 10**4000), "layer 'up': in_features is 1000.*000"),
    "N other": (layer("out_features", 32), "layer 'up' has .* 32, 32; in the model they are 32, 4"),
    "N zero": (layer("out_features", 0), "layer 'up': out_features must be .* got 0"),
    "c other": (layer("reduction", 4), "layer 'up': reduction is 4 but the sketch has 2"),
    "c huge": (layer("reduction", 10**30), "layer 'up': reduction is 1000"),
    "J other": (layer("num_hashes", 3), "layer 'up': num_hashes is 3 but the sketch has 2"),
    "B_K odd": (layer("block_k", 12), "layer 'up': sketch: block_k must be a power of two"),
    "B_K small": (layer("block_k", 8), "layer 'up': sketch: "),
    "B_K large": (layer("block_k", 32), r"layer 'up': z must be float32 \[48, 32\], got"),
    "B_K huge": (layer("block_k", 2**4000), "layer 'up': block_k is 1318.*376"),
    "dtype unknown": (layer("dtype", "int8"), "layer 'up': dtype must be one of .* got 'int8'"),
    "dtype list": (layer("dtype", ["float32"]), "layer 'up': dtype must be one of"),
    "dtype other": (layer("dtype", "float16"), "layer 'up': z must be float16 .* got float32"),
    "bias number": (layer("bias", 1), "layer 'up': bias must be a boolean, got 1"),
    "bias false": (layer("bias", False), "layer 'up' has no bias, unlike the model's"),
    "bias true": (lambda f: f.layers["down"].update(bias=True), "layer 'down' has a bias, unlike"),
    "name absent": (rename("up", "upp"), "ss1_config.json: the model has no layer 'upp'"),
    "name dots": (rename("up", "../../etc"), "the model has no layer '../../etc'"),
    "name long": (rename("up", "x" * 10**6), "the model has no layer 'xxx"),
    "name root": (rename("up", ""), "layer '' is a Net in the model"),
    "name of a norm": (rename("up", "norm"), "layer 'norm' is a BatchNorm1d in the model"),
    "name of another": (rename("up", "head"), "layer 'head' has in_features"),
    "one of two names": (lambda f: f.layers.pop("blocks.1"), "layer 'blocks.1' is not listed"),
    "layer dropped": (lambda f: f.layers.pop("down"), "lacks tensors: down.weight"),
    "rotation odd": (tensor("up.sketch", poke(3)), "layer 'up': sketch: rotation 3 is not"),
    "rotation large": (tensor("up.sketch", poke(4096)), "layer 'up': sketch: rotation 4096"),
    "rotation least": (tensor("up.sketch", poke(-(2**31))), "layer 'up': sketch: rotation 21474"),
    "sketch dtype": (tensor("up.sketch", torch.Tensor.long), "layer 'up': sketch: .* torch.int64"),
    "sketch float": (tensor("up.sketch", torch.Tensor.float), "layer 'up': sketch: .* torch.floa"),
    "sketch dims": (tensor("up.sketch", lambda t: t[0]), r"layer 'up': sketch: .*\[J, G, c\]"),
    "sketch empty": (tensor("up.sketch", lambda t: t[:0]), "layer 'up': sketch: num_hashes = 0"),
    "sketch c = 0": (tensor("up.sketch", lambda t: t[..., :0]), "layer 'up': sketch: reduction"),
    "sketch groups": (tensor("up.sketch", lambda t: t.repeat(1, 2, 1)), "layer 'up': sketch: "),
    "sketch hashes": (tensor("up.sketch", lambda t: t[:1]), "layer 'up': num_hashes is 2 but"),
    "sketch missing": (lambda f: f.tensors.pop("up.sketch"), "layer 'up': sketch is missing"),
    "z missing": (lambda f: f.tensors.pop("up.z"), "layer 'up': z is missing"),
    "z NaN": (tensor("up.z", poke(float("nan"))), "layer 'up': z has values that are not finite"),
    "z inf": (tensor("up.z", poke(-float("inf"))), "layer 'up': z has values that are not finite"),
    "z rows": (tensor("up.z", lambda t: t[1:]), r"layer 'up': z must be .* got float32 \[47, "),
    "z columns": (tensor("up.z", lambda t: t[:, 1:]), "layer 'up': z must be float32"),
    "z flat": (tensor("up.z", torch.Tensor.flatten), "layer 'up': z must be float32"),
    "z dtype": (tensor("up.z", torch.Tensor.half), "layer 'up': z must be float32 .* got float16"),
    "z int": (tensor("up.z", torch.Tensor.int), "layer 'up': z must be float32 .* got int32"),
    "bias missing": (lambda f: f.tensors.pop("up.bias"), "layer 'up': bias is missing"),
    "bias extra": (
        lambda f: f.tensors.update({"down.bias": torch.zeros(32)}),
        "layer 'down': bias is unexpected",
    ),
    "bias NaN": (tensor("up.bias", poke(float("nan"))), "layer 'up': bias has values that are"),
    "bias shape": (tensor("up.bias", lambda t: t[None]), r"layer 'up': bias must be float32 \[48"),
    "bias dtype": (tensor("up.bias", torch.Tensor.double), "layer 'up': bias must be float32"),
    "tensor missing": (
        lambda f: f.tensors.pop("norm.weight"),
        "model.safetensors lacks tensors: norm.weight",
    ),
    "buffer missing": (lambda f: f.tensors.pop("scale"), "lacks tensors: scale"),
    "many missing": (
        lambda f: [
            f.tensors.pop(n) for n in list(f.tensors) if n.startswith("norm") or n == "scale"
        ],
        r"lacks tensors: norm.bias, .*, … \(6 in all\)",
    ),
    "tensor extra": (
        lambda f: f.tensors.update({"../x": torch.zeros(1)}),
        "model.safetensors has unknown tensors: ../x",
    ),
    "tensor shape": (
        tensor("norm.weight", lambda t: t[1:]),
        r"norm.weight is \[31\]; in the model it is \[32\]",
    ),
    "tensor kind": (tensor("norm.weight", torch.Tensor.int), "norm.weight is int32; in the model"),
    "counter kind": (
        tensor("norm.num_batches_tracked", torch.Tensor.float),
        "norm.num_batches_tracked is float32; in the model it is int64",
    ),
    "alias loop": (
        lambda f: (
            f.tensors.pop("embed.weight"),
            f.aliases.update({"embed.weight": "head.weight"}),
        ),
        "alias '.*' stands for '.*', which is not a stored tensor",
    ),
    "alias self": (
        lambda f: f.aliases.update({"ghost": "ghost"}),
        "alias 'ghost' stands for 'ghost', which is not a stored tensor",
    ),
    "alias chain": (
        lambda f: f.aliases.update({"ghost": "head.weight"}),
        "alias 'ghost' stands for 'head.weight', which is not",
    ),
    "alias absent": (
        lambda f: f.aliases.update({"head.weight": "nowhere"}),
        "alias 'head.weight' stands for 'nowhere'",
    ),
    "alias extra": (
        lambda f: f.aliases.update({"ghost": "embed.weight"}),
        "unknown tensors: ghost",
    ),
    "alias and tensor": (
        lambda f: f.aliases.update({"norm.bias": "norm.weight"}),
        "alias 'norm.bias' is stored as a tensor too",
    ),
    "alias shape": (
        lambda f: f.aliases.update({"head.weight": "norm.weight"}),
        r"head.weight is \[32\]; in the model it is \[20, 32\]",
    ),
    "alias type": (lambda f: f.aliases.update({"head.weight": 5}), "must map names to names"),
    "aliases list": (lambda f: setattr(f, "aliases", [1]), "must map names to names, got"),
    "aliases text": (lambda f: setattr(f, "aliases", "{"), "model.safetensors is not a valid"),
    "aliases deep": (
        lambda f: setattr(f, "aliases", "[" * 100_000),
        "model.safetensors is not a valid",
    ),
    "shared layer split": (
        lambda f: (
            f.aliases.pop("blocks.1.z"),
            f.tensors.update({"blocks.1.z": f.tensors["blocks.0.z"] + 1}),
        ),
        "blocks.0.z and blocks.1.z differ, but the model shares one module",
    ),
}


@pytest.mark.parametrize(("tamper", "message"), TAMPERED.values(), ids=TAMPERED.keys())
def test_tampered_files_are_refused(folder, tamper, message):
    files = Files(folder)
    tamper(files)
    files.write()
    for skeleton in (meta_net(), Net()):
        before = identity(skeleton)
        with pytest.raises(CheckpointError, match=message) as caught:
            load(skeleton, folder)
        assert TENSORS in str(caught.value) or CONFIG in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert identity(skeleton) == before


def test_files_written_back_unchanged_still_load(folder):
    Files(folder).write()  # so that the cases above fail for what they change
    assert same(load(meta_net(), folder), saved_net())


def edit(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / CONFIG).unlink(), "ss1_config.json is missing"),
    "no tensors": (lambda d: (d / TENSORS).unlink(), "model.safetensors: is missing"),
    "config is a folder": (
        lambda d: ((d / CONFIG).unlink(), (d / CONFIG).mkdir()),
        "ss1_config.json",
    ),
    "tensors are a folder": (
        lambda d: ((d / TENSORS).unlink(), (d / TENSORS).mkdir()),
        "model.safetensors: is missing",
    ),
    "config empty": (edit(CONFIG, lambda b: b""), "ss1_config.json is not valid JSON"),
    "config cut": (edit(CONFIG, lambda b: b[:-20]), "ss1_config.json is not valid JSON"),
    "config bytes": (edit(CONFIG, lambda b: b"\xff\xfe" + b), "ss1_config.json is not valid JSON"),
    "config list": (
        edit(CONFIG, lambda b: b"[]"),
        r"ss1_config.json: must hold an object, not \[\]",
    ),
    "config null": (edit(CONFIG, lambda b: b"null"), "must hold an object, not None"),
    "config NaN": (
        edit(CONFIG, lambda b: b.replace(b'"in_features": 32', b'"in_features": NaN', 1)),
        "NaN is not JSON",
    ),
    "config infinity": (
        edit(CONFIG, lambda b: b.replace(b'"in_features": 32', b'"in_features": 1e999', 1)),
        "layer 'up': in_features must be .* got inf",
    ),
    "config digits": (
        edit(CONFIG, lambda b: b.replace(b"32", b"3" * 100_000, 1)),
        "ss1_config.json is not valid JSON",
    ),
    "config deep": (edit(CONFIG, lambda b: b"[" * 10**6), "ss1_config.json is nested too deeply"),
    "config twice": (
        edit(CONFIG, lambda b: b.replace(b"{", b'{"format": "ss1-compile",', 1)),
        "the same key twice",
    ),
    "tensors empty": (edit(TENSORS, lambda b: b""), "model.safetensors has SHA-256 .*truncated"),
    "tensors cut": (edit(TENSORS, lambda b: b[:-1]), "model.safetensors has SHA-256"),
    "tensors longer": (edit(TENSORS, lambda b: b + b"\0"), "model.safetensors has SHA-256"),
    "tensors flipped": (
        edit(TENSORS, lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]),
        "model.safetensors has SHA-256",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused(folder, damage, message):
    damage(folder)
    skeleton = Net()
    before = identity(skeleton)
    with pytest.raises(CheckpointError, match=message):
        load(skeleton, folder)
    assert identity(skeleton) == before


def test_files_of_two_saves_are_refused(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    model = saved_net()
    model.up.z.data.add_(1)
    save(model, other)
    os.replace(other / TENSORS, folder / TENSORS)
    with pytest.raises(CheckpointError, match="two files are of different saves"):
        load(meta_net(), folder)


def test_an_enormous_config_is_not_parsed(folder):
    with open(folder / CONFIG, "r+b") as file:
        file.truncate(1 << 27)  # sparse
    with pytest.raises(CheckpointError, match="too many for a configuration"):
        read_config(folder)


def test_a_missing_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"ss1_config.json is missing"):
        load(meta_net(), tmp_path / "nowhere")


def skeleton_with(change: Callable[[Any], Any]) -> nn.Module:
    net = Net()
    change(net)
    return net


@pytest.mark.parametrize(
    ("skeleton", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(32, 48)), "the model has no layer 'up'"),
        (lambda: skeleton_with(lambda m: setattr(m, "up", nn.Linear(32, 40))), "layer 'up' has"),
        (lambda: skeleton_with(lambda m: setattr(m, "up", nn.Conv1d(32, 48, 1))), "is a Conv1d"),
        (lambda: skeleton_with(lambda m: setattr(m, "new", nn.Linear(2, 2))), "lacks .* new.bias"),
        (lambda: skeleton_with(lambda m: delattr(m, "norm")), "has unknown tensors: norm"),
        (lambda: skeleton_with(lambda m: setattr(m, "norm", nn.LazyBatchNorm1d())), "norm"),
        (
            lambda: skeleton_with(lambda m: nn.utils.parametrizations.weight_norm(m.up)),
            "layer 'up' is a ParametrizedLinear",
        ),
        (lambda: skeleton_with(lambda m: to_ss1(m)), "layer 'head' is not listed"),
    ],
)
def test_other_architectures_are_refused(folder, skeleton, message):
    model = skeleton()
    modules = [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)]
    with pytest.raises(CheckpointError, match=message):
        load(model, folder)
    assert [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)] == modules


def test_a_failing_assignment_is_undone(folder):
    class Stubborn(nn.BatchNorm1d):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "running_var" and getattr(self, "armed", False):
                self.armed = False
                raise RuntimeError("no")
            super().__setattr__(name, value)

    skeleton = Net()
    skeleton.norm = Stubborn(32)
    skeleton.norm.armed = True
    before = identity(skeleton)
    with pytest.raises(RuntimeError, match="no"):
        load(skeleton, folder)
    assert identity(skeleton) == before


# --- random damage ------------------------------------------------------------------------------


def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].bias = model[0].bias
    return model


def small_files() -> dict[str, bytes]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save(to_ss1(small()), folder, config=SS1Config(seed=3, overrides={"a": None}))
        return {name: (Path(folder) / name).read_bytes() for name in (TENSORS, CONFIG)}


SMALL = small_files()


def load_bytes(files: dict[str, bytes]) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        with torch.device("meta"):
            skeleton = small()
        return load(skeleton, folder)


flips = st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=3)


def flipped(content: bytes, positions: list[tuple[int, int]], within: int | None = None) -> bytes:
    changed = bytearray(content)
    for position, mask in positions:
        changed[position % (within or len(changed))] ^= mask
    return bytes(changed)


@given(st.sampled_from([TENSORS, CONFIG]), flips)
@settings(max_examples=100, deadline=None)
def test_random_damage_is_found_or_harmless(file, positions):
    try:
        model = load_bytes({**SMALL, file: flipped(SMALL[file], positions)})
    except CheckpointError:
        return
    assert same(model, load_bytes(SMALL))


@given(flips, st.booleans(), st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_random_damage_under_a_matching_checksum_raises_nothing_else(positions, header, cut):
    content = SMALL[TENSORS]
    size = 8 + int.from_bytes(content[:8], "little")
    content = flipped(content, positions, within=size if header else None)
    content = content[: len(content) - cut] if cut > 300 else content
    document = json.loads(SMALL[CONFIG])
    document["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    files = {TENSORS: content, CONFIG: json.dumps(document).encode()}
    try:
        model = load_bytes(files)
    except CheckpointError:
        return
    assert all(layer.structure for layer in model if isinstance(layer, SS1Linear))
    assert model(torch.zeros(1, 16)).shape == (1, 16)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
PLACES = [
    *((key,) for key in json.loads(SMALL[CONFIG])),
    *(("layers", "0", key) for key in json.loads(SMALL[CONFIG])["layers"]["0"]),
    *(("config", key) for key in json.loads(SMALL[CONFIG])["config"]),
    ("layers", "2"),
    ("layers", "new"),
    ("config", "new"),
]


@given(st.sampled_from(PLACES), json_values)
@settings(max_examples=100, deadline=None)
def test_any_value_in_any_place_of_the_config(place, value):
    document = json.loads(SMALL[CONFIG])
    target = document
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    try:
        model = load_bytes({**SMALL, CONFIG: json.dumps(document).encode()})
    except CheckpointError:
        return
    assert same(model, load_bytes(SMALL))
