"""Writing ONNX files: all of it or nothing, and weights beyond 2 GiB beside the graph."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from ss1_compile.errors import ConfigError

ExternalData = bool | Literal["auto"]

LARGEST_FILE = 2**31 - 2**24
"""Bytes of weights up to which one file holds them: protobuf stops at 2 GiB, graph included."""


def check_target(path: str | os.PathLike[str], external_data: ExternalData) -> Path:
    """The path to write to.

    Raises:
        ConfigError: its directory does not exist, or ``external_data`` is none of its values.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ConfigError(f"path: there is no directory {target.parent}; create it")
    if external_data not in (True, False, "auto"):
        raise ConfigError(f"external_data must be True, False or 'auto', got {external_data!r}")
    return target


def save_model(model: ir.Model, path: Path, external_data: ExternalData = "auto") -> None:
    """Write ``path``, and ``<path>.data`` beside it if the weights are to be external.

    Raises:
        ConfigError: ``external_data=False`` and the weights do not fit one file.
    """
    size = weight_bytes(model)
    if external_data is False and size > LARGEST_FILE:
        raise ConfigError(
            f"the weights are {size / 2**30:.1f} GiB and one file holds less than 2; use "
            f"external_data='auto'"
        )
    external = size > LARGEST_FILE if external_data == "auto" else external_data
    ir.save(model, path, external_data=f"{path.name}.data" if external else None)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A directory on the file system of ``target`` that is removed in the end."""
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield stage
    finally:
        shutil.rmtree(stage)


def publish(stage: Path, target: Path) -> int:
    """Move the model called ``target.name`` and its data out of ``stage``; their bytes.

    Data of an earlier model under this name are removed if the new one has none.
    """
    data = f"{target.name}.data"
    total = 0
    if (stage / data).exists():
        total += (stage / data).stat().st_size
        (stage / data).replace(target.parent / data)
    else:
        (target.parent / data).unlink(missing_ok=True)
    total += (stage / target.name).stat().st_size
    (stage / target.name).replace(target)
    return total
