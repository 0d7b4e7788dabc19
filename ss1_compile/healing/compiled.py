"""Run blocks and loss compiled while a model is healed.

Every block by itself, not the whole model: blocks of one form share their code, so that compiling
takes as long for thirty of them as for one, and the hooks that watch hidden states stay outside.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ss1_compile.errors import SS1Warning
from ss1_compile.healing.loss import Distillation, distance, mean_error

_FORMS = 1024


@contextmanager
def compiled(models: Sequence[nn.Module], loss_of: Distillation) -> Iterator[None]:
    """``torch.compile`` the blocks' forward passes and the loss, until the context is closed.

    Blocks that were left dense are compiled with the others. A model without repeated blocks is
    compiled as a whole.

    Args:
        models: that have the blocks of ``loss_of``.
        loss_of: what is minimised.
    """
    # Dynamo gives up after eight forms of a function, and planned blocks differ in their sizes
    limits = torch._dynamo.config.patch(recompile_limit=_FORMS, accumulated_recompile_limit=_FORMS)
    blocks = [block for model in models for block in _alike(model, loss_of.blocks)]
    forwards = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = torch.compile(block.forward)
        loss_of.distance = torch.compile(distance)
        loss_of.mean_error = torch.compile(mean_error)
        with limits:
            yield
    finally:
        loss_of.distance, loss_of.mean_error = distance, mean_error
        for block, forward in zip(blocks, forwards, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def compiled_if_it_works(
    models: Sequence[nn.Module], loss_of: Distillation, trial: Callable[[], None]
) -> ExitStack:
    """As :func:`compiled` until the stack is closed; undone with a warning if ``trial()`` fails."""
    with ExitStack() as stack:
        stack.enter_context(compiled(models, loss_of))
        try:
            trial()
        except Exception as error:
            # whatever a compiler fails with; what is no fault of its own comes again without it
            stack.close()
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
            warnings.warn(
                f"healing runs without torch.compile, several times as slowly: {reason}",
                SS1Warning,
                stacklevel=5,
            )
        return stack.pop_all()


def _alike(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks, and those beside them of the same classes; the model without any."""
    if not names:
        return [model]
    blocks = [model.get_submodule(name) for name in names]
    kinds = {type(block) for block in blocks}
    beside = model.get_submodule(names[0].rpartition(".")[0]).children()
    return [block for block in beside if type(block) in kinds]
