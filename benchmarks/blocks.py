"""Transformer blocks on a GPU, dense against SS1, both compiled, and where their time goes.

    python benchmarks/blocks.py           # results/blocks.json

Feed-forward blocks with their norm and residual, and norm + q/k/v projections, bfloat16. Dense is
compiled with ``max-autotune-no-cudagraphs`` and by default (the faster counts); SS1 with
``backend="ss1"``, with and without the fusion passes (at c = 4). *GEMM floor*: the block's products
at ``1/c`` of the arithmetic and the measured rate of an 8192³ product. Profiled rows list every
kernel of one call.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

import harness
import torch
import torch.nn.functional as F
from compiled import KINDS, Case, Variant, measure, run, swap
from models import on_gpu, show
from torch import Tensor, nn

from ss1_compile.kernels import tune

REDUCTIONS = (2, 4, 8)
PROFILED = "c = 4"


class FeedForward(nn.Module):
    """``x + W2·gelu(W1·LN(x))``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[M, width]`` to the same."""
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


class GatedFeedForward(nn.Module):
    """``x + W2·(silu(Wg·n) * Wu·n)``, ``n = RMSNorm(x)``: Llama's block, no biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[M, width]`` to the same."""
        n = self.norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(n)) * self.up(n))
        return out


class Projections(nn.Module):
    """``q, k, v`` of ``LN(x)``, of which k and v may be narrower."""

    def __init__(self, width: int, kv_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_width, bias=False)
        self.v = nn.Linear(width, kv_width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[M, width]`` to ``[M, width]`` and twice ``[M, kv_width]``."""
        n = self.norm(x)
        return self.q(n), self.k(n), self.v(n)


BLOCKS: tuple[tuple[str, type[nn.Module], int, int], ...] = (
    ("feed-forward", FeedForward, 1024, 4096),
    ("feed-forward", FeedForward, 4096, 14336),
    ("gated feed-forward", GatedFeedForward, 4096, 14336),
    ("q, k, v", Projections, 1024, 1024),
    ("q, k, v", Projections, 4096, 1024),
)
ROWS = {1024: 16384, 4096: 8192}


def cases() -> Iterator[Case]:
    """A case per block; ``extra`` holds the multiplications per call."""
    for name, make, width, other in BLOCKS:
        rows = ROWS[width]
        weights = {
            FeedForward: 2 * width * other,
            GatedFeedForward: 3 * width * other,
            Projections: width * (width + 2 * other),
        }[make]
        yield Case(
            model=f"{name} {width}/{other}",
            size=str(rows),
            build=lambda make=make, width=width, other=other: on_gpu(lambda: make(width, other)),
            inputs=lambda rows=rows, width=width: (
                torch.randn(rows, width, device="cuda", dtype=torch.bfloat16),
            ),
            variants=[Variant(f"c = {c}", lambda _, c=c: c) for c in REDUCTIONS],
            profiled=("dense", PROFILED),
            extra={"multiplications": rows * weights},
        )


def unfused(case: Case, label: str, seconds: float) -> list[dict[str, Any]]:
    """The SS1 rows of one variant again without the fusion passes, profiled."""
    rows = []
    variant = next(variant for variant in case.variants if variant.label == label)
    for kind in KINDS:
        model = case.build()
        swap(model, variant.choose, kind, case.inputs())
        found = run(case, model, seconds, True, backend="ss1", options={"fuse": False})
        head = {"model": case.model, "size": case.size, "variant": label}
        rows.append({**head, "kind": kind, **found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=0.2, help="per measurement")
    parser.add_argument("--match", default="", help="only blocks whose name has this regex")
    options = parser.parse_args()
    ceilings = tune.ceilings()
    parts = ("blocks", "unfused")
    result: dict[str, Any] = {part: [] for part in parts}
    if (harness.RESULTS / "blocks.json").is_file():
        result = harness.read("blocks")
    result["environment"] = harness.environment()
    result["copy_tb_s"], result["matmul_tflop_s"] = (round(c, 3) for c in ceilings)
    for case in cases():
        if not re.search(options.match, case.model):
            continue
        for part in parts:
            result[part] = [row for row in result[part] if row["model"] != case.model]
        rows = measure(case, options.seconds)
        for row in rows:
            if row["kind"]:
                c = int(row["variant"].split()[-1])
                floor = 2 * row["multiplications"] / c / ceilings[1] / 1e9
                row["floor_ms"] = round(floor, 4)
                row["of_floor"] = round(floor / row["graph_ms"], 3)
        result["blocks"] += rows
        harness.write("blocks", result)
        result["unfused"] += unfused(case, PROFILED, options.seconds)
        show(rows)
        harness.write("blocks", result)


if __name__ == "__main__":
    main()
