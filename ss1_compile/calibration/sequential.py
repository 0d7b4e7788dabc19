"""Sequential calibration: each layer's inputs as the compressed layers before it leave them.

Layers are taken in order of execution, those that read one input together. For each, the model is
run with everything before compressed, and, where the dense model's inputs are wanted too, once more
with the dense layers in place, batch by batch. Within a chain of blocks
(:mod:`ss1_compile.calibration.blocks`) only the block in question is run, on kept inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rich.progress import track
from torch import Tensor, nn

from ss1_compile.calibration.blocks import (
    Call,
    Chain,
    NoChainError,
    find_chain,
    first_tensor,
)
from ss1_compile.calibration.gradients import GradientMoments
from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.calibration.observer import LinearObserver, Quietly, attention_mask, run_batch
from ss1_compile.calibration.paired_moments import PairedMoments, ShortfallSums
from ss1_compile.calibration.reading import Reader, Run, ignore
from ss1_compile.calibration.statistics import (
    execution_groups,
    is_held_out,
    rebind,
    statistics_of,
    with_held_out,
)
from ss1_compile.compression.layers import Layer
from ss1_compile.errors import CalibrationError
from ss1_compile.modules import put_layer

_GRADIENT_BYTES = 2**32  # of layers whose gradients are collected together


class SequentialCalibration:
    """The statistics of the layers of a model, group by group, from the compressed prefix.

    Use it as a context manager; the dense layers are back in place when it ends.

    Args:
        model: any module.
        layers: those that will be replaced.
        data: batches, as for :func:`ss1_compile.calibrate`.
        paired: also collect the drift from the dense model's inputs.
        held_out: set every fourth batch's statistics apart, too.
        weigh_outputs: also collect the gradients in the dense model, as
            :func:`ss1_compile.calibrate` does, for some GiB of layers at a time.

    Attributes:
        unweighed: why there are no gradients although they were asked for, or ``None``.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        data: Iterable[Any],
        *,
        paired: bool,
        held_out: bool,
        weigh_outputs: bool = False,
    ) -> None:
        self._model, self._paired, self._held_out = model, paired, held_out
        self._weigh_outputs = weigh_outputs
        self.unweighed: str | None = None
        self._gradients: dict[str, Tensor] = {}
        self._asked: set[str] = set()
        self._layers = {layer.weight_name: layer for layer in layers}
        self._batches = list(data)
        if not self._batches:
            raise CalibrationError("the calibration data are empty")
        self._done: list[Layer] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> SequentialCalibration:
        self._stack.enter_context(_restored(self._model, list(self._layers.values())))
        self._stack.enter_context(Quietly(self._model))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def groups(self, progress: bool) -> Iterator[list[tuple[Layer, InputStatistics | None]]]:
        """The layers that read one input, with their statistics, in order of execution.

        What the caller makes of them (``replacement``) is put in their place before the next group.
        Layers that no batch reaches come last and have ``None``.
        """
        groups: list[list[str]] = []
        unreached = list(self._layers)
        for batch in self._batches:  # the first reaches everything, but for experts and the like
            groups += execution_groups(self._model, batch, unreached) if unreached else []
            reached = {name for group in groups for name in group}
            unreached = [name for name in unreached if name not in reached]
        self._order = [name for group in groups for name in group]
        stages = self._stages(groups)
        with contextlib.closing(stages):
            for group in track(
                stages, "compressing", len(groups), disable=not progress, transient=True
            ):
                yield group
                for layer, _ in group:
                    if layer.replacement is not None:
                        swap(self._model, layer)
                        self._done.append(layer)
        yield [(self._layers[name], None) for name in unreached]

    def _stages(
        self, groups: list[list[str]]
    ) -> Generator[list[tuple[Layer, InputStatistics | None]]]:
        chain = self._chain(groups)
        whole: Run = lambda i: run_batch(self._model, self._batches[i], None)  # noqa: E731
        if chain is None:
            for group in groups:
                yield self._collect(group, whole, whole, self._done)
            return
        blocks = [chain.block_of(group[0]) for group in groups]
        first = next(i for i, block in enumerate(blocks) if block is not None)
        last = max(i for i, block in enumerate(blocks) if block is not None)
        for group in groups[:first]:
            yield self._collect(group, whole, whole, self._done)
        yield from self._walk(chain, groups[first : last + 1])
        for group in groups[last + 1 :]:
            yield self._collect(group, whole, whole, self._done)

    def _chain(self, groups: list[list[str]]) -> Chain | None:
        """A chain of blocks whose groups run without others between, block after block."""
        names = [name for group in groups for name in group]
        with LinearObserver({}, ignore):
            chain = find_chain(self._model, names, self._batches[0])
        if chain is None:
            return None
        found = [{chain.block_of(name) for name in group} for group in groups]
        inside = [i for i, block in enumerate(found) if block != {None}]
        order = [next(iter(found[i])) for i in range(inside[0], inside[-1] + 1)]
        alone = all(len(found[i]) == 1 for i in inside) and None not in order
        return chain if alone and order == sorted(order, key=lambda b: b or 0) else None

    def _walk(
        self, chain: Chain, groups: list[list[str]]
    ) -> Iterator[list[tuple[Layer, InputStatistics | None]]]:
        prefix = list(self._done)
        calls: list[list[Call]] = []
        dense: list[Tensor] = []
        with LinearObserver({}, ignore):
            with dense_layers(self._model, prefix):
                for batch in self._batches:
                    calls.append(chain.record(self._model, batch))
                    dense.append(_taken(calls[-1][0]))
            compressed = list(dense)
            if prefix:
                compressed = [_taken(chain.record(self._model, b, 0)[0]) for b in self._batches]
        for index, name in enumerate(chain.names):
            inside: list[Layer] = []

            def run(inputs: list[Tensor], i: int, at: int = index, name: str = name) -> Any:
                # looked up anew: the block may itself be a layer that was replaced meanwhile
                return calls[i][at].run(self._model.get_submodule(name), inputs[i])

            here = partial(run, compressed)
            there = here if compressed[0] is dense[0] else partial(run, dense)
            for group in groups:
                if chain.block_of(group[0]) == index:
                    yield self._collect(group, here, there, inside)
                    inside += [self._layers[n] for n in group if self._layers[n].replacement]
            with LinearObserver({}, ignore):
                for i in range(len(self._batches)):
                    if self._paired:
                        with dense_layers(self._model, inside):
                            dense[i] = _output(run(dense, i))
                    compressed[i] = _output(run(compressed, i))

    def _collect(
        self, group: list[str], run: Run, run_dense: Run, replaced: Sequence[Layer]
    ) -> list[tuple[Layer, InputStatistics | None]]:
        """The statistics of one group.

        Args:
            group: names of weights.
            run: of the model as it is.
            run_dense: the same, of the dense model.
            replaced: layers that are compressed by now, of what is run.
        """
        weights = {name: self._layers[name].weight for name in group}
        moments = [PairedMoments(self._paired), PairedMoments(self._paired)]
        alone = group[0] if self._paired and len(group) == 1 else None  # may owe something
        shortfalls = [ShortfallSums(), ShortfallSums()]
        expected: dict[str, int] | None = None
        for i, batch in enumerate(self._batches):
            mask = attention_mask(batch)
            reader = Reader(weights, mask, expected, alone)
            reader.run(run, i)
            if reader.summand is None:
                alone = None
            other: Reader | None = None
            if self._paired and (replaced or run is not run_dense):
                other = Reader(weights, mask, expected, alone)
                with dense_layers(self._model, replaced):
                    other.run(run_dense, i)
            elif self._paired:
                other = reader
            expected = expected or reader.calls()
            out = self._held_out and is_held_out(i, len(self._batches))
            moments[out].add(reader.rows, None if other is None else other.rows)
            if alone is not None and other is not None and other is not reader:
                shortfalls[out].add(reader.rows[alone], reader.summand, other.summand)
        found = [m.finish() for m in moments]
        if alone is not None:
            for entries, shortfall in zip(found, shortfalls, strict=True):
                if alone in entries:
                    entries[alone].shortfall = shortfall.finish(entries[alone].count)
        entries = with_held_out(*found)
        self._add_gradients(group, entries)
        return [(self._layers[name], entries.get(name)) for name in group]

    def _add_gradients(self, group: list[str], entries: dict[str, InputStatistics]) -> None:
        """Give the entries their gradients, collecting those of further layers with them."""
        if not self._weigh_outputs or self.unweighed is not None:
            return
        if not self._asked.issuperset(group):
            start, left = self._order.index(group[0]), _GRADIENT_BYTES
            wanted: dict[str, Tensor] = {}
            for name in self._order[start:]:
                layer = self._layers[name]
                left -= 8 * layer.shape[1] ** 2
                if left < 0 and name not in group:
                    break
                wanted[name] = layer.weight
            self._asked |= wanted.keys()
            moments = GradientMoments(self._model, wanted)
            with dense_layers(self._model, self._done):
                for batch in self._batches:
                    moments.add(batch)
            self._gradients, self.unweighed = moments.finish(), moments.problem
        for name in group:
            if name in entries and name in self._gradients:
                gradients = self._gradients.pop(name)
                entries[name] = replace(entries[name], gradients=gradients)


