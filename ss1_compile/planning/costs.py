"""What a layer costs: the numbers it stores, or its time on the device it is on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ss1_compile.experts import ExpertLinear, SS1ExpertLinear
from ss1_compile.kernels import cuda
from ss1_compile.modules import SS1Linear
from ss1_compile.planning.measure import dense_weight

_SECONDS = 0.05  # of timing per distinct layer, after one call to warm up
_MOST_CALLS = 50


def parameters(name: str, module: nn.Module, part: float = 1.0) -> float:
    """Numbers that take the place of W: z, and ``part`` of a learned sketch. No bias."""
    sketch = getattr(module, "sketch", None)
    own = [p for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()]
    total = sum(t.numel() for t in own if t is not module.bias and t is not sketch)
    if isinstance(sketch, Tensor) and sketch.is_floating_point():
        return total + part * sketch.numel()
    return float(total)


class Latency:
    """Microseconds per call of a layer, on the device that it is on.

    On CUDA, where the kernels run the layer, the expected time of its lowering (the table measured
    on that GPU, else the cost model: :mod:`ss1_compile.kernels.lowering`), which leaves launching
    out; elsewhere the median of calls in this process. Layers of equal sizes are timed once.

    Args:
        rows: name → rows per call, at least 1.
    """

    def __init__(self, rows: Mapping[str, int]) -> None:
        self._rows = rows
        self._known: dict[Any, float] = {}

    def __call__(self, name: str, module: nn.Module, part: float = 1.0) -> float:
        """Microseconds of one call, its sketch included, whoever shares it."""
        rows = self._rows[name]
        sizes = [(tuple(t.shape), t.dtype) for t in (*module.parameters(), *module.buffers())]
        key = (type(module), rows, str(dense_device(module)), tuple(sizes))
        if key not in self._known:
            expected = _expected(rows, module)
            self._known[key] = _timed(rows, module) if expected is None else expected
        return self._known[key]


def dense_device(module: nn.Module) -> torch.device:
    """Where the layer's weight is."""
    return next(module.parameters()).device


def _expected(rows: int, module: nn.Module) -> float | None:
    """From the kernels' table or model; ``None`` off CUDA and for layers they do not run."""
    if dense_device(module).type != "cuda" or isinstance(module, ExpertLinear | SS1ExpertLinear):
        return None
    if isinstance(module, SS1Linear):
        found = cuda.expected(rows, module.in_features, module.sketch, module.z, module.bias)
        return None if found is None else found.microseconds
    weight = dense_weight(module)
    n, k = weight.shape
    # Any layer that the kernels run states the time of its dense layer beside its own
    bias = module.bias if isinstance(module.bias, Tensor) else None
    size = min(k, 128)
    groups, rank = -(-k // size), max(8, size // 2 // 8 * 8)
    sketch = weight.new_empty(1, groups, size, rank)
    found = cuda.expected(rows, k, sketch, weight.new_empty(n, groups * rank), bias)
    return None if found is None else found.dense_microseconds


def _timed(rows: int, module: nn.Module) -> float:
    weight = module.z if hasattr(module, "z") else dense_weight(module)
    assert isinstance(weight, Tensor)
    experts = isinstance(module, ExpertLinear | SS1ExpertLinear)
    columns = module.in_features if hasattr(module, "z") else dense_weight(module).shape[-1]
    assert isinstance(columns, int)
    x = torch.randn(rows, columns, device=weight.device).to(weight.dtype)
    arguments: tuple[Tensor, ...] = (x,)
    if experts:  # the rows dealt out evenly
        count = weight.shape[0]
        ends = [(i + 1) * rows // count for i in range(count)]
        arguments = (x, torch.tensor(ends, dtype=torch.int32, device=weight.device))
    with torch.no_grad():
        module(*arguments)
        times: list[float] = []
        while len(times) < 3 or (sum(times) < _SECONDS and len(times) < _MOST_CALLS):
            _synchronize(weight.device)
            start = time.perf_counter()
            module(*arguments)
            _synchronize(weight.device)
            times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[len(times) // 2]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
