"""The state of a healing on disk: one safetensors file, so that it is whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ss1_compile.errors import CheckpointError

STATE_FILE = "healing.safetensors"
_FORMAT = "ss1-healing/1"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # steps differ: blocks give some no gradient


@dataclass(frozen=True)
class HealingState:
    """What the tensors are of: the configuration, the number of batches, and the result so far."""

    config: dict[str, Any]
    batches: int
    result: dict[str, Any]


def write_state(
    directory: Path,
    state: HealingState,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
) -> None:
    """Write the trained parameters, AdamW's moments and the best parameters so far, if any.

    An earlier state is replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        tensors[f"value/{name}"] = parameter.detach().contiguous()
        for moment in _MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].contiguous()
    tensors |= {f"best/{name}": value.contiguous() for name, value in best.items()}
    metadata = {"format": _FORMAT, "state": json.dumps(asdict(state))}
    staged = directory / f".{STATE_FILE}.{os.getpid()}"
    try:
        save_file(tensors, staged, metadata)
        os.replace(staged, directory / STATE_FILE)
    finally:
        staged.unlink(missing_ok=True)


def read_state(
    directory: Path,
    wanted: HealingState,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> tuple[HealingState, dict[str, Tensor]] | None:
    """Put a state's values into the parameters and the optimiser; ``None`` if there is no state.

    Returns:
        What the tensors are of, and the best parameters by name (on the CPU), of a run that
        keeps them.

    Raises:
        CheckpointError: it is damaged, or of another configuration, model or number of batches.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is no state of a healing of this version")
        found = HealingState(**json.loads(metadata["state"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    differing = [key for key, value in wanted.config.items() if found.config.get(key) != value]
    if found.batches != wanted.batches:
        differing.append(f"number of batches ({found.batches}, now {wanted.batches})")
    if differing:
        raise CheckpointError(
            f"{path} is of a run with another {', '.join(differing)}; choose another directory, "
            f"or remove it to start again"
        )
    values, best = _named(tensors, "value/"), _named(tensors, "best/")
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    for part in (values, best) if wanted.config["keep_best"] else (values,):
        if shapes != {name: tuple(t.shape) for name, t in part.items()}:
            raise CheckpointError(f"{path} is of another model: its parameters differ")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(values[name])
            moments = {m: tensors[f"{m}/{name}"] for m in _MOMENTS if f"{m}/{name}" in tensors}
            if len(moments) == len(_MOMENTS):
                # Laid out and aligned as the optimiser's own, which rounds no differently then
                like = {m: torch.zeros_like(parameter) for m in _MOMENTS[1:]}
                fused = optimizer.defaults.get("fused")
                at = parameter.device if fused else moments["step"].device
                like["step"] = torch.zeros_like(moments["step"], device=at)
                optimizer.state[parameter] = {m: like[m].copy_(moments[m]) for m in _MOMENTS}
    return found, best


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
