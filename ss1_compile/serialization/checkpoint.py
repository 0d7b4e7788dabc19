"""The files of a saved model: what they hold, and reading them without trusting them.

* ``model.safetensors``: every parameter and buffer under its qualified name, the structures too
  (``<layer>.sketch``). Non-persistent buffers are stored as well, because a skeleton built on
  ``meta`` cannot recompute them. A tensor with several names is stored once; the header's metadata
  entry ``ss1_aliases`` is a JSON object that maps its other names to the stored one.
* ``ss1_config.json``: the format, the sizes of every SS1 layer and the SHA-256 of the other file,
  so that a flipped bit or a mixture of two saves is found on loading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ss1_compile.config import SS1Config
from ss1_compile.errors import CheckpointError, ConfigError
from ss1_compile.serialization.layer import (
    SavedLayer,
    parse_layer,
    require,
    require_int,
    require_keys,
    show,
)

TENSORS_FILE = "model.safetensors"
CONFIG_FILE = "ss1_config.json"
FORMAT = "ss1-compile"
FORMAT_VERSION = 4
ALIASES_KEY = "ss1_aliases"

_MAX_JSON_BYTES = 1 << 26  # the sizes of some 300 000 layers


@dataclass(frozen=True)
class SavedModel:
    """What ``ss1_config.json`` says, validated.

    Attributes:
        format_version: version of the file format.
        package_version: version of ss1-compile that saved the model; informative.
        config: the configuration the model was compressed with, where it was given to ``save``.
        layers: qualified name → sizes, in model order.
        tensors_sha256: of ``model.safetensors``, lower-case hexadecimal.
    """

    format_version: int
    package_version: str
    config: SS1Config | None
    layers: Mapping[str, SavedLayer]
    tensors_sha256: str


def read_config(directory: str | Path) -> SavedModel:
    """Read and validate ``ss1_config.json`` of a saved model, without its tensors.

    Raises:
        CheckpointError: the file is missing or not what :func:`save` writes.
    """
    path = Path(directory) / CONFIG_FILE
    document = _read_json(path)
    require(isinstance(document, dict), path, f"must hold an object, not {show(document)}")
    if document.get("format") != FORMAT:
        found = show(document.get("format"))
        raise CheckpointError(f"{path}: format must be {FORMAT!r}, got {found}")
    version = document.get("format_version")
    require_int(path, "format_version", version)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {show(version)} is newer than {FORMAT_VERSION}, the newest "
            f"this version of ss1-compile reads; upgrade ss1-compile"
        )
    require_keys(path, "the document", document, {f.name for f in fields(SavedModel)} | {"format"})
    for key in ("package_version", "tensors_sha256"):
        value = document[key]
        require(isinstance(value, str), path, f"{key} must be a string, got {show(value)}")
    layers = document["layers"]
    fits = isinstance(layers, dict) and len(layers) > 0
    require(fits, path, f"layers must be a non-empty object, got {show(layers)}")
    config = document["config"]
    if config is not None:
        require(isinstance(config, dict), path, f"config must be an object, got {show(config)}")
        try:
            config = SS1Config.from_dict(config)
        except ConfigError as error:
            raise CheckpointError(f"{path}: config: {error}") from error
    return SavedModel(
        version,
        document["package_version"],
        config,
        {name: parse_layer(path, name, layer) for name, layer in layers.items()},
        document["tensors_sha256"],
    )


def _read_json(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("an object has the same key twice")
        return values

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        size = path.stat().st_size
        require(size <= _MAX_JSON_BYTES, path, f"{size} bytes are too many for a configuration")
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is this a directory that save wrote?") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply") from error
    except ValueError as error:  # bad UTF-8, bad JSON, an integer of thousands of digits
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def read_tensors(path: Path, sha256: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, mapped from the file and not yet copied, and the aliases; self-consistent."""
    require(path.is_file(), path, "is missing; is this a directory that save wrote?")
    try:
        found = sha256_of(path)
        if found != sha256:
            raise CheckpointError(
                f"{path} has SHA-256 {found} and {CONFIG_FILE} states {show(sha256)}: it is "
                f"truncated or altered, or the two files are of different saves"
            )
        with torch.device("cpu"), safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
        aliases = json.loads(header.get(ALIASES_KEY, "null"))
    except CheckpointError:
        raise
    # safe_open and get_tensor pass on what torch raises for a dtype or size it does not know;
    # RuntimeError covers the RecursionError of deeply nested metadata.
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error
    fits = isinstance(aliases, dict) and all(isinstance(name, str) for name in aliases.values())
    require(fits, path, f"metadata {ALIASES_KEY} must map names to names, got {show(aliases)}")
    for alias, name in aliases.items():
        require(alias not in tensors, path, f"alias {show(alias)} is stored as a tensor too")
        stored = f"alias {show(alias)} stands for {show(name)}, which is not a stored tensor"
        require(name in tensors, path, stored)
    return tensors, aliases


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, lower-case hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
