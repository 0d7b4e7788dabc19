"""Record training steps in CUDA graphs: one launch in place of thousands.

A step of a small model keeps the host busy for several times as long as the GPU: on one H200 a
step of MiniLM (batch 128, compiled blocks) took 32 ms, of which the GPU worked 6.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ss1_compile.errors import SS1Warning
from ss1_compile.healing.update import Update

_WARM = 3  # an operator's third call is the first that repeats (kernels/executor.py)
_FORMS = 16


@contextmanager
def as_recorded() -> Iterator[None]:
    """Let models run as they will while they are recorded.

    Transformers looks at a mask's values, and leaves out a mask without effect, unless the passes
    are being recorded; what runs before the recording must be what is recorded.
    """
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
        yield


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    loss: Tensor


class Graphs:
    """A training step, recorded once for each form of batch: its structure, shapes and dtypes.

    The first 16 forms are recorded, other batches run as they are; also where recording fails, of
    which it warns once. All recordings share their memory.

    Args:
        passes: ``passes(batch)`` of a batch on the device: adds to the gradients and returns the
            loss, detached. What it does may depend on the batch's form only.
        update: trains the parameters by these gradients; it has been prepared.
        to_device: ``to_device(batch)``: its copy on the device.
    """

    def __init__(
        self,
        passes: Callable[[Any], Tensor],
        update: Update,
        to_device: Callable[[Any], Any],
    ) -> None:
        self._passes, self._update, self._to_device = passes, update, to_device
        self._graphs: dict[Any, _Graph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Any) -> Tensor:
        """Train on a batch; its loss before that."""
        leaves, spec = pytree.tree_flatten(batch)
        form = (spec, tuple((tuple(t.shape), t.dtype) for t in leaves if isinstance(t, Tensor)))
        graphs = self._graphs
        if form not in graphs and len(graphs) < _FORMS:
            tensors = all(isinstance(leaf, Tensor) for leaf in leaves)
            graphs[form] = self._recorded(leaves, spec) if tensors else None
        found = graphs.get(form)
        if found is None:
            return self._step(self._to_device(batch))
        for there, here in zip(found.inputs, leaves, strict=True):
            there.copy_(here if here.is_cuda else here.pin_memory(), non_blocking=True)
        found.graph.replay()
        return found.loss.clone()

    def _step(self, batch: Any) -> Tensor:
        loss = self._passes(batch)
        self._update()
        return loss

    def _recorded(self, leaves: list[Tensor], spec: Any) -> _Graph | None:
        inputs = [self._to_device(leaf).clone() for leaf in leaves]
        batch = pytree.tree_unflatten(inputs, spec)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream), as_recorded():
                for _ in range(_WARM):
                    self._update.clear()
                    self._passes(batch)
            torch.cuda.current_stream().wait_stream(stream)
            self._update.clear()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                loss = self._step(batch)
        except Exception as error:
            # whatever the model does that cannot be recorded: a wait for the GPU, mostly
            torch.cuda.current_stream().wait_stream(stream)
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
            if None not in self._graphs.values():
                warnings.warn(
                    f"healing runs without CUDA graphs where recording failed: {reason}",
                    SS1Warning,
                    stacklevel=6,
                )
            self._update.clear()
            return None
        return _Graph(graph, inputs, loss)
