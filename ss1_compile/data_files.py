"""Batches from files: texts, tensors, images."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ss1_compile.errors import CalibrationError, MissingPackageError
from ss1_compile.model_sources import Loaded, processor_of, tokenizer_of

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_SIZE = 224


def load_batches(
    path: Path, loaded: Loaded, *, samples: int, batch_size: int, max_tokens: int
) -> list[Any]:
    """Batches on the model's device.

    Args:
        path: ``.txt`` (a text per line), ``.jsonl`` (objects with a string ``text``), ``.npz`` or
            ``.safetensors`` (arrays ``[samples, ...]`` named as the arguments of the model's
            forward, or a single one of any name), or a folder with images in it.
        loaded: the model, with the tokenizer or image processor beside it.
        samples: how many to use, the first ones.
        batch_size: samples per batch.
        max_tokens: of a text; the rest of it is left out.

    Raises:
        CalibrationError: nothing usable there; the message says why.
        MissingPackageError: Pillow is needed and not installed.
    """
    device = next(loaded.model.parameters()).device
    if path.is_dir():
        batches = image_batches(path, loaded, samples, batch_size)
    elif path.suffix in (".npz", ".safetensors"):
        batches = tensor_batches(path, loaded.model, samples, batch_size)
    else:
        texts = read_texts(path, samples)
        tokenizer = tokenizer_of(loaded)
        if tokenizer is None:
            raise CalibrationError(
                f"{path} is text, and {loaded.source} has no tokenizer; give tensors (.npz or "
                f".safetensors)"
            )
        batches = text_batches(tokenizer, texts, batch_size, max_tokens)
    return [_move(batch, device) for batch in batches]


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


def text_batches(
    tokenizer: Any, texts: Sequence[str], batch_size: int, max_tokens: int
) -> list[dict[str, Tensor]]:
    """``input_ids`` and ``attention_mask`` ``[batch, tokens]``, padded within the batch."""
    if tokenizer.pad_token is None:
        # Padded rows are masked out of the statistics, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return [
        {
            name: tensor
            for name, tensor in tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            ).items()
            if name in ("input_ids", "attention_mask")
        }
        for start in range(0, len(texts), batch_size)
    ]


def tensor_batches(path: Path, model: nn.Module, samples: int, batch_size: int) -> list[Any]:
    """Mappings of the arrays, or tensors where there is one array of an unknown name."""
    tensors = _read_tensors(path)
    lengths = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in tensors.items()}
    if not tensors or len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise CalibrationError(
            f"{path}: arrays must be [samples, ...] with the same number of samples, got {lengths}"
        )
    parameters = inspect.signature(model.forward).parameters
    dtype = next(model.parameters()).dtype
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
    unknown = [name for name in tensors if name not in parameters]
    if unknown and len(tensors) > 1:
        raise CalibrationError(
            f"{path}: {unknown[0]!r} is no argument of {type(model).__name__}.forward, which has "
            f"{', '.join(parameters)}"
        )
    count = min(samples, next(iter(lengths.values())))
    cuts = [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    if unknown:
        (alone,) = tensors.values()
        return [alone[cut] for cut in cuts]
    return [{name: tensor[cut] for name, tensor in tensors.items()} for cut in cuts]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # of zipfile, numpy, safetensors and the file system
        raise CalibrationError(f"{path} cannot be read: {error}") from error


def image_batches(path: Path, loaded: Loaded, samples: int, batch_size: int) -> list[Any]:
    """``pixel_values [batch, 3, H, W]``: mappings where forward has such an argument, else tensors.

    Without an image processor beside the model: the short side to 256, the middle 224 × 224, with
    ImageNet's mean and standard deviation.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingPackageError("images need Pillow: pip install pillow") from error
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGES)[:samples]
    if not files:
        raise CalibrationError(f"{path} has no images ({', '.join(IMAGES)})")
    processor = processor_of(loaded)
    dtype = next(loaded.model.parameters()).dtype
    batches: list[Any] = []
    for start in range(0, len(files), batch_size):
        images = []
        for file in files[start : start + batch_size]:
            try:
                with Image.open(file) as image:
                    images.append(image.convert("RGB"))
            except (UnidentifiedImageError, OSError) as error:
                raise CalibrationError(f"{file} cannot be read: {error}") from error
        if processor is None:
            pixels = torch.stack([_pixels(image) for image in images])
        else:
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        batches.append(pixels.to(dtype))
    named = "pixel_values" in inspect.signature(loaded.model.forward).parameters
    return [{"pixel_values": pixels} for pixels in batches] if named else batches


def _pixels(image: Any) -> Tensor:
    import numpy as np

    scale = 256 / min(image.size)
    image = image.resize([max(_SIZE, round(side * scale)) for side in image.size])
    left, top = ((side - _SIZE) // 2 for side in image.size)
    image = image.crop((left, top, left + _SIZE, top + _SIZE))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(_MEAN)) / torch.tensor(_SPREAD)).permute(2, 0, 1)


def _move(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict):
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return batch.to(device)
