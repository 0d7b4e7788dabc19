"""Record what a call of an operator does, as a program that ``csrc/program.cpp`` repeats.

A program is a list of steps over *slots*, the call's tensors: first the operands, then whatever the
steps make. Tensors are found again by the storage that they view:

==========  ======================================================================================
allocation  a new slot of known sizes, strides and dtype
launch      of a compiled Triton kernel: its parameters' bytes, and which are a slot's address
call        of another operator, ``aten::bmm.out`` say, on views of slots; may make a slot
==========  ======================================================================================

Calls of one form (see ``executor.cpp``) do the same steps, since the implementations decide by
sizes, strides, dtypes, alignment and numbers only. What cannot be written down (a value read on the
host, a tensor from elsewhere) raises :class:`Unrecordable`; the call itself is not disturbed.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ss1_compile.kernels.parameters import Unrecordable, parameter_sizes, parameters_of

_DTYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
    torch.float8_e5m2: 23,
    torch.float8_e4m3fn: 24,
}
"""``c10::ScalarType``, whose numbers are fixed because files hold them."""

_FORMATS = {torch.contiguous_format: 0, torch.preserve_format: 1}

_ALLOCATIONS = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    }
)

# what a Triton that describes its kernels in another way may lead to
_FOREIGN = (
    Unrecordable,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
    struct.error,
)


class _Active(threading.local):
    recorder: Recorder | None = None


active = _Active()
"""The recorder of the call in progress on this thread, for :mod:`.launch`."""


class Recorder(TorchDispatchMode):
    """Records the calls made inside its ``with`` block.

    Args:
        operands: the operator's arguments: tensors, lists of them and other values.
        operator_number: ``(name, overload)`` → the number by which a program calls an operator.
    """

    def __init__(
        self, operands: Sequence[Any], operator_number: Callable[[str, str], int] | None = None
    ) -> None:
        super().__init__()
        self._number = operator_number
        self._slots: list[Tensor] = list(_tensors(operands))
        if not self._slots:
            raise Unrecordable("no operand is a tensor")
        self._inputs = len(self._slots)
        self._device = self._slots[0].device
        self._steps: list[list[int]] = []
        self._reason: str | None = None

    def __enter__(self) -> Recorder:
        super().__enter__()
        active.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        active.recorder = None
        super().__exit__(*error)

    # --- steps ----------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and write it down."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._reason is None:
            try:
                self._record(func, args, kwargs, result)
            except Unrecordable as error:
                self._reason = f"{func}: {error}"
        return result

    def _record(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        if func in _ALLOCATIONS:
            self._allocate(result)
            return
        mutable = func._schema.is_mutable
        results = list(_tensors([result]))
        if not results:
            raise Unrecordable("its result is no tensor")
        if not mutable and all(self._find(tensor) is not None for tensor in results):
            return  # views
        if self._number is None or (not mutable and not isinstance(result, Tensor)):
            raise Unrecordable("several new tensors")
        keeps = not mutable
        number = self._number(func._schema.name, func._schema.overload_name)
        words = [2, number, int(keeps), len(func._schema.arguments)]
        given = dict(kwargs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            given[argument.name] = value
        for argument in func._schema.arguments:
            if argument.name not in given:
                words.append(0)
                continue
            value = given[argument.name]
            if isinstance(argument.type, torch.TensorType) and isinstance(value, (int, float)):
                raise Unrecordable("a number in place of a tensor")
            words += self._argument(value)
        self._steps.append(words)
        if keeps:
            self._slots.append(result)

    def _allocate(self, made: Tensor) -> None:
        if made.device != self._device or made.layout != torch.strided:
            raise Unrecordable(f"an allocation on {made.device}")
        dtype = _DTYPES.get(made.dtype)
        if dtype is None:
            raise Unrecordable(f"no number for {made.dtype}")
        sizes, strides = list(made.shape), list(made.stride())
        contiguous = made.is_contiguous() and torch.empty(sizes, device="meta").stride() == tuple(
            strides
        )
        self._steps.append([0, dtype, int(contiguous), len(sizes), *sizes, len(strides), *strides])
        self._slots.append(made)

    def launch(self, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        """Write down the launch of a compiled Triton kernel.

        Args:
            compiled: Triton's compiled kernel; None, as its interpreter has it, cannot be recorded.
            grid: three sizes.
            arguments: all arguments, in the kernel's order, tensors in place of addresses and
                Triton's descriptors where they are described to TMA.
        """
        if self._reason is None:
            try:
                self._steps.append(self._launch(compiled, grid, arguments))
            except _FOREIGN as error:
                name = getattr(compiled, "name", "a kernel")
                self._reason = f"{name}: {type(error).__name__}: {error}"

    def _launch(self, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any]) -> list[int]:
        if compiled is None:
            raise Unrecordable("it was interpreted")
        metadata = compiled.metadata
        warps, clusters, shared = compiled.packed_metadata[:3]
        scratch = metadata.global_scratch_size or metadata.profile_scratch_size
        if clusters != 1 or scratch or metadata.launch_cooperative_grid:
            raise Unrecordable("clusters, scratch memory or a cooperative grid")
        parameters = list(parameters_of(compiled, arguments))
        sizes = parameter_sizes(compiled.asm["ptx"])
        given = [parameter.size for parameter in parameters]
        # what Triton adds behind ours are pointers to scratch memory, null here
        if given != sizes[: len(given)] or any(size != 8 for size in sizes[len(given) :]):
            raise Unrecordable(f"its parameters have {sizes} bytes, not {given}")
        values = [0] * len(sizes)
        patches: list[int] = []
        count = 0
        for position, parameter in enumerate(parameters):
            if parameter.base is None:
                values[position] = parameter.bits
                continue
            slot, offset = self._address(parameter.base)
            count += 1
            patches += [position, slot, offset, int(parameter.map is not None)]
            if parameter.map is not None:
                patches += struct.unpack("<16q", parameter.map)
        return [
            *(1, compiled.function, *grid, 32 * warps, shared, int(metadata.launch_pdl)),
            *(len(values), *values, count, *patches),
        ]

    def _argument(self, value: Any) -> list[int]:
        """An argument of a call: its kind, then its value."""
        if value is None:
            return [1]
        if isinstance(value, Tensor):
            return [2, *self._view(value)]
        if isinstance(value, bool):
            return [5, int(value)]
        if isinstance(value, int):
            return [3, value]
        if isinstance(value, float):
            return [4, *struct.unpack("<q", struct.pack("<d", value))]
        if isinstance(value, torch.memory_format) and value in _FORMATS:
            return [3, _FORMATS[value]]
        if isinstance(value, (list, tuple)) and all(type(part) is int for part in value):
            return [6, len(value), *value]
        raise Unrecordable(f"an argument {value!r}")

    # --- slots ----------------------------------------------------------------------------------

    def _find(self, tensor: Tensor) -> int | None:
        """The slot whose storage the tensor views; the one that begins there if there are more."""
        storage = tensor.untyped_storage()._cdata
        found = None
        for index, slot in enumerate(self._slots):
            if slot.untyped_storage()._cdata == storage:
                if slot.data_ptr() == tensor.data_ptr() and slot.dtype == tensor.dtype:
                    return index
                found = index if found is None else found
        return found

    def _address(self, tensor: Tensor) -> tuple[int, int]:
        """``(slot, bytes behind its begin)``."""
        slot = self._find(tensor)
        if slot is None:
            raise Unrecordable("a tensor that is neither an operand nor made by the call")
        return slot, tensor.data_ptr() - self._slots[slot].data_ptr()

    def _view(self, tensor: Tensor) -> list[int]:
        slot, offset = self._address(tensor)
        if tensor.dtype != self._slots[slot].dtype:
            raise Unrecordable(f"a view as {tensor.dtype}")
        sizes, strides = list(tensor.shape), list(tensor.stride())
        offset //= tensor.element_size()
        return [slot, offset, len(sizes), *sizes, len(strides), *strides]

    # --- result ---------------------------------------------------------------------------------

    def program(self, result: Tensor | tuple[Tensor, ...]) -> list[int]:
        """The program, as ``program.cpp`` reads it.

        Args:
            result: what the call returned.

        Raises:
            Unrecordable: if a step could not be written down, or an output is not one new tensor.
        """
        if self._reason is not None:
            raise Unrecordable(self._reason)
        outputs = (result,) if isinstance(result, Tensor) else result
        views = [self._view(output) for output in outputs]
        slots = {view[0] for view in views}
        if len(slots) < len(views) or min(slots) < self._inputs or any(v[1] for v in views):
            raise Unrecordable("outputs that share memory, or an operand's")
        steps = [word for step in self._steps for word in step]
        flat = [word for view in views for word in view]
        return [self._inputs, len(self._steps), *steps, len(views), *flat]


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
