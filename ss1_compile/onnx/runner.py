"""Running ONNX files, and comparing what they give."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx.reference
import onnxruntime as ort
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import (
    NotImplemented as NotImplementedByRuntime,
)
from torch import Tensor

from ss1_compile.errors import VerificationError

_Array = np.ndarray[Any, Any]


class Runner:
    """An ONNX file in ONNX Runtime, or in ``onnx.reference`` if that lacks a kernel (bfloat16).

    Raises:
        VerificationError: neither loads it.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.path = path
        self.session: Any = None
        try:
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if not isinstance(error, NotImplementedByRuntime):
                raise VerificationError(f"ONNX Runtime cannot load {path.name}: {error}") from error
            self.reference = onnx.reference.ReferenceEvaluator(str(path))
            self.name = "onnx.reference"
            inputs = onnx.load(path, load_external_data=False).graph.input
            self.inputs = {i.name: _dims(i) for i in inputs}
        else:
            self.name = "onnxruntime"
            self.inputs = {i.name: list(i.shape) for i in self.session.get_inputs()}

    def feeds(self, inputs: Sequence[Tensor]) -> dict[str, _Array]:
        """The inputs by name."""
        return {name: to_numpy(x) for name, x in zip(self.inputs, inputs, strict=True)}

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """All outputs, in order."""
        return [to_torch(array) for array in self.run_arrays(self.feeds(inputs))]

    def run_arrays(self, feeds: Mapping[str, _Array]) -> list[_Array]:
        """All outputs, in order.

        Raises:
            VerificationError: the runtime fails.
        """
        try:
            if self.session is None:
                return list(self.reference.run(None, dict(feeds)))
            return list(self.session.run(None, dict(feeds)))
        except Exception as error:
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            raise VerificationError(
                f"{self.name} cannot run {self.path.name} on {shapes}: {error}"
            ) from error


def race(runners: Sequence[Runner], feeds: Mapping[str, _Array]) -> list[float]:
    """Median milliseconds of each runner, taken in turns for about a second."""
    times: list[list[float]] = [[] for _ in runners]
    for runner in runners:
        runner.run_arrays(feeds)
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end or len(times[0]) < 5:
        for runner, taken in zip(runners, times, strict=True):
            start = time.perf_counter()
            runner.run_arrays(feeds)
            taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken) for taken in times]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``‖found - expected‖ / ‖expected‖`` in float64; infinite where one is finite alone."""
    a, b = found.detach().double(), expected.detach().double()
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf")
    a, b = torch.nan_to_num(a), torch.nan_to_num(b)
    size, difference = float(b.norm()), float((a - b).norm())
    return difference / size if size else difference


def to_numpy(tensor: Tensor) -> _Array:
    """A NumPy array of the same dtype; bfloat16 by way of ``ml_dtypes``."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: Any) -> Tensor:
    """The inverse of :func:`to_numpy`."""
    array = np.asarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array)


def _dims(info: onnx.ValueInfoProto) -> list[int | str]:
    dims = info.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims]
