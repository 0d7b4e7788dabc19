"""Models by name: Hugging Face directories, safetensors files, ``module:factory``, and our own."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ss1_compile.config import SS1Config
from ss1_compile.errors import CheckpointError, ConfigError, MissingPackageError
from ss1_compile.serialization.checkpoint import CONFIG_FILE, TENSORS_FILE
from ss1_compile.serialization.load import load
from ss1_compile.serialization.save import save

HUGGINGFACE_DIRECTORY = "huggingface"
"""The folder of a compressed model with its Hugging Face configuration and tokenizer: beside
``model.safetensors``, transformers would take that file for a dense model's."""

_RECIPE_HUGGINGFACE = """\
from pathlib import Path
import torch, transformers, ss1_compile

directory = Path({directory!r})
config = transformers.AutoConfig.from_pretrained(directory / "{subdirectory}")
with torch.device("meta"):
    model = transformers.{architecture}(config)
ss1_compile.load(model, directory).eval()
"""
_RECIPE_FACTORY = """\
import torch, ss1_compile
from {module} import {factory}

with torch.device("meta"):
    model = {factory}()
ss1_compile.load(model, {directory!r}, device="cpu").eval()
"""


@dataclass
class Loaded:
    """A model, and what is known about where it came from.

    Attributes:
        model: in eval mode.
        source: as the user gave it.
        directory: with the tokenizer or image processor; ``None`` for a factory's.
        architecture: name of the class in transformers, if it is one.
        hf_config: its configuration.
    """

    model: nn.Module
    source: str
    directory: Path | None = None
    architecture: str | None = None
    hf_config: Any = None

    def recipe(self, directory: Path) -> str:
        """Python code that loads the compressed model from ``directory``."""
        if self.architecture is not None:
            return _RECIPE_HUGGINGFACE.format(
                directory=str(directory),
                subdirectory=HUGGINGFACE_DIRECTORY,
                architecture=self.architecture,
            )
        module, _, factory = self.source.partition(":")
        return _RECIPE_FACTORY.format(directory=str(directory), module=module, factory=factory)

    def save_compressed(self, directory: Path, config: SS1Config | None) -> None:
        """Write the compressed model, with configuration and tokenizer in ``huggingface/``."""
        save(self.model, directory, config=config)
        if self.hf_config is None:
            return
        self.hf_config.save_pretrained(directory / HUGGINGFACE_DIRECTORY)
        for beside in (tokenizer_of, processor_of):
            found = beside(self)
            if found is not None:
                found.save_pretrained(directory / HUGGINGFACE_DIRECTORY)


def load_model(source: str, device: str = "cpu") -> Loaded:
    """A dense model, or a compressed one from a directory that ``ss1 compress`` wrote.

    Args:
        source: a Hugging Face directory, a ``.safetensors`` file with a ``config.json`` beside it,
            a compressed model's directory with a folder ``huggingface``, or ``module:factory``.
        device: where it goes.

    Raises:
        CheckpointError: no loadable model there.
        ConfigError: the factory or the device does not exist, or the factory makes no module.
        MissingPackageError: transformers is needed and not installed.
    """
    where = device_of(device)
    path = Path(source)
    if (path / CONFIG_FILE).is_file():
        loaded = _compressed(path)
    elif path.exists() or ":" not in source:
        loaded = _from_huggingface(path)
    else:
        loaded = Loaded(_call_factory(source), source)
    loaded.model.to(where).eval()
    return loaded


def load_compressed(directory: Path, dense: Loaded) -> nn.Module:
    """The compressed model of ``directory``, which was made from ``dense``, on its device.

    Raises:
        CheckpointError: it is none, or of another model.
    """
    device = next(dense.model.parameters()).device
    with torch.device("meta"):
        skeleton = _empty(dense)
    return load(skeleton, directory, device=device).eval()


def device_of(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        ConfigError: there is none.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def check_target(directory: Path) -> None:
    """Refuse to overwrite a model that is not one of ours.

    Raises:
        CheckpointError: ``directory`` is a file, or holds another model.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    if (directory / TENSORS_FILE).exists() and not (directory / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{directory} holds a {TENSORS_FILE} that ss1-compile did not write; choose another "
            f"directory"
        )


def tokenizer_of(loaded: Loaded) -> Any:
    """The tokenizer beside the model, or ``None``."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")
    return _beside(loaded, names, "AutoTokenizer")


def processor_of(loaded: Loaded) -> Any:
    """The image processor beside the model, or ``None``."""
    return _beside(loaded, ("preprocessor_config.json",), "AutoImageProcessor")


def _beside(loaded: Loaded, files: tuple[str, ...], kind: str) -> Any:
    if loaded.directory is None or not any((loaded.directory / name).is_file() for name in files):
        return None
    try:
        return getattr(_transformers(), kind).from_pretrained(
            loaded.directory, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{loaded.directory}: {kind} cannot be loaded: {error}") from error


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            "a Hugging Face model needs transformers: pip install 'ss1-compile[hf]'"
        ) from error
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    return transformers


def _from_huggingface(path: Path) -> Loaded:
    directory = path.parent if path.suffix == ".safetensors" else path
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} is not a Hugging Face model: it has no config.json")
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        architecture = _architecture(transformers, config)
        kind = getattr(transformers, architecture)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            model = kind.from_pretrained(None, config=config, state_dict=load_file(path))
        else:
            model = kind.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise CheckpointError(f"{path} cannot be loaded: {error}") from error
        raise
    return Loaded(model, str(path), directory, architecture, config)


def _compressed(path: Path) -> Loaded:
    inner = path / HUGGINGFACE_DIRECTORY
    if not (inner / "config.json").is_file():
        raise CheckpointError(
            f"{path} is a compressed model without a folder {HUGGINGFACE_DIRECTORY!r}; name the "
            f"dense model as well"
        )
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(inner, local_files_only=True)
        architecture = _architecture(transformers, config)
        with torch.device("meta"):
            skeleton = getattr(transformers, architecture)(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{inner} cannot be loaded: {error}") from error
    model = load(skeleton, path, device="cpu")
    return Loaded(model, str(path), inner, architecture, config)


def _architecture(transformers: Any, config: Any) -> str:
    names = [n for n in getattr(config, "architectures", None) or () if hasattr(transformers, n)]
    if not names:
        raise ValueError(f"transformers has no class for architectures {config.architectures}")
    return str(names[0])


def _empty(dense: Loaded) -> nn.Module:
    if dense.architecture is None:
        return _call_factory(dense.source)
    made: nn.Module = getattr(_transformers(), dense.architecture)(dense.hf_config)
    return made


def _call_factory(source: str) -> nn.Module:
    name, _, attribute = source.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does
    try:
        made = getattr(importlib.import_module(name), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{source}: {error}; name an importable module and a function without arguments that "
            f"makes the model"
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{source} makes a {type(made).__name__}, not a torch.nn.Module")
    return made
