"""``compare``: where did the accuracy go? Layer by layer, a dense model against its compression."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ss1_compile.calibration.observer import Forward, Quietly, run_batch
from ss1_compile.errors import CalibrationError, ConfigError
from ss1_compile.modules import SS1Linear
from ss1_compile.report import render


@dataclass(frozen=True)
class LayerComparison:
    """One SS1 layer against the dense layer of the same name, over all batches.

    Attributes:
        name: qualified name.
        own_sqnr: signal to noise of its output, in dB, both layers fed the dense model's inputs:
            what this layer loses by itself.
        sqnr: signal to noise, in dB, of its output in the compressed model: with everything that
            the layers before it lost.
        cosine: of the outputs of the two models, over all elements.
    """

    name: str
    own_sqnr: float
    sqnr: float
    cosine: float


@dataclass
class Comparison:
    """A row per SS1 layer, in model order. ``print(comparison)`` shows the table."""

    layers: list[LayerComparison] = field(default_factory=list)

    def __iter__(self) -> Iterator[LayerComparison]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def worst(self, count: int = 5) -> list[LayerComparison]:
        """The layers that lose most by themselves, worst first."""
        return sorted(self.layers, key=lambda layer: layer.own_sqnr)[:count]

    def to_json(self, indent: int | None = 2) -> str:
        """The rows as a JSON document; an infinite SQNR (no noise at all) is ``null``."""
        rows = [
            {k: None if v in (math.inf, -math.inf) else v for k, v in asdict(layer).items()}
            for layer in self.layers
        ]
        return json.dumps(rows, indent=indent)

    def __rich__(self) -> Table:
        worst = ", ".join(f"{x.name} ({x.own_sqnr:.1f} dB)" for x in self.worst(3))
        table = Table(title=f"worst by themselves: {worst}", title_justify="left")
        table.add_column("layer", overflow="fold")
        for name in ("own SQNR, dB", "SQNR, dB", "cosine"):
            table.add_column(name, justify="right")
        for x in self.layers:
            table.add_row(x.name, f"{x.own_sqnr:.1f}", f"{x.sqnr:.1f}", f"{x.cosine:.4f}")
        return table

    def __str__(self) -> str:
        return render(self)


class _Sums:
    """Running sums of one pair of signals, in float64."""

    def __init__(self) -> None:
        self.signal = self.noise = self.other = self.inner = 0.0

    def add(self, signal: Tensor, other: Tensor) -> None:
        a, b = signal.double(), other.double()
        self.signal += a.square().sum().item()
        self.other += b.square().sum().item()
        self.noise += (a - b).square().sum().item()
        self.inner += (a * b).sum().item()

    @property
    def sqnr(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        scale = math.sqrt(self.signal * self.other)
        return self.inner / scale if scale else float(self.signal == self.other)


def compare(
    dense: nn.Module,
    compressed: nn.Module,
    inputs: Iterable[Any],
    *,
    forward: Forward | None = None,
) -> Comparison:
    """Run both models on ``inputs`` and compare the outputs of every SS1 layer.

    Both run in eval mode (restored afterwards), without gradients. Memory: the inputs and outputs
    of all compared layers of the dense model, for one batch.

    Args:
        dense: the model before compression.
        compressed: the same model after :func:`ss1_compile.compress`.
        inputs: batches, as in :func:`ss1_compile.calibrate`.
        forward: ``forward(model, batch)`` in place of calling the model.

    Raises:
        ConfigError: ``compressed`` has no SS1 layers, or ``dense`` no layer of such a name.
        CalibrationError: there are no batches, or no layer was reached.
    """
    layers = {n: m for n, m in compressed.named_modules() if isinstance(m, SS1Linear)}
    if not layers:
        raise ConfigError("the second model has no SS1 layers; compress a copy of the first")
    partners = dict(dense.named_modules())
    missing = [name for name in layers if name not in partners]
    if missing:
        raise ConfigError(f"the dense model has no layer called {missing[0]!r}")

    own = {name: _Sums() for name in layers}
    total = {name: _Sums() for name in layers}
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            with torch.no_grad():
                own[name].add(output, layers[name].forward(args[0]))
            kept.setdefault(name, []).append(output.detach())

        return hook

    def match(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if kept.get(name):
                total[name].add(kept[name].pop(0), output)

        return hook

    seen = False
    with Quietly(dense), Quietly(compressed):
        for batch in inputs:
            seen = True
            kept.clear()
            for model, make, modules in ((dense, keep, partners), (compressed, match, layers)):
                handles = [modules[n].register_forward_hook(make(n)) for n in layers]
                try:
                    run_batch(model, batch, forward)
                finally:
                    for handle in handles:
                        handle.remove()
    rows = [
        LayerComparison(name, own[name].sqnr, total[name].sqnr, total[name].cosine)
        for name in layers
        if own[name].signal or own[name].noise
    ]
    if not rows:
        reason = "no SS1 layer was reached" if seen else "there are no batches"
        raise CalibrationError(f"nothing to compare: {reason}")
    return Comparison(rows)
