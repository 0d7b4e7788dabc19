"""Launch Triton kernels with little work on the host, and check operands once per form.

A :class:`Launch` is a kernel with everything fixed but its operands. The first call goes through
Triton's own launcher, which specialises and compiles; later ones go straight to the compiled
kernel. A launcher keeps one per combination of sizes (``lru_cache``), so that a call of known sizes
costs a look-up and the launch.

What Triton specialises on is kept apart: numbers belong to the ``Launch``; of every pointer the
dtype, whether it is None and whether it is a multiple of 16 are part of the look-up, and so is the
device, since a compiled kernel is loaded for one.

Importing this module does not need Triton. Under its interpreter nothing is compiled, and every
call takes the first way. Launches of a call that is recorded (:mod:`.program`) are written down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ss1_compile.kernels.program import active

_FORMS = 4096


class Block(NamedTuple):
    """How an operand is described to TMA: one field each of Triton's ``TensorDescriptor``."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]


class Launch:
    """A Triton kernel with its grid, numbers and constants; calling it launches it on operands.

    The kernel's parameters must be, in this order, the operands, the numbers, the constants.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: up to three sizes.
        numbers: the arguments behind the operands.
        constants: compile-time constants by name.
        blocks: for operands passed as TMA descriptors, by position.
        options: ``num_warps``, ``num_stages``, ``launch_pdl``.
    """

    __slots__ = ("_blocks", "_compiled", "_grid", "_kernel", "_numbers", "_options", "constants")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: Sequence[int | float],
        constants: dict[str, Any],
        *,
        blocks: dict[int, Block] | None = None,
        **options: Any,
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._numbers = tuple(numbers)
        self.constants = constants
        self._blocks = blocks or {}
        self._options = options
        self._compiled: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[Any, ...], Any]] = {}

    def __call__(self, first: Tensor, *others: Any) -> None:
        """Launch on the current stream of the current device, which must be the operands'.

        Args:
            first: decides the device.
            others: tensors, None, or tuples of tensors, numbers and None.
        """
        operands = (first, *others)
        key: list[Any] = [first.get_device()]
        arguments: list[Any] = []
        for operand in operands:
            _describe(operand, key, arguments)
        known = self._compiled.get(tuple(key))
        if active.recorder is not None:
            self._record(operands, tuple(key))
        elif known is None:
            self._first(operands, tuple(key))
        else:
            run, fixed, _ = known
            for position, block in self._blocks.items():
                if operands[position] is not None:
                    arguments[position] = _descriptor(operands[position], block)
            run(*arguments, *fixed)

    def _record(self, operands: tuple[Any, ...], key: tuple[Any, ...]) -> None:
        """Launch through Triton, and let the recorder write down the launch."""
        recorder = active.recorder
        self._first(operands, key)
        _, fixed, compiled = self._compiled.get(key, (None, (), None))
        if recorder is not None:
            recorder.launch(compiled, self._grid, (*self._described(operands), *fixed))

    def _described(self, operands: tuple[Any, ...]) -> list[Any]:
        """The operands, with Triton's descriptors of those that are described to TMA."""
        arguments = list(operands)
        for position, block in self._blocks.items():
            if arguments[position] is not None:
                arguments[position] = _checked_descriptor(arguments[position], block)
        return arguments

    def _first(self, operands: tuple[Any, ...], key: tuple[Any, ...]) -> None:
        """Launch through Triton, and keep what it compiled."""
        arguments = self._described(operands)
        compiled = self._kernel[self._grid](
            *arguments, *self._numbers, **self.constants, **self._options
        )
        if compiled is None:
            return
        names = self._kernel.arg_names[len(operands) + len(self._numbers) :]
        constants = tuple(self.constants[name] for name in names)
        fixed = (*self._numbers, *constants)
        self._compiled[key] = (compiled[self._grid], fixed, compiled)


def _describe(operand: Any, key: list[Any], arguments: list[Any]) -> None:
    """Append what Triton specialises on, and what the compiled kernel takes."""
    if operand is None:
        key.append(None)
        arguments.append(None)
    elif isinstance(operand, Tensor):
        # the address in place of the tensor spares the driver's query of where it points to
        address = operand.data_ptr()
        key += operand.dtype, address % 16 == 0
        arguments.append(address)
    elif isinstance(operand, tuple):
        key.append(len(operand))
        parts: list[Any] = []
        for part in operand:
            _describe(part, key, parts)
        arguments.append(tuple(parts))
    else:
        # types too, since 1 and 1.0 are equal but compile differently
        key += type(operand), operand
        arguments.append(operand)


def _checked_descriptor(base: Tensor, block: Block) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(base, *map(list, block))


def _descriptor(base: Tensor, block: Block) -> Any:
    """A descriptor without the checks, which base's alignment in the key and the block passed."""
    descriptor = _Descriptor()
    descriptor.base = base
    descriptor.shape, descriptor.strides, descriptor.block_shape = block
    return descriptor


class _Descriptor:
    """What a compiled kernel reads of Triton's ``TensorDescriptor``."""

    __slots__ = ("base", "block_shape", "shape", "strides")
    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    padding = "zero"
    round_f32_to_tf32 = False


def ceil_div(a: int, b: int) -> int:
    """``ceil(a / b)``; Triton's own is a function for kernels, slow to call on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``; 1 for ``n <= 1``."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


# --- operands -----------------------------------------------------------------------------------


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have: 227 KiB on sm_90, 99 on sm_86 and 89."""
    if device.type != "cuda":
        return 227 << 10
    found = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return found - 1024  # each program takes 1 KiB more than it asks for


def stages_within(room: int, most: int, stage: int) -> int:
    """How many stages a pipelined loop has: two at least, so many at most, ``stage`` bytes each."""
    return max(2, min(most, room // stage))


def once_per_form(check: Callable[..., object]) -> Callable[..., None]:
    """``check``, run once for each combination of dtypes, shapes and values that passes it.

    It may look at nothing else of its operands: tensors, lists of them, numbers, strings and None.
    """
    passed: set[tuple[Any, ...]] = set()

    @wraps(check)
    def checked(*operands: Any) -> None:
        form = tuple([_form(operand) for operand in operands])
        if form not in passed:
            check(*operands)
            if len(passed) >= _FORMS:
                passed.clear()
            passed.add(form)

    return checked


def _form(operand: Any) -> Any:
    if isinstance(operand, Tensor):
        return operand.dtype, operand.shape
    if isinstance(operand, (list, tuple)):
        return tuple([_form(part) for part in operand])
    return operand


class _Nothing:
    """A context that does nothing, without ``contextlib``'s class per use."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_NOTHING = _Nothing()


def device_of(x: Tensor) -> torch.cuda.device | _Nothing:
    """A context in which x's device is the current one; nothing is done where it is already."""
    index = x.get_device()
    if index < 0 or index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(index)
