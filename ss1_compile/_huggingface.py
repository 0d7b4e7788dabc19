"""Compress what ``ss1 compress`` names and save the result."""

from __future__ import annotations

from pathlib import Path

from ss1_compile.compression.compress import compress
from ss1_compile.config import SS1Config
from ss1_compile.data_files import load_batches
from ss1_compile.model_sources import HUGGINGFACE_DIRECTORY, check_target, load_model
from ss1_compile.report import Report

__all__ = ["HUGGINGFACE_DIRECTORY", "compress_directory"]


def compress_directory(
    model_dir: str | Path,
    out_dir: Path | None,
    config: SS1Config,
    *,
    calibration: Path | None = None,
    texts: int = 512,
    max_tokens: int = 128,
    batch_size: int = 16,
    sequential: bool = False,
    device: str = "cpu",
) -> tuple[Report, str]:
    """Load the model, compress it and save it with its Hugging Face configuration and tokenizer.

    Those go to ``out_dir/huggingface``: beside ``model.safetensors``, transformers would take the
    file for a dense model and fill the weights it misses with random values.

    Args:
        model_dir: see :func:`ss1_compile.model_sources.load_model`.
        out_dir: where to save; ``None`` saves nothing.
        config: what to compress and how.
        calibration: see :func:`ss1_compile.data_files.load_batches`.
        texts: how many samples of it to use, the first ones.
        max_tokens: tokens per text.
        batch_size: samples per batch.
        sequential: see :func:`ss1_compile.compress`.
        device: where to compute.

    Returns:
        The report, and Python code that loads what was saved.

    Raises:
        MissingPackageError: transformers is not installed.
        CheckpointError: no loadable model in ``model_dir``, or ``out_dir`` holds another model.
        CalibrationError: the calibration data cannot be read or used.
        SS1Error: as :func:`ss1_compile.compress`.
    """
    if out_dir is not None:
        check_target(out_dir)
    loaded = load_model(str(model_dir), device)
    batches = None
    if calibration is not None:
        batches = load_batches(
            calibration, loaded, samples=texts, batch_size=batch_size, max_tokens=max_tokens
        )
    report = compress(loaded.model, config, batches, sequential=sequential)
    if out_dir is not None:
        loaded.save_compressed(out_dir, config)
    return report, "" if out_dir is None else loaded.recipe(out_dir)
