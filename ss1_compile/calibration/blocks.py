"""Run a model block by block: the inputs of one block are kept, the blocks before it are not run.

A chain of blocks is a ``ModuleList`` or ``Sequential`` whose members run once each and in order,
each on the output of the one before. That, and that nothing else that a block is given depends on
the layers that will change, is tested on the first batch; a model that fails the test is run as a
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ss1_compile.calibration.observer import run_batch


class _Previous:
    """Stands in a block's recorded arguments for the output of the block before."""


_PREVIOUS = _Previous()


_PLAIN = (Tensor, _Previous, type(None), bool, int, float, str, torch.dtype, torch.device)


class Stopped(Exception):
    """Raised out of a forward pass that has shown what was wanted."""


@dataclass
class Call:
    """The arguments of one call of a block; the previous block's output is replaced by a mark."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    previous: Tensor | None = None

    def run(self, block: nn.Module, x: Tensor) -> Any:
        """``block`` called with ``x`` in the place of the mark, which it may change in place."""
        given = x.clone()
        args = tuple(given if a is _PREVIOUS else a for a in self.args)
        kwargs = {k: given if a is _PREVIOUS else a for k, a in self.kwargs.items()}
        return block(*args, **kwargs)


def first_tensor(output: Any) -> Tensor | None:
    """The output of a block that the next one reads: itself, or the first of several."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def find_chain(model: nn.Module, weights: Sequence[str], first: Any) -> Chain | None:
    """The chain of blocks that holds most of the layers, or ``None`` if there is none to rely on.

    Args:
        model: in eval mode and without gradients.
        weights: qualified names of the parameters of the layers that will change.
        first: a batch.
    """
    best: tuple[int, str] | None = None
    for path, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        prefix = f"{path}." if path else ""
        held: dict[str, int] = {}
        for name in weights:
            if name.startswith(prefix):
                member = name[len(prefix) :].partition(".")[0]
                held[member] = held.get(member, 0) + 1
        # What lies outside the largest member: a list of two where one is nearly all is no chain
        score = sum(held.values()) - max(held.values(), default=0)
        if score > 0 and (best is None or score > best[0]):
            best = score, path
    if best is None:
        return None
    path = best[1]
    container = model.get_submodule(path) if path else model
    names = [f"{path}.{key}" if path else key for key, _ in container.named_children()]
    owners = {name.rpartition(".")[0] for name in weights}
    layers = [model.get_submodule(owner) for owner in owners]
    chain = Chain(names)
    try:
        calls = chain.record(model, first)
        with ExitStack() as hooks:
            for layer in layers:
                handle = layer.register_forward_hook(lambda module, args, output: output * 0.5)
                hooks.callback(handle.remove)
            changed = chain.record(model, first)
    except NoChainError:
        return None
    return chain if all(map(_same_beside, calls, changed)) else None


class NoChainError(Exception):
    """The members of a container are not run as a chain."""


@dataclass
class Chain:
    """Blocks that run once each and in order, by qualified name."""

    names: list[str]
    calls: list[list[Call]] = field(default_factory=list)
    """By batch and block; filled by the caller."""

    def block_of(self, name: str) -> int | None:
        """The index of the block that the parameter called ``name`` is in."""
        for index, block in enumerate(self.names):
            if name.startswith(f"{block}."):
                return index
        return None

    def record(self, model: nn.Module, batch: Any, last: int | None = None) -> list[Call]:
        """The calls of all blocks up to ``last`` in a forward pass, the first with its input.

        Raises:
            NoChainError: the blocks are not run as a chain.
        """
        blocks = [model.get_submodule(name) for name in self.names]
        if len({id(block) for block in blocks}) < len(blocks):
            raise NoChainError("a block stands in several places")
        calls: list[Call] = []
        output: list[Tensor | None] = [None]

        def before(index: int) -> Callable[..., None]:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if index != len(calls):
                    raise NoChainError("a block runs out of turn")
                x = output[0]
                if index == 0:
                    x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
                call = Call(
                    tuple(_PREVIOUS if a is x else a for a in args),
                    {k: _PREVIOUS if a is x else a for k, a in kwargs.items()},
                    x.clone() if index == 0 and x is not None else None,
                )
                marks = [a for a in (*call.args, *call.kwargs.values()) if a is _PREVIOUS]
                if x is None or len(marks) != 1 or not _is_plain((call.args, call.kwargs)):
                    raise NoChainError("a block reads something else than the block before")
                calls.append(call)
                if index == last:
                    raise Stopped

            return hook

        def after(block: nn.Module, args: Any, result: Any) -> None:
            output[0] = first_tensor(result)

        with ExitStack() as hooks:
            for index, block in enumerate(blocks):
                first = block.register_forward_pre_hook(before(index), with_kwargs=True)
                hooks.callback(first.remove)
                hooks.callback(block.register_forward_hook(after).remove)
            try:
                run_batch(model, batch, None)
            except Stopped:
                return calls
        if len(calls) != len(blocks):
            raise NoChainError("not every block runs")
        return calls


def _is_plain(value: Any) -> bool:
    """Whether ``value`` can be passed again: caches of keys and values, say, would have grown."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _same_beside(a: Any, b: Any) -> bool:
    """Whether two recorded calls are equal but for the output of the block before."""
    if isinstance(a, Call) and isinstance(b, Call):
        return _same_beside((a.args, a.kwargs), (b.args, b.kwargs))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same_beside(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same_beside, a, b))
    return a is _PREVIOUS or bool(a == b)
