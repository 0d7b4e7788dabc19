"""The parameters of a compiled Triton kernel, as the driver takes them.

Triton's launcher drops compile-time constants, takes tuples apart, and passes what is described to
TMA as a ``CUtensorMap`` with its sizes and strides behind it. That differs between versions of
Triton, so what is found here is to be compared with the sizes in the kernel's PTX.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

_TENSOR_MAP_BYTES = 128


class Unrecordable(Exception):
    """A call did something that a program cannot say."""


class Parameter:
    """One parameter of a kernel: the bits of a number, or a tensor's address, or its TMA map."""

    __slots__ = ("base", "bits", "map", "size")

    def __init__(
        self, size: int, bits: int = 0, base: Tensor | None = None, map: bytes | None = None
    ) -> None:
        self.size, self.bits, self.base, self.map = size, bits, base, map


_FLOATS = {"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}


def parameters_of(compiled: Any, arguments: Sequence[Any]) -> Iterator[Parameter]:
    """What Triton passes for the arguments: no compile-time constants, tuples in parts."""
    signature = list(compiled.src.signature.values())
    described = iter(compiled.metadata.tensordesc_meta or ())
    for kind, value in zip(signature, arguments, strict=True):
        yield from _parameter(kind, value, described)


def _parameter(kind: Any, value: Any, described: Iterator[Any]) -> Iterator[Parameter]:
    if isinstance(kind, tuple):
        for part, inner in zip(kind, value, strict=True):
            yield from _parameter(part, inner, described)
    elif kind == "constexpr":
        return
    elif kind[0] == "*":
        yield Parameter(8, base=value)
    elif kind.startswith("tensordesc"):
        from triton.backends.nvidia.driver import make_tensordesc_arg

        tensor_map, *sizes = make_tensordesc_arg(value, next(described))
        dimensions = len(sizes) // 2
        yield Parameter(_TENSOR_MAP_BYTES, base=value.base, map=_tensor_map(tensor_map))
        for size in sizes[:dimensions]:
            yield Parameter(4, size)
        for stride in sizes[dimensions:]:
            yield Parameter(8, stride)
    else:
        yield _number(kind, value)


def _number(kind: str, value: Any) -> Parameter:
    if kind in _FLOATS:
        packed = struct.pack(_FLOATS[kind], value)
    elif kind == "bf16":
        packed = struct.pack("<f", value)[2:]
    elif re.fullmatch(r"[iu](1|8|16|32|64)", kind):
        size = max(1, int(kind[1:]) // 8)
        packed = int(value).to_bytes(size, "little", signed=value < 0)
    else:
        raise Unrecordable(f"a parameter of type {kind}")
    return Parameter(len(packed), int.from_bytes(packed.ljust(8, b"\0"), "little", signed=True))


def _tensor_map(described: Any) -> bytes:
    """The ``CUtensorMap`` in Triton's ``PyCUtensorMap``: behind the head, aligned to 128 bytes."""
    if type(described).__basicsize__ != 2 * _TENSOR_MAP_BYTES:
        raise Unrecordable("a TMA descriptor of another Triton")
    return ctypes.string_at(id(described) + _TENSOR_MAP_BYTES, _TENSOR_MAP_BYTES)


_ENTRY = re.compile(r"\.entry\s+\w+\s*\((.*?)\)", re.DOTALL)
_PARAMETER = re.compile(
    r"\.param(?:\s+\.align\s+\d+)?\s+\.[a-z]+(\d+)[^,\[]*?(?:\.align\s+\d+\s+)?\w+(?:\[(\d+)\])?\s*(?:,|$)"
)


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of every parameter of a kernel, in order, by its PTX.

    Raises:
        Unrecordable: if the text has no kernel.
    """
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise Unrecordable("no kernel in its PTX")
    return [
        int(bits) // 8 * int(count or 1) for bits, count in _PARAMETER.findall(entry[1].strip())
    ]
