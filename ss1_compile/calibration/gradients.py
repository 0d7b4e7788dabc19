"""What the model makes of a layer's outputs: second moments of gradients, without labels.

A layer's output error ``e = (W - Ŵ) x`` matters by what it does to the model's output. To first
order, with the layer's inputs and gradients taken as independent (K-FAC, ICML 2015, section 3.1;
Fisher-weighted SVD, ICLR 2022), that is ``E[eᵀ Γ e]`` with ``Γ = E[δ δᵀ]``, δ the gradient of the
model's loss with respect to the layer's output. A sketch depends on Γ through ``WᵀΓW = E[g gᵀ]``
alone, ``g = δ W`` being what the layer sends back to its input: ``[K, K]``, whatever N is.

The loss needs no labels. It is ``Σ v ∘ f(x)`` with random signs v, a Hutchinson estimate of
``Σ JᵀJ`` for the Jacobian J of f: every element of f counts alike. f is what the model returns; of
a language model, what its output embedding reads, which did better than the Fisher information
(benchmarks/NOTES.md). Where another model returns ``logits`` the loss is the cross-entropy with
labels drawn from its own distribution, which makes Γ the Fisher information.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss1_compile.calibration.moments import CHUNK_ELEMENTS, kept_rows
from ss1_compile.calibration.observer import Forward, LinearObserver, attention_mask, run_batch


class GradientMoments:
    """``E[g gᵀ]`` by weight, from a forward and a backward pass per batch.

    Only matrices that are multiplied as such are covered: an einsum's, a convolution's and stacks
    of experts are left out. Memory: ``8·K²`` bytes per weight on its device, and while a batch is
    run what autograd keeps of it, gradients of parameters not among it.

    Args:
        model: run as it is.
        weights: parameters of ``model``, by name.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._model = model
        self._weights = {name: w for name, w in weights.items() if w.dim() == 2}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._random = torch.Generator().manual_seed(0)
        self.problem: str | None = None
        """Why there are none, if the model does not allow it; further batches are not run then."""

    def add(self, batch: Any, forward: Forward | None = None) -> None:
        """Count the rows of a batch; of a padded one, those that its attention mask keeps."""
        if self.problem is not None or not self._weights:
            return
        mask = attention_mask(batch)
        try:
            with torch.enable_grad(), _frozen(self._model):
                probe = torch.zeros((), requires_grad=True)

                def on_output(name: str, dim: int, y: Tensor) -> Tensor:
                    seen: Tensor = _Seen.apply(
                        y, probe, lambda grad: self._absorb(name, dim, kept_rows(grad, mask))
                    )
                    return seen

                with LinearObserver(self._weights, _ignore, on_output), _read(self._model) as read:
                    output = run_batch(self._model, batch, forward)
                loss = self._loss(read or output, mask)
                if loss is None:
                    self.problem = "nothing that the model returns can be differentiated"
                    return
                torch.autograd.grad(loss, [probe], allow_unused=True)
        except (RuntimeError, TypeError) as error:  # what autograd and models refuse with
            lines = str(error).strip().splitlines() or ["no message"]
            self._fail(f"{type(error).__name__}: {lines[0]}")

    def finish(self) -> dict[str, Tensor]:
        """``E[g gᵀ]``, float64 ``[K, K]``, by weight; the sums are gone afterwards."""
        sums, self._sums = self._sums, {}
        return {name: total.div_(self._counts[name]) for name, total in sums.items()}

    def _absorb(self, name: str, dim: int, rows: Tensor) -> None:
        weight = self._weights[name].detach()
        weight = weight if dim == -1 else weight.t()
        if rows.shape[-1] != weight.shape[0] or self.problem is not None:
            return
        # The products of half-precision numbers are taken in float32, as their sums would overflow
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = self._sums.get(name)
        if total is None:
            size = weight.shape[1]
            total = torch.zeros(size, size, dtype=torch.float64, device=rows.device)
            self._sums[name] = total
        for chunk in rows.split(max(1, CHUNK_ELEMENTS // max(weight.shape))):
            g = (chunk.to(wide) @ weight.to(wide)).double()
            total.addmm_(g.t(), g)
        self._counts[name] = self._counts.get(name, 0) + len(rows)
        if not bool(torch.isfinite(total.diagonal()).all()):
            self._fail(f"the gradient of {name} is not finite in {rows.dtype}")

    def _fail(self, problem: str) -> None:
        self.problem = problem
        self._sums = {}

    def _loss(self, output: Any, mask: Tensor | None) -> Tensor | None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.requires_grad and logits.dim() >= 2:
            rows = _rows(logits, mask).float()
            return F.cross_entropy(rows, self._drawn(rows.detach().softmax(-1)), reduction="sum")
        losses = [
            (self._signs(rows) * rows).sum()
            for tensor in pytree.tree_leaves(output)
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.dim() > 0
            for rows in [_rows(tensor, mask)]
        ]
        return torch.stack([loss.float().cpu() for loss in losses]).sum() if losses else None

    def _drawn(self, distribution: Tensor) -> Tensor:
        """A class ``[M]`` for each row of probabilities ``[M, C]``; the same on every device."""
        point = torch.rand(len(distribution), 1, generator=self._random).to(distribution.device)
        found = (distribution.cumsum(-1) < point).sum(-1)
        return found.clamp(max=distribution.shape[-1] - 1)

    def _signs(self, like: Tensor) -> Tensor:
        drawn = torch.randint(0, 2, like.shape, generator=self._random) * 2 - 1
        return drawn.to(like.device, like.dtype)


class _Seen(torch.autograd.Function):
    """A copy of y whose gradient is shown on the way back; it makes y a part of the graph."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, probe: Tensor, on_gradient: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.on_gradient = on_gradient
        return y.clone()  # what follows may change it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        ctx.on_gradient(gradients[0])
        return gradients[0], None, None


def _rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """``[M, C]``: the rows of an output that count, with their graph."""
    if mask is not None and tensor.dim() > 2 and tensor.shape[:2] == mask.shape:
        tensor = tensor[mask.to(tensor.device)]
    return tensor.reshape(-1, tensor.shape[-1])


@contextmanager
def _read(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the output embedding of a language model reads meanwhile; empty if there is none."""
    found: list[Tensor] = []
    accessor = getattr(model, "get_output_embeddings", None)  # of Hugging Face's models
    head = accessor() if callable(accessor) else None
    if not isinstance(head, nn.Module):
        yield found
        return

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.extend(x for x in args[:1] if isinstance(x, Tensor) and x.requires_grad)

    handle = head.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient meanwhile: what theirs need is not kept."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _ignore(name: str, dim: int, x: Tensor) -> None:
    """For an observer of outputs."""
