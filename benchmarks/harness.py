"""What the benchmarks share: the environment, the floor of a layer, and JSON."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Versions and the GPU, for the head of a results file."""
    import torch
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\n")[0]
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "driver": driver,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def floor_us(m: int, k: int, n: int, c: float, copy_tb_s: float, tflop_s: float) -> float:
    """``max(2·M·N·K/c ÷ GEMM rate, (M·K + N·K/c + M·N)·2 bytes ÷ copy bandwidth)`` in µs."""
    arithmetic = 2 * m * n * k / c / tflop_s / 1e6
    traffic = (m * k + n * k / c + m * n) * 2 / copy_tb_s / 1e6
    return max(arithmetic, traffic)


def geomean(values: Iterable[float]) -> float:
    """Geometric mean."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def write(name: str, result: dict[str, Any]) -> Path:
    """``results/<name>.json``: one row per line, for readable diffs."""
    head = {key: value for key, value in result.items() if not isinstance(value, list)}
    parts = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, rows in result.items():
        if isinstance(rows, list):
            body = ",\n".join(f"    {json.dumps(row)}" for row in rows)
            parts.append(f"  {json.dumps(key)}: [\n{body}\n  ]")
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    return path


def read(name: str) -> dict[str, Any]:
    """A results file."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result
