"""The demo's tables and its plot, made from its JSON alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from ss1_compile.errors import MissingPackageError

QUALITY_COLUMNS = (
    "model",
    "linears MiB",
    "model MiB",
    "output error",
    "cosine",
    "rank corr.",
    "title → body",
    "sections",
)
SENTENCE_COLUMNS = ("model", "output error", "cosine", "rank corr.")
SPEED_COLUMNS = ("what", "c", "ms", "against dense")


def require_packages() -> None:
    """Raise :class:`MissingPackageError` before the work rather than after it."""
    for module in ("transformers", "scipy", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(f"the demo needs {module}: pip install 'ss1-compile[demo]'")
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if not any(shutil.which(compiler) for compiler in compilers):
        raise MissingPackageError(
            "torch.compile needs a C++ compiler; on Debian and Ubuntu: apt install g++"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise MissingPackageError(
            "torch.compile needs Python's C headers; on Debian and Ubuntu: apt install python3-dev"
        )


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and of the sketches."""
    sketches = [b for name, b in model.named_buffers() if name.endswith(".sketch")]
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *sketches))


def quality_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells under :data:`QUALITY_COLUMNS`."""
    return [
        (
            row["name"],
            f"{row['linear_bytes'] / 2**20:.1f}",
            f"{row['model_bytes'] / 2**20:.1f}",
            f"{row['output_error']:.3f}",
            f"{row['cosine']:.3f}",
            f"{row['spearman']:.3f}",
            f"{row['retrieval']:.3f}",
            f"{row['accuracy']:.3f}",
        )
        for row in result["quality"]
    ]


def sentence_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells under :data:`SENTENCE_COLUMNS`."""
    return [
        (row["name"], *(f"{row[key]:.3f}" for key in ("output_error", "cosine", "spearman")))
        for row in result["sentences"]
    ]


def speed_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells under :data:`SPEED_COLUMNS`."""
    return [
        (
            row["subject"],
            "dense" if row["reduction"] is None else str(row["reduction"]),
            f"{row['median_ms']:.2f}" if row["median_ms"] < 100 else f"{row['median_ms']:.0f}",
            f"{row['speedup']:.2f}×",
        )
        for row in result["speed"]
    ]


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The quality and the speed tables."""
    made = []
    for title, columns, rows in (
        ("Quality on held-out text, no fine-tuning", QUALITY_COLUMNS, quality_rows(result)),
        ("The same on short sentences", SENTENCE_COLUMNS, sentence_rows(result)),
        ("Speed, median of interleaved calls", SPEED_COLUMNS, speed_rows(result)),
    ):
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        made.append(table)
    return made


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the plot: quality against size, and speed against reduction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    dense, *compressed = result["quality"]
    methods = dict.fromkeys(row["projection"] for row in compressed)
    for method in methods:
        rows = [dense, *(row for row in compressed if row["projection"] == method)]
        left.plot(
            [row["linear_bytes"] / 2**20 for row in rows],
            [row["cosine"] for row in rows],
            marker="o",
            label=method,
        )
        for row in rows[1:]:
            at = (row["linear_bytes"] / 2**20, row["cosine"])
            left.annotate(
                f"c = {row['reduction']}", at, textcoords="offset points", xytext=(6, -10)
            )
    left.set(
        xlabel="linear layers, MiB",
        ylabel="cosine of embeddings to dense",
        title="Quality on held-out text, no fine-tuning",
        ylim=(0, 1.05),
    )
    left.legend(title="projection")
    for subject in dict.fromkeys(row["subject"] for row in result["speed"]):
        rows = [row for row in result["speed"] if row["subject"] == subject]
        right.plot(
            [row["reduction"] or 1 for row in rows],
            [row["speedup"] for row in rows],
            marker="o",
            label=subject,
        )
    reductions = sorted({row["reduction"] or 1 for row in result["speed"]})
    right.axhline(1, color="grey", linewidth=0.8)
    right.set_xscale("log", base=2)
    right.set_xticks(reductions, ["dense", *(f"c = {c}" for c in reductions[1:])])
    right.set(
        ylabel="times as fast as dense torch.compile",
        title=f"Speed, {result['machine']['threads']} threads",
    )
    right.set_ylim(bottom=0)
    right.legend(fontsize="small")
    figure.suptitle("SS1 on all-MiniLM-L6-v2")
    figure.savefig(path, dpi=120)
