"""Let C++ repeat calls that Python has made, so that an operator's launch costs no Python.

The CUDA implementations decide in Python what to launch, which costs the host more than a large
layer costs the GPU. ``csrc/executor.cpp`` takes the operators' place at their CUDA keys: the first
call of a *form* (sizes, strides, dtypes, alignment, numbers) runs in Python, the second is recorded
(:mod:`.program`), and all later ones are replayed without Python. Whatever Python decides must
follow from the form; :func:`.lowering.override` is made part of it.

The C++ is compiled with the toolchain that ``torch.compile`` uses on the CPU, in the background
from the first call on CUDA, and cached on disk where Inductor caches its own. Until it is there,
and where it cannot be had (no compiler, ``SS1_COMPILE_NATIVE=0`` in the environment), Python runs
all calls, with the same results.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ss1_compile.kernels import lowering
from ss1_compile.kernels.parameters import Unrecordable
from ss1_compile.kernels.program import Recorder

logger = logging.getLogger(__name__)

_DRIVER = (
    "cuLaunchKernelEx",
    "cuTensorMapReplaceAddress",
    "aoti_torch_get_current_cuda_stream",
    "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent",
)


class _Unavailable(Exception):
    """Why calls stay in Python."""


class Executor:
    """The C++ side, and which operators it runs.

    Args:
        key: the dispatch key at which it runs them, ``"CUDA"``.
        fallback: a library for twins of the operators, which keep the Python implementations.
        driver: addresses of the functions named in ``_DRIVER``; found where ``None``.
    """

    def __init__(
        self, key: str, fallback: torch.library.Library, driver: tuple[int, ...] | None = None
    ) -> None:
        self._key = key
        self._fallback = fallback
        self._driver = driver
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._names: dict[str, bool] = {}
        self._failure: str | None = None
        self._compiled: ctypes.CDLL | None = None
        self._driver_handle: int | None = None
        self.library: ctypes.CDLL | None = None
        self.settled = False

    def implement(
        self,
        library: torch.library.Library,
        name: str,
        schema: str,
        function: Callable[..., Any],
        *,
        differentiable: bool = False,
    ) -> None:
        """Register ``function`` for ``<library>::<name>``, and let C++ replay its calls.

        Args:
            library: the library that defines the operator.
            name: the operator.
            schema: its arguments and results, as in its definition.
            function: the implementation. What it does may depend on the form of a call only.
            differentiable: whether a Python kernel is registered for gradients, which C++ then
                passes where nothing requires one.
        """

        def starting(*operands: Any) -> Any:
            if not self.settled:
                self.advance()
            return function(*operands)

        def recorded(*operands: Any) -> Any:
            found = self.library
            if found is None or not found.ss1_wanted():
                return function(*operands)
            return self._record(found, function, operands)

        self._fallback.define(name + schema)
        self._fallback.impl(name, recorded, self._key)
        library.impl(name, starting, self._key)
        self._names[f"{library.ns}::{name}"] = differentiable
        if self.library is not None:
            self._install(self.library, f"{library.ns}::{name}")

    def advance(self, wait: bool = False) -> bool:
        """Begin to compile the C++, or put it in place if it is there by now.

        Args:
            wait: until it is compiled.

        Returns:
            Whether it is in place.
        """
        with self._lock:
            if not self.settled:
                try:
                    self._advance(wait)
                except _Unavailable as reason:
                    self.settled = True
                    # 25 to 95 µs on the host of an H200, where a large layer's kernels take 50
                    logger.warning(
                        "operators are launched from Python, three to six times as slowly as from "
                        "C++: %s",
                        reason,
                    )
        return self.library is not None

    def _advance(self, wait: bool) -> None:
        if self._thread is None:
            if os.environ.get("SS1_COMPILE_NATIVE", "1") == "0":
                self.settled = True
                return
            self._driver = self._driver or _find_driver()
            folder = resources.files(__package__).joinpath("csrc")
            files = (folder.joinpath(name) for name in ("program.cpp", "executor.cpp"))
            source = "\n".join(file.read_text("utf-8") for file in files)
            # Not in the thread: two threads that import modules of one circle can see halves.
            import torch._inductor.codecache  # noqa: F401

            self._thread = threading.Thread(target=self._compile, args=(source,), daemon=True)
            self._thread.start()
        if wait:
            self._thread.join()
        if self._thread.is_alive():
            return
        if self._compiled is None:
            raise _Unavailable(self._failure or "its C++ was not compiled")
        assert self._driver is not None
        _declare(self._compiled)
        self._driver_handle = self._compiled.ss1_driver(*self._driver)
        for name in self._names:
            self._install(self._compiled, name)
        follow = self._compiled.ss1_context
        lowering.follow(lambda forced: follow(_context(forced)))
        self.library = self._compiled
        self.settled = True

    def _compile(self, source: str) -> None:
        from torch._inductor.codecache import CppCodeCache

        try:
            # 16 s with either; it is nearly all parsing
            self._compiled = CppCodeCache.load(source, "cpu", extra_flags=("-O1",))
        except Exception as error:
            # whatever a toolchain fails with, in a thread that nobody waits for
            self._failure = str(error).strip().partition("\n")[0]

    def _install(self, library: ctypes.CDLL, name: str) -> None:
        twin = f"{self._fallback.ns}::{name.partition('::')[2]}"
        key, driver = self._key.encode(), self._driver_handle
        error = library.ss1_execute(name.encode(), twin.encode(), key, driver)
        if not error and self._names[name]:
            error = library.ss1_gate(name.encode(), f"Autograd{self._key}".encode())
        if error:
            raise _Unavailable(error.decode())

    def _record(
        self, library: ctypes.CDLL, function: Callable[..., Any], operands: tuple[Any, ...]
    ) -> Any:
        """Call ``function``, and give C++ the program of what it did."""

        def number(name: str, overload: str) -> int:
            found: int = library.ss1_operator(name.encode(), overload.encode())
            if found < 0:
                raise Unrecordable(f"no operator {name}.{overload}")
            return found

        recorder = Recorder(operands, number)
        with recorder:
            result = function(*operands)
        try:
            words = recorder.program(result)
        except Unrecordable as reason:
            logger.debug("a call stays in Python: %s", reason)
            words = []
        error = library.ss1_publish((ctypes.c_int64 * len(words))(*words), len(words))
        if error:
            raise RuntimeError(f"ss1: a recorded program was refused: {error.decode()}")
        return result


def _context(forced: str | None) -> int:
    return 0 if forced is None else 1 + lowering.NAMES.index(forced)


def _declare(library: ctypes.CDLL) -> None:
    text, integer, pointer = ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ss1_driver": (pointer, [pointer] * len(_DRIVER)),
        "ss1_execute": (text, [text, text, text, pointer]),
        "ss1_gate": (text, [text, text]),
        "ss1_operator": (integer, [text, text]),
        "ss1_wanted": (ctypes.c_int, []),
        "ss1_publish": (text, [ctypes.POINTER(integer), integer]),
        "ss1_context": (None, [integer]),
        "ss1_replays": (integer, []),
        "ss1_clear": (None, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _find_driver() -> tuple[int, ...]:
    """The addresses of ``_DRIVER`` in libcuda and PyTorch."""
    if not sys.platform.startswith("linux") or torch.version.cuda is None:
        raise _Unavailable("launching from C++ needs Linux and a PyTorch built for CUDA")
    folder = Path(torch.__file__).parent / "lib"
    try:
        libraries = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL(str(folder / "libtorch_cuda.so"))
    except OSError as error:
        raise _Unavailable(str(error)) from None
    found = []
    for name in _DRIVER:
        holder = next((library for library in libraries if hasattr(library, name)), None)
        if holder is None:
            raise _Unavailable(f"the driver has no {name}")
        found.append(ctypes.cast(getattr(holder, name), ctypes.c_void_p).value or 0)
    return tuple(found)


on_cuda = Executor("CUDA", torch.library.Library("ss1_python", "FRAGMENT"))
"""The executor of the operators' CUDA implementations."""
