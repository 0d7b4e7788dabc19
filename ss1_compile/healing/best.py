"""The parameters of the best evaluation so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ss1_compile.errors import ConfigError
from ss1_compile.evaluation import METRICS, Evaluation


class Best:
    """Keeps the trained parameters of the best figure, in the host's memory.

    Args:
        more_is_better: of the figures.
    """

    def __init__(self, more_is_better: bool) -> None:
        self._more_is_better = more_is_better
        self._figure: float | None = None
        self.step = 0
        self.values: dict[str, Tensor] = {}

    def offer(self, figure: float, step: int, trained: Mapping[str, nn.Parameter]) -> None:
        """Keep the parameters if there is no better figure; of equal ones the first counts."""
        if self._is_best(figure):
            self._figure, self.step = figure, step
            self.values = {n: p.detach().to("cpu", copy=True) for n, p in trained.items()}

    def resume(self, curve: list[dict[str, Any]], values: dict[str, Tensor]) -> None:
        """Of a run so far, from its curve and what it had kept."""
        for entry in curve:
            figure = entry.get("metric")
            if figure is not None and self._is_best(figure):
                self._figure, self.step = figure, entry["step"]
        self.values = values

    def put_back(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Give the parameters the values that were kept."""
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(self.values[name])

    def _is_best(self, figure: float) -> bool:
        if self._figure is None:
            return True
        return figure > self._figure if self._more_is_better else figure < self._figure


def best_of(
    metric: str | Callable[[nn.Module], float],
    more_is_better: bool | None,
    evaluation: Evaluation | None,
) -> Best:
    """For the figures of ``evaluation``; ``more_is_better`` counts where the metric is a function.

    Raises:
        ConfigError: nothing is evaluated, or it is not known what is best.
    """
    if evaluation is None:
        raise ConfigError("keep_best needs held_out, or a function as metric, to evaluate")
    more = METRICS[metric] if isinstance(metric, str) else more_is_better
    if more is None:
        raise ConfigError(
            "keep_best needs to know what is best of a metric that is a function: pass "
            "more_is_better=True or more_is_better=False"
        )
    return Best(more)
