"""The safetensors file of input statistics: one set of moments per input, and a JSON header."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.errors import CalibrationError

_FORMAT = "ss1-statistics"
_VERSION = "1"
_SYMMETRY = 1e-9


def write(
    path: str | os.PathLike[str], entries: Mapping[str, InputStatistics], unreached: Iterable[str]
) -> None:
    """Write the statistics of weights by name, and the names of those without."""
    distinct = {entry.of_inputs: entry for entry in entries.values()}
    index = {key: i for i, key in enumerate(distinct)}
    tensors: dict[str, Tensor] = {}
    for key, entry in distinct.items():
        tensors[f"{index[key]}.mean"] = entry.mean.contiguous()
        tensors[f"{index[key]}.second_moment"] = entry.second_moment.contiguous()
    header = {
        "entries": {name: index[entry.of_inputs] for name, entry in entries.items()},
        "counts": [entry.count for entry in distinct.values()],
        "unreached": list(unreached),
    }
    gradients: dict[str, int] = {}  # readers that do not know of them leave them out
    places: dict[int, int] = {}
    for name, entry in entries.items():
        if entry.gradients is not None:
            place = places.setdefault(id(entry.gradients), len(places))
            gradients[name] = place
            tensors[f"gradients.{place}"] = entry.gradients.contiguous()
    header["gradients"] = gradients
    save_file(
        tensors,
        os.fspath(path),
        {"format": _FORMAT, "version": _VERSION, "header": json.dumps(header)},
    )


def read(
    path: str | os.PathLike[str], device: torch.device | str
) -> tuple[dict[str, InputStatistics], list[str]]:
    """What :func:`write` was given, validated; see :meth:`.statistics.Statistics.load`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no statistics at {os.fspath(path)}")
    try:
        with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CalibrationError(f"{os.fspath(path)} cannot be read: {error}") from error
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise CalibrationError(
            f"{os.fspath(path)} is {metadata.get('format')!r} version "
            f"{metadata.get('version')!r}, not {_FORMAT!r} version {_VERSION!r}"
        )
    try:
        header = json.loads(metadata["header"])
        indices: dict[str, int] = {str(k): int(v) for k, v in header["entries"].items()}
        if min(indices.values(), default=0) < 0:
            raise ValueError("negative index")
        counts, unreached = list(header["counts"]), [str(n) for n in header["unreached"]]
        weighed = {str(k): int(v) for k, v in header.get("gradients", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CalibrationError(f"{os.fspath(path)}: damaged header ({error!r})") from error
    loaded: dict[int, InputStatistics] = {}
    for name, i in indices.items():
        if i in loaded:
            continue
        try:
            entry = InputStatistics(
                counts[i],
                tensors[f"{i}.mean"],
                tensors[f"{i}.second_moment"],
            )
        except (KeyError, IndexError) as error:
            raise CalibrationError(f"{name} in {os.fspath(path)}: entry is missing") from error
        problem = entry.problem() or _asymmetry(entry.second_moment)
        if problem:
            raise CalibrationError(f"{name} in {os.fspath(path)}: {problem}")
        loaded[i] = entry
    entries = {name: loaded[i] for name, i in indices.items()}
    for name, place in weighed.items():
        if name not in entries or f"gradients.{place}" not in tensors:
            raise CalibrationError(f"{name} in {os.fspath(path)}: gradients are missing")
        entries[name] = replace(entries[name], gradients=tensors[f"gradients.{place}"])
        problem = entries[name].problem()
        if problem:
            raise CalibrationError(f"{name} in {os.fspath(path)}: {problem}")
    return entries, unreached


def _asymmetry(second_moment: Tensor) -> str | None:
    gap = (second_moment - second_moment.t()).abs().amax()
    if bool(gap > _SYMMETRY * second_moment.abs().amax()):
        return f"second_moment is not symmetric (entries differ by {gap.item():.3g})"
    return None
