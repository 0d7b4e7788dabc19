"""How good is a compressed model? Its outputs against the dense model's, on given batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ss1_compile.calibration.observer import Quietly, attention_mask, run_batch
from ss1_compile.errors import CalibrationError, ConfigError

Output = Callable[[nn.Module, Any], Tensor]
"""``output(model, batch)``: what of the model's results matters, ``[..., features]``."""

METRICS = {"cosine": True, "perplexity": False}
"""Name → whether more is better."""


def outputs(model: nn.Module, batch: Any, output: Output | None = None) -> tuple[Tensor, bool]:
    """The rows ``[M, features]`` of the model's output for a batch, and whether they are logits.

    Without ``output`` the model is called as :func:`ss1_compile.calibrate` calls it, and of its
    results ``logits`` is taken, else ``last_hidden_state``, else the first floating tensor. Rows
    that the batch's ``attention_mask`` leaves out are left out.

    Raises:
        CalibrationError: the model returns no floating tensor, or a batch of an unknown kind.
    """
    found, mask, logits = tokens(model, batch, output)
    if mask is not None:
        found = found[mask]
    return found.reshape(-1, found.shape[-1]), logits


def tokens(
    model: nn.Module, batch: Any, output: Output | None = None
) -> tuple[Tensor, Tensor | None, bool]:
    """The whole output, its mask if the batch has one that fits, and whether it is logits.

    As :func:`outputs`, but no row is left out, so that the host need not wait for their number.

    Returns:
        ``[B, T, features]`` with a bool ``[B, T]``, or ``[..., features]`` with ``None``. Numbers
        without features are rows of one.
    """
    if output is not None:
        found, logits = output(model, batch), False
        if not isinstance(found, Tensor):
            raise CalibrationError(f"output() must return a tensor, got {type(found).__name__}")
    else:
        found, logits = _tensor_of(run_batch(model, batch, None))
    if found.dim() < 2:
        found = found.reshape(-1, 1)
    return found, mask_of(found, batch), logits


def mask_of(found: Tensor, batch: Any) -> Tensor | None:
    """The batch's mask on the tensor's device if it fits ``[B, T, ...]``, else ``None``."""
    mask = attention_mask(batch)
    if mask is None or found.dim() < 3 or found.shape[:2] != mask.shape:
        return None
    return mask.to(found.device)


def _tensor_of(result: Any) -> tuple[Tensor, bool]:
    if isinstance(result, Tensor):
        return result, False
    parts: Iterable[Any] = ()
    if isinstance(result, Mapping):
        for name in ("logits", "last_hidden_state"):
            if isinstance(result.get(name), Tensor):
                return result[name], name == "logits"
        parts = result.values()
    elif isinstance(result, tuple | list):
        parts = result
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            return part, False
    raise CalibrationError(
        f"the model returns a {type(result).__name__} without a floating tensor; pass "
        f"output=lambda model, batch: ..."
    )


def divergence(dense: Tensor, compressed: Tensor, logits: bool) -> float:
    """Sum over rows ``[M, features]`` of what a compression changed; 0 where nothing.

    For logits ``KL(softmax dense ‖ softmax compressed)`` in nats; else ``‖Δ‖²`` over the mean
    square norm of the dense rows.
    """
    a, b = dense.double(), compressed.double()
    if logits:
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        return float(F.kl_div(b, a, reduction="sum", log_target=True).clamp(min=0))
    scale = a.square().sum(-1).mean()
    return float((a - b).square().sum() / scale.clamp(min=torch.finfo(torch.float64).tiny))


class Evaluation:
    """A figure of a model on fixed batches, against the dense model where the figure needs it.

    Args:
        name: ``"cosine"`` (mean cosine of output rows to the dense model's), ``"perplexity"``
            (``exp`` of the mean negative log-likelihood of the next token; needs ``logits`` and
            ``input_ids``), or a function of the model, which is then the figure.
        dense: the model before compression.
        batches: held-out batches.
        output: see :func:`outputs`; for the cosine.
    """

    def __init__(
        self,
        name: str | Callable[[nn.Module], float],
        dense: nn.Module,
        batches: Iterable[Any],
        output: Output | None = None,
    ) -> None:
        if isinstance(name, str) and name not in METRICS:
            raise ConfigError(
                f"metric must be one of {list(METRICS)} or a function of the model, got {name!r}"
            )
        self._function = name if callable(name) else None
        self.name = name if isinstance(name, str) else "metric"
        self._dense, self._batches, self._output = dense, list(batches), output

    def __call__(self, model: nn.Module) -> float:
        """The figure of ``model``, which runs in eval mode and without gradients.

        Raises:
            ConfigError: the user's function returns no finite number.
            CalibrationError: the perplexity of a model or of batches without what it needs.
        """
        if self._function is not None:
            with Quietly(model):
                value = float(self._function(model))
            if not math.isfinite(value):
                raise ConfigError(f"metric(model) returned {value}; it must be a finite number")
            return value
        with Quietly(model), Quietly(self._dense):
            if self.name == "perplexity":
                return self._perplexity(model)
            return self._cosine(model)

    def _cosine(self, model: nn.Module) -> float:
        total, rows = 0.0, 0
        for batch in self._batches:
            a, _ = outputs(self._dense, batch, self._output)
            b, _ = outputs(model, batch, self._output)
            total += F.cosine_similarity(a.double(), b.double(), dim=-1).sum().item()
            rows += len(a)
        return total / rows

    def _perplexity(self, model: nn.Module) -> float:
        total, tokens = 0.0, 0
        for batch in self._batches:
            ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
            if not isinstance(ids, Tensor):
                raise CalibrationError("perplexity needs batches with input_ids")
            logits = run_batch(model, batch, None)
            logits = logits.get("logits") if isinstance(logits, Mapping) else logits
            if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
                raise CalibrationError("perplexity needs a model that returns logits per token")
            targets = ids[:, 1:].to(logits.device)
            mask = attention_mask(batch)
            if mask is not None:
                targets = targets.masked_fill(~mask[:, 1:].to(logits.device), -100)
            flat = logits[:, :-1].flatten(0, 1).float()
            total += F.cross_entropy(flat, targets.flatten(), reduction="sum").item()
            tokens += int((targets != -100).sum())
        if not tokens:
            raise CalibrationError("perplexity needs batches with at least two tokens in a row")
        return math.exp(min(700.0, total / tokens))
