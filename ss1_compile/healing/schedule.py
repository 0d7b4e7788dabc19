"""How far a healing is: which phase, how much is left, and the learning rate that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ss1_compile.healing.config import HealConfig

_WARM_STEPS = 100  # by the clock; a hundred steps into a run, AdamW's moments mean something


def spent(curve: Sequence[dict[str, Any]], seconds: float) -> float:
    """Seconds of the end-to-end phase, of those of the whole training."""
    before = 0.0
    for entry in curve:  # of thousands, and at every step: those of the blocks are the first
        if entry["phase"] != "blocks":
            break
        before = entry["seconds"]
    return seconds - before


def is_over(config: HealConfig, step: int, seconds: float) -> bool:
    """Whether ``step`` steps, and ``seconds`` end to end, are all; there is one step at least."""
    if step < config.block_steps:
        return False
    if config.seconds is None:
        return step >= config.block_steps + config.steps
    return step > config.block_steps and seconds >= config.seconds


def rate(config: HealConfig, step: int, seconds: float) -> float:
    """Of the learning rate: up over 5 % of the phase, down to nothing along a cosine.

    By the clock up over 100 steps: compiling may take those 5 %.

    Args:
        config: has the lengths.
        step: that is to come, from 0, block by block or end to end.
        seconds: end to end so far.
    """
    blocks = step < config.block_steps
    if config.seconds is not None and not blocks:
        risen = min(1.0, (step - config.block_steps + 1) / _WARM_STEPS)
        return risen * _fallen(min(1.0, seconds / config.seconds))
    at = step if blocks else step - config.block_steps
    length = config.block_steps if blocks else config.steps
    warm = max(1, round(0.05 * length))
    return (at + 1) / warm if at < warm else _fallen((at - warm) / max(1, length - warm))


def _fallen(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def bar(progress: bool) -> Progress:
    """Shows steps, or seconds, the time left and the loss."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=Console(stderr=True),
        transient=True,
        disable=not progress,
    )
