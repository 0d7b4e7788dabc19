"""``export_directory``: a directory that ``ss1 compress`` wrote as one ONNX file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ss1_compile._huggingface import HUGGINGFACE_DIRECTORY
from ss1_compile.errors import CheckpointError, ConfigError, ExportError, MissingPackageError
from ss1_compile.onnx.export import export_file, export_onnx
from ss1_compile.onnx.verification import ExportReport
from ss1_compile.serialization.checkpoint import CONFIG_FILE
from ss1_compile.serialization.load import load

_BATCH = 2


def export_path(
    source: str | os.PathLike[str], path: str | os.PathLike[str], **options: Any
) -> ExportReport:
    """Whatever ``ss1 export`` takes: a directory (:func:`export_directory`) or a ``.pt2`` file.

    Raises:
        SS1Error: as :func:`export_directory` and :func:`ss1_compile.export_onnx`.
    """
    if Path(source).is_dir():
        return export_directory(source, path, **options)
    return export_file(source, path, **options)


def export_directory(
    directory: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    tokens: int = 128,
    **options: Any,
) -> ExportReport:
    """Load a compressed Hugging Face model and export it, with dynamic batch and tokens.

    Args:
        directory: what ``ss1 compress`` wrote: ``ss1_config.json``, the tensors, and the
            model's own configuration in ``huggingface/``.
        path: of the ``.onnx`` file.
        tokens: length of the example that the file is checked on; for models of text.
        **options: of :func:`ss1_compile.export_onnx`, but for ``dynamic_shapes``.

    Raises:
        MissingPackageError: transformers is not installed.
        CheckpointError: the directory holds no compressed model, or a damaged one.
        ConfigError: ``tokens`` is no positive integer.
        ExportError: the model takes something else than token ids or images; or as
            :func:`ss1_compile.export_onnx`.
        VerificationError: as :func:`ss1_compile.export_onnx`.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"tokens must be an integer ≥ 1, got {tokens!r}")
    model = load_directory(Path(directory))
    args, shapes = example_inputs(model, tokens)
    return export_onnx(model, args, path, dynamic_shapes=shapes, **options)


def load_directory(directory: Path) -> nn.Module:
    """The compressed model in ``directory``, in eval mode.

    Raises:
        MissingPackageError: transformers is not installed.
        CheckpointError: there is none, or it is damaged.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            "ss1 export of a directory needs transformers: pip install 'ss1-compile[hf]'"
        ) from error
    inner = directory / HUGGINGFACE_DIRECTORY
    if not (directory / CONFIG_FILE).is_file() or not (inner / "config.json").is_file():
        raise CheckpointError(
            f"{directory} holds no compressed Hugging Face model ({CONFIG_FILE} and "
            f"{HUGGINGFACE_DIRECTORY}/config.json); write one with ss1 compress"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(inner, local_files_only=True)
        names = [n for n in config.architectures or () if hasattr(transformers, n)]
        if not names:
            raise ValueError(f"transformers has no class for {config.architectures}")
        if hasattr(config, "use_cache"):
            config.use_cache = False  # the cache would be a dozen further outputs
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, names[0])(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{directory} cannot be loaded: {error}") from error
    return load(model, directory).eval()


def example_inputs(model: nn.Module, tokens: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Example inputs by name, and which of their dimensions are dynamic.

    Raises:
        ExportError: the model's main input is neither token ids nor images.
    """
    dynamic = torch.export.Dim.DYNAMIC
    generator = torch.Generator().manual_seed(0)
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if main == "input_ids":
        length = min(tokens, getattr(config, "max_position_embeddings", None) or tokens)
        ids = torch.randint(0, config.vocab_size, (_BATCH, length), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs, {name: {0: dynamic, 1: dynamic} for name in inputs}
    if main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (_BATCH, config.num_channels, height, width)
        return {main: torch.randn(shape, generator=generator)}, {main: {0: dynamic}}
    raise ExportError(
        f"{type(model).__name__} takes {main!r}; only input_ids and pixel_values are known here: "
        f"load the model in Python and call ss1_compile.export_onnx with example inputs"
    )
