"""Compress a Hugging Face model directory: what ``ss1 compress`` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ss1_compile.checkpoint import CONFIG_FILE, TENSORS_FILE
from ss1_compile.compression import compress
from ss1_compile.config import SS1Config
from ss1_compile.errors import CalibrationError, CheckpointError, MissingPackageError
from ss1_compile.report import Report
from ss1_compile.serialization import save

HUGGINGFACE_DIRECTORY = "huggingface"
_BATCH_SIZE = 16

_RECIPE = """\
from pathlib import Path
import torch, transformers, ss1_compile

directory = Path({directory!r})
config = transformers.AutoConfig.from_pretrained(directory / "{subdirectory}")
with torch.device("meta"):
    model = transformers.{architecture}(config)
ss1_compile.load(model, directory).eval()
"""


def compress_directory(
    model_dir: Path,
    out_dir: Path | None,
    config: SS1Config,
    *,
    calibration: Path | None = None,
    texts: int = 512,
    max_tokens: int = 128,
    sequential: bool = False,
) -> tuple[Report, str]:
    """Load the model, compress it and save it with its Hugging Face configuration and tokenizer.

    Those go to ``out_dir/huggingface``: beside ``model.safetensors``, transformers would take the
    file for a dense model and fill the weights it misses with random values.

    Args:
        model_dir: holds ``config.json``, the weights and, for calibration, the tokenizer.
        out_dir: where to save; ``None`` saves nothing.
        config: what to compress and how.
        calibration: text file, one text per line, or ``.jsonl`` with a field ``text``.
        texts: how many of its texts to use, the first ones.
        max_tokens: tokens per text.
        sequential: see :func:`ss1_compile.compress`.

    Returns:
        The report, and Python code that loads what was saved.

    Raises:
        MissingPackageError: transformers is not installed.
        CheckpointError: no loadable model in ``model_dir``, or ``out_dir`` holds another model.
        CalibrationError: the text cannot be read or used.
        SS1Error: as :func:`ss1_compile.compress`.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            "ss1 compress needs transformers: pip install 'ss1-compile[hf]'"
        ) from error
    if out_dir is not None:
        _check_target(out_dir)
    lines = None if calibration is None else read_texts(calibration, texts)
    if not (model_dir / "config.json").is_file():
        raise CheckpointError(f"{model_dir} is not a Hugging Face model: it has no config.json")
    try:
        hf_config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
        architecture = _architecture(transformers, hf_config)
        kind = getattr(transformers, architecture)
        model: nn.Module = kind.from_pretrained(model_dir, local_files_only=True).eval()
        tokenizer = None
        if lines is not None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{model_dir} cannot be loaded: {error}") from error
    batches = None if lines is None else _batches(tokenizer, lines, max_tokens)
    report = compress(model, config, batches, sequential=sequential)
    recipe = _RECIPE.format(
        directory=str(out_dir), subdirectory=HUGGINGFACE_DIRECTORY, architecture=architecture
    )
    if out_dir is not None:
        save(model, out_dir, config=config)
        hf_config.save_pretrained(out_dir / HUGGINGFACE_DIRECTORY)
        if tokenizer is not None:
            tokenizer.save_pretrained(out_dir / HUGGINGFACE_DIRECTORY)
    return report, recipe


def read_texts(path: Path, limit: int) -> list[str]:
    """The first ``limit`` texts of a text file (a line each) or a ``.jsonl`` file.

    Raises:
        CalibrationError: no such file, not UTF-8, a line of JSONL without a string ``text``, or no
            text at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration text {path} cannot be read: {error}") from error
    texts: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(texts) == limit:
            break
        texts.append(_json_text(path, number, line) if path.suffix == ".jsonl" else line.strip())
    if not texts:
        raise CalibrationError(f"calibration text {path} is empty")
    return texts


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path}, line {number}: not a JSON object with a field 'text'"
        ) from error
    if not isinstance(text, str):
        raise CalibrationError(f"{path}, line {number}: 'text' is {text!r}, not a string")
    return text


def _architecture(transformers: Any, config: Any) -> str:
    names = [n for n in getattr(config, "architectures", None) or () if hasattr(transformers, n)]
    if not names:
        raise ValueError(f"transformers has no class for architectures {config.architectures}")
    return str(names[0])


def _batches(tokenizer: Any, texts: list[str], max_tokens: int) -> list[dict[str, torch.Tensor]]:
    if tokenizer.pad_token is None:
        # Padded rows are masked out of the statistics, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return [
        {
            name: tensor
            for name, tensor in tokenizer(
                texts[start : start + _BATCH_SIZE],
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            ).items()
            if name in ("input_ids", "attention_mask")
        }
        for start in range(0, len(texts), _BATCH_SIZE)
    ]


def _check_target(out_dir: Path) -> None:
    """Refuse to overwrite a model that is not one of ours."""
    if out_dir.exists() and not out_dir.is_dir():
        raise CheckpointError(f"{out_dir} is not a directory")
    if (out_dir / TENSORS_FILE).exists() and not (out_dir / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{out_dir} holds a {TENSORS_FILE} that ss1-compile did not write; choose another "
            f"directory"
        )
