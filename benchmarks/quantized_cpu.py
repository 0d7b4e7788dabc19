"""int8 layers on the CPU: dense and SS1, float32 and int8, in one run.

Run ``python benchmarks/quantized_cpu.py`` on a quiet machine (about 6 minutes; ``--quick`` takes
one). It prints a table and writes ``benchmarks/results/quantized_cpu.json`` row by row. The layers
of a row take turns, call by call, so that whatever else the machine does falls on all alike; every
figure is a median.

``dense_int8`` is ``torch.ao.quantization.quantize_dynamic``: one scale for all tokens, and seven
bits of the activations where the processor has no VNNI. The SS1 layers have a scale per token and
exact sums.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ss1_compile.config import LayerQuantization
from ss1_compile.kernels import quantized_native
from ss1_compile.modules import SS1Linear
from ss1_compile.quantization.projection import layer_of, project_layer
from ss1_compile.structure import SS1Structure

SHAPES = ((768, 3072), (3072, 768), (1024, 4096), (4096, 1024))
TOKENS = (1, 128, 512)
REDUCTIONS = (2, 4, 8)
FORMS = ("ss1", "ss1_int8_dynamic", "ss1_int8_weight_only")


def dense_int8(linear: nn.Linear) -> nn.Module:
    """The layer after PyTorch's dynamic quantisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8
        )
    return quantized[0]  # type: ignore[index]


def ss1_layers(linear: nn.Linear, reduction: int) -> dict[str, SS1Linear]:
    """The layer compressed, in float32 and in both int8 forms."""
    structure = SS1Structure.create(linear.in_features, linear.out_features, reduction)
    layers: dict[str, SS1Linear] = {}
    for form in FORMS:
        method: Any = form.removeprefix("ss1").removeprefix("_") or None
        quantization = None if method is None else LayerQuantization(method)
        projection = project_layer(
            linear.weight.detach(), structure, linear.bias.detach(), quantization=quantization
        )
        bias = nn.Parameter(linear.bias.detach())
        layers[form] = layer_of(projection, structure, bias, False, torch.float32)
    return layers


def medians(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Median microseconds per call of each, in turns, for about ``budget`` seconds in all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(next(iter(times.values()))) < 9:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def measure(in_features: int, out_features: int, tokens: int, budget: float) -> dict[str, Any]:
    """One row: the layers of one shape at one number of tokens."""
    linear = nn.Linear(in_features, out_features)
    modules: dict[str, nn.Module] = {"dense": linear, "dense_int8": dense_int8(linear)}
    for c in REDUCTIONS:
        for form, layer in ss1_layers(linear, c).items():
            modules[f"{form} c={c}"] = layer
    x = torch.randn(tokens, in_features)
    calls: dict[str, Callable[[], object]] = {
        name: (lambda module=module: module(x)) for name, module in modules.items()
    }
    times = {name: round(value, 1) for name, value in medians(calls, budget).items()}
    return {"in": in_features, "out": out_features, "tokens": tokens, "us": times}


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "vnni": bool(torch.cpu._is_vnni_supported()),
        "threads": threads,
        "torch": torch.__version__,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Dense time in µs, then how many times faster than dense each form is."""
    shown = Table(title="times over dense float32 (c = 2 / 4 / 8)")
    for name in ("layer", "T", "dense, µs", "dense int8", "SS1", "SS1 int8", "SS1 int8 weights"):
        shown.add_column(name, justify="right")
    for row in rows:
        us = row["us"]
        cells = [f"{us['dense'] / us['dense_int8']:.2f}"]
        for form in FORMS:
            cells.append(" / ".join(f"{us['dense'] / us[f'{form} c={c}']:.2f}" for c in REDUCTIONS))
        layer = f"{row['in']} → {row['out']}"
        shown.add_row(layer, str(row["tokens"]), f"{us['dense']:.0f}", *cells)
    return shown


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes, short; writes nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    assert quantized_native._library() is not None, "no C++ compiler"
    shapes = SHAPES[:2] if arguments.quick else SHAPES
    budget = 4.0 if arguments.quick else arguments.budget
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for in_features, out_features in shapes:
            for tokens in TOKENS:
                rows.append(measure(in_features, out_features, tokens, budget))
                if not arguments.quick:
                    result = {"environment": environment(arguments.threads), "rows": rows}
                    harness.write("quantized_cpu", result)
    Console(width=140).print(table(rows))


if __name__ == "__main__":
    main()
