"""The second half of a training step: clip the gradients and step AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from ss1_compile.healing.config import HealConfig


class Update:
    """AdamW on clipped gradients, which are None afterwards.

    With ``cuda_graphs`` it can be part of a recording: the rate and the number of steps are then
    tensors on the device, so that replays go on with them.

    Args:
        parameters: that are trained, float32.
        config: has the rate, the clipping and whether steps are recorded.
        device: of the parameters.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: HealConfig, device: torch.device
    ) -> None:
        self.parameters = list(parameters)
        self._config = config
        rate = config.learning_rate
        self._rate = torch.tensor(rate, device=device) if config.cuda_graphs else None
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=rate if self._rate is None else self._rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=device.type == "cuda" or None,
            capturable=config.cuda_graphs,
        )

    def __call__(self) -> None:
        """One step."""
        nn.utils.clip_grad_norm_(self.parameters, self._config.clip)
        self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        """No gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def set_rate(self, factor: float) -> None:
        """From the next step on, also of those that are recorded: ``factor`` of the greatest."""
        rate = self._config.learning_rate * factor
        if self._rate is not None:
            self._rate.fill_(rate)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def prepare(self) -> None:
        """Make the moments that there are none of yet.

        The first step would; in a recording each replay would set them to zero again.
        """
        state = self.optimizer.state
        kept = dict(state)
        self.optimizer.state = defaultdict(dict)
        self.set_rate(0.0)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self()
        for moments in self.optimizer.state.values():
            moments["step"].zero_()
        self.optimizer.state.update(kept)