def swap(model: nn.Module, layer: Layer) -> None:
    """Put the replacement of ``layer``, if it has one, into all its places."""
    if layer.replacement is not None:
        for name in layer.names:
            put_layer(model, name, layer.replacement)


@contextlib.contextmanager
def dense_layers(model: nn.Module, layers: Iterable[Layer]) -> Iterator[None]:
    """The dense modules of replaced ``layers`` back in place meanwhile."""
    replaced = [layer for layer in layers if layer.replacement is not None]
    for layer in replaced:
        for name in layer.names:
            model.set_submodule(name, layer.module)
    try:
        yield
    finally:
        for layer in replaced:
            swap(model, layer)


@contextlib.contextmanager
def _restored(model: nn.Module, layers: list[Layer]) -> Iterator[None]:
    """Put the dense modules back on leaving: nothing is final until everything has succeeded.

    Their earlier statistics come back too: those of a compressed prefix are of no use to a weight
    that stays dense.
    """
    before = [statistics_of(layer.weight) for layer in layers]
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    activations = [encoder.activation_relu_or_gelu for encoder in encoders]
    try:
        yield
    finally:
        for layer, statistics in zip(layers, before, strict=True):
            rebind(layer.weight, statistics)
            for name in layer.names:
                model.set_submodule(name, layer.module)
        for encoder, activation in zip(encoders, activations, strict=True):
            encoder.activation_relu_or_gelu = activation


def _taken(call: Call) -> Tensor:
    x, call.previous = call.previous, None
    if x is None:
        raise NoChainError("the first block reads no tensor")
    return x


def _output(result: Any) -> Tensor:
    x = first_tensor(result)
    if x is None:
        raise NoChainError("a block returns no tensor")
    return x
