"""What weights read in one forward pass, and what one weight's outputs are added to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ss1_compile.calibration.blocks import Stopped
from ss1_compile.calibration.moments import input_key, kept_rows
from ss1_compile.calibration.observer import LinearObserver

Run = Callable[[int], Any]
"""Runs the model, or one block of it, on the batch of that index."""

_SUMS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}


class Reader:
    """The rows that weights read in one forward pass, by weight and call.

    Args:
        weights: by name.
        mask: of rows that count.
        expected: the calls of each weight after which nothing more is awaited.
        followed: the weight whose outputs are followed into a sum, or ``None``.

    Attributes:
        rows: ``[M, K]`` that each weight has read, call by call.
        summand: ``[M, N]``, what the outputs of the weight that is followed are added to; ``None``
            if they are used otherwise, or more than once.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        mask: Tensor | None,
        expected: Mapping[str, int] | None,
        followed: str | None = None,
    ) -> None:
        self._weights, self._mask, self._expected = weights, mask, expected
        self._followed = followed
        self._output: Tensor | None = None
        self.summand: Tensor | None = None
        self._kept: dict[Any, Tensor] = {}
        self.rows: dict[str, list[Tensor]] = {}

    def run(self, run: Run, index: int) -> None:
        """Run the batch of that index, as far as something is awaited from it."""
        follow = self._followed is not None
        on_output = self._on_output if follow else None
        with contextlib.suppress(Stopped), contextlib.ExitStack() as stack:
            stack.enter_context(LinearObserver(self._weights, self._on_input, on_output))
            if follow:
                stack.enter_context(_Sums(self._on_sum))
            run(index)
        self._output = None
        if self._followed is not None and len(self.rows.get(self._followed, ())) != 1:
            self.summand = None

    def calls(self) -> dict[str, int] | None:
        """How often each weight was used, if all were used once: else none can be awaited."""
        counts = {name: len(rows) for name, rows in self.rows.items()}
        once = len(counts) == len(self._weights) and set(counts.values()) == {1}
        return counts if once else None

    def _on_input(self, name: str, dim: int, x: Tensor) -> None:
        key = input_key(x)
        rows = self._kept.get(key) if key is not None else None
        if rows is None:
            rows = kept_rows(x, self._mask)
            if rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                rows = rows.clone()  # what follows may change x in place
            if key is not None:
                self._kept[key] = rows
        self.rows.setdefault(name, []).append(rows)
        read = self._expected is not None and len(self.rows) == len(self._expected)
        if read and self._followed is None:
            raise Stopped

    def _on_output(self, name: str, dim: int, y: Tensor) -> Tensor:
        self._output = y
        return y

    def _on_sum(self, a: Tensor, b: Tensor) -> None:
        y = self._output
        if y is None or self.summand is not None or a.numel() != b.numel():
            return
        for mine, other in ((a, b), (b, a)):
            if mine.data_ptr() == y.data_ptr() and mine.numel() == y.numel():
                rows = kept_rows(other, self._mask)
                same = rows.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
                self.summand = rows.clone() if same else rows
                if self._expected is not None:
                    raise Stopped
                return


class _Sums(TorchFunctionMode):
    """Call ``on_sum(a, b)`` before each plain sum of two tensors."""

    def __init__(self, on_sum: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._on_sum = on_sum

    def __torch_function__(
        self,
        func: Callable[..., Any],
        overriding: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _SUMS and len(args) == 2 and not kwargs:
            a, b = args
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                self._on_sum(a, b)
        return func(*args, **(kwargs or {}))


def ignore(name: str, dim: int, x: Tensor) -> None:
    """For an observer that is there to keep fused operators from hiding the layers."""
