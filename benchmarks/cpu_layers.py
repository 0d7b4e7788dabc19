"""Dense against SS1 on the CPU, layer by layer, and the sketch against a copy of the same bytes.

Run ``python benchmarks/cpu_layers.py``; it prints two tables and writes
``benchmarks/results/cpu_layers.json``. Dense and SS1 take turns, call by call, so that whatever
else the machine does falls on both alike; every figure is a median.

The floor of an SS1 layer is its matrix products alone, on a sketch that is ready: the rest is what
the sketch and the operator's overhead cost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ss1_compile.kernels import native, portable
from ss1_compile.structure import SS1Structure

SHAPES = ((768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024))
TOKENS = (1, 16, 128, 512, 2048)
REDUCTIONS = (2, 4, 8)


def medians(functions: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Median seconds per call of each function, in turns, for about ``budget`` seconds in all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
        function()
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times[next(iter(times))]) < 7:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    tokens: int, in_features: int, out_features: int, budget: float
) -> list[dict[str, Any]]:
    """One row per reduction for one shape and number of tokens (float32, with bias)."""
    x = torch.randn(tokens, in_features)
    weight, bias = torch.randn(out_features, in_features), torch.randn(out_features)
    y, copy = torch.empty(tokens, out_features), torch.empty_like(x)
    functions: dict[str, Callable[[], object]] = {"dense": lambda: F.linear(x, weight, bias)}
    # The sketch reads x and, with J = c, writes as many bytes; so does a copy into ready memory.
    functions["copy"] = lambda: copy.copy_(x)
    for c in REDUCTIONS:
        structure = SS1Structure.create(in_features, out_features, c)
        code, reduced = structure.code, structure.reduced_features
        z = torch.randn(out_features, reduced)
        ready = torch.ops.ss1.sketch(x, code, reduced)
        kernel = native._kernel("sketch", x.dtype)
        assert kernel is not None, "no C++ compiler: this would measure the portable kernels"

        def ss1(code: torch.Tensor = code, z: torch.Tensor = z) -> torch.Tensor:
            result: torch.Tensor = torch.ops.ss1.linear(x, code, z, bias)
            return result

        def sketch(
            code: torch.Tensor = code,
            ready: torch.Tensor = ready,
            kernel: native.Kernel = kernel,
        ) -> None:
            native._run(kernel, x, code, ready)

        def gemm(ready: torch.Tensor = ready, z: torch.Tensor = z) -> None:
            portable.grouped_matmul(ready, z, bias, y)

        functions |= {f"ss1 {c}": ss1, f"sketch {c}": sketch, f"gemm {c}": gemm}
    seconds = medians(functions, budget)
    return [
        {
            "tokens": tokens,
            "in_features": in_features,
            "out_features": out_features,
            "reduction": c,
            "dense_ms": 1e3 * seconds["dense"],
            "ss1_ms": 1e3 * seconds[f"ss1 {c}"],
            "sketch_ms": 1e3 * seconds[f"sketch {c}"],
            "gemm_ms": 1e3 * seconds[f"gemm {c}"],
            "copy_ms": 1e3 * seconds["copy"],
            "speedup": seconds["dense"] / seconds[f"ss1 {c}"],
            "fraction_of_floor": seconds[f"gemm {c}"] / seconds[f"ss1 {c}"],
        }
        for c in REDUCTIONS
    ]


def cpu_name() -> str:
    """The processor's name, as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def layers_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="y = x Wᵀ + b in float32: dense against SS1 (ms)", title_justify="left")
    for name in ("K → N", "tokens", "c", "dense", "SS1", "speed-up", "products alone", "of floor"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['in_features']} → {row['out_features']}",
            str(row["tokens"]),
            str(row["reduction"]),
            f"{row['dense_ms']:.3f}",
            f"{row['ss1_ms']:.3f}",
            f"{row['speedup']:.2f}×",
            f"{row['gemm_ms']:.3f}",
            f"{row['fraction_of_floor']:.0%}",
        )
    return table


def sketch_table(rows: list[dict[str, Any]]) -> Table:
    title = "The sketch against a copy of the same bytes, into memory that is ready (ms)"
    table = Table(title=title, title_justify="left")
    for name in ("K", "tokens", "c = J", "sketch", "copy", "sketch / copy"):
        table.add_column(name, justify="right")
    seen = set()
    for row in rows:
        key = (row["in_features"], row["tokens"], row["reduction"])
        if key not in seen:
            seen.add(key)
            ratio = f"{row['sketch_ms'] / row['copy_ms']:.1f}"
            times = (f"{row['sketch_ms']:.3f}", f"{row['copy_ms']:.3f}")
            table.add_row(*map(str, key), *times, ratio)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent / "results" / "cpu_layers.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape and token count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cases = [(tokens, *shape) for shape in SHAPES for tokens in TOKENS]
    with torch.inference_mode():
        rows = [
            row for case in track(cases, "Measuring") for row in measure(*case, arguments.seconds)
        ]
    console = Console(width=110)
    console.print(layers_table(rows))
    console.print(sketch_table(rows))
    result = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
