"""Save compressed models: safetensors and JSON, never pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ss1_compile.config import SS1Config
from ss1_compile.errors import CheckpointError, StructureError
from ss1_compile.experts import SS1ExpertLinear
from ss1_compile.modules import SS1Linear
from ss1_compile.serialization.checkpoint import (
    ALIASES_KEY,
    CONFIG_FILE,
    FORMAT,
    TENSORS_FILE,
    sha256_of,
)
from ss1_compile.serialization.layer import SavedLayer, check_layer

_COMPRESSED = (SS1Linear, SS1ExpertLinear)


def save(model: nn.Module, directory: str | Path, *, config: SS1Config | None = None) -> None:
    """Write a compressed model to ``directory``, which is created if need be.

    Both files are written under temporary names and then moved into place; an exception on the way
    leaves an earlier save as it was.

    Args:
        model: a model with SS1 layers, on any device; what ``torch.compile`` returned is unwrapped.
        directory: where ``model.safetensors`` and ``ss1_config.json`` go. Other files are kept.
        config: the configuration to record with the model.

    Raises:
        CheckpointError: the model has no SS1 layer, a tensor cannot be stored (on ``meta``, not
            strided), z or a bias is not finite, or a module has state that is not a tensor.
    """
    model = getattr(model, "_orig_mod", model)
    modules = dict(model.named_modules(remove_duplicate=False))
    if not any(isinstance(module, _COMPRESSED) for module in modules.values()):
        raise CheckpointError(
            f"{type(model).__name__} has no SS1 layers to save; compress it first "
            f"(ss1_compile.compress)"
        )
    tensors, aliases = _collect(modules)
    layers: dict[str, SavedLayer] = {}
    for name, module in modules.items():
        if isinstance(module, _COMPRESSED):
            try:
                layers[name] = SavedLayer.of(module)
            except StructureError as error:
                raise CheckpointError(f"the model: layer {name!r}: sketch: {error}") from error
            scale = module.scale if isinstance(module, SS1Linear) else None
            parts = (module.z, module.bias, module.sketch, scale)
            check_layer("the model", name, layers[name], *parts)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ss1-save-", dir=directory) as folder:
        staging = Path(folder)
        try:
            save_file(tensors, staging / TENSORS_FILE, {ALIASES_KEY: json.dumps(aliases)})
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{TENSORS_FILE} cannot be written: {error}") from error
        document = {
            "format": FORMAT,
            "format_version": max(layer.format_version for layer in layers.values()),
            "package_version": metadata.version("ss1-compile"),
            "config": None if config is None else config.to_dict(),
            "layers": {name: layer.to_dict() for name, layer in layers.items()},
            "tensors_sha256": sha256_of(staging / TENSORS_FILE),
        }
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
        _move_into_place(staging, directory)


def _collect(modules: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the modules, once, and its other names → the name it is stored under."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[Any, str] = {}
    storages: set[tuple[torch.device, int]] = set()
    for path, module in modules.items():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{path or 'the model'} ({type(module).__name__}) has extra state, which need not "
                f"be tensors and would have to be pickled; keep it in parameters or buffers"
            )
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            if tensor.is_meta or tensor.layout != torch.strided:
                where = "on meta" if tensor.is_meta else f"of layout {tensor.layout}"
                raise CheckpointError(f"{name} is {where} and cannot be saved")
            tensor = tensor.detach()
            pointer = tensor.untyped_storage().data_ptr()
            view = (tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
            key = (tensor.device, pointer, *view) if tensor.numel() else name
            if key in first_name:
                aliases[name] = first_name[key]
                continue
            first_name[key] = name
            # safetensors refuses tensors that overlap in part, and writes contiguous ones only.
            overlaps = (tensor.device, pointer) in storages
            storages.add((tensor.device, pointer))
            tensors[name] = tensor.clone().contiguous() if overlaps else tensor.contiguous()
    return tensors, aliases


def _move_into_place(staging: Path, directory: Path) -> None:
    """Move both files from ``staging``; on any exception put back those that were there."""
    for name in (TENSORS_FILE, CONFIG_FILE):
        with open(staging / name, "rb+") as file:
            os.fsync(file.fileno())
    done: list[tuple[Path, Path | None]] = []
    try:
        for name in (TENSORS_FILE, CONFIG_FILE):
            target, earlier = directory / name, staging / f"{name}.earlier"
            if target.exists():
                os.replace(target, earlier)
                done.append((target, earlier))
            else:
                done.append((target, None))
            os.replace(staging / name, target)
    except BaseException:
        for target, backup in done:
            if backup is None:
                target.unlink(missing_ok=True)
            else:
                os.replace(backup, target)
        raise
