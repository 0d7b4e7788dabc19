"""Build the browser demo: a static site that runs a model dense and as SS1 with int8 weights.

Exports all-MiniLM-L6-v2 dense and, for each reduction c, compressed and with int8 z (function
form), writes what the page feeds them and what Python computed, and adds ``onnxruntime-web``. The
site then needs no network and no special headers: any static file server will do.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

import ss1_compile
from ss1_compile import SS1Config
from ss1_compile.demo import data

HERE = Path(__file__).resolve().parent
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
OPSET = 23
"""Of all files: the first with ``Attention`` as one operator, the faster for dense ones, too."""
TIMED_TOKENS = 128
SENTENCES = (
    "The central bank raised interest rates to slow inflation.",
    "Higher borrowing costs are meant to bring prices under control.",
    "The striker scored twice in the last ten minutes of the final.",
    "Two late goals decided the cup match.",
    "The new phone has a brighter screen and a larger battery.",
    "Reviewers praised the handset for its display and long battery life.",
    "The film won three awards at the festival.",
    "Critics loved the movie, and so did the jury.",
)


class SentenceEncoder(nn.Module):
    """Token ids to unit-length embeddings: the mean of the last hidden states over the tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings float32 ``[batch, features]`` of int64 ``[batch, tokens]``."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def build(
    output: Path,
    model: nn.Module,
    tokenizer: Any,
    calibration: Sequence[str],
    *,
    name: str,
    reductions: Sequence[int] = (2, 4),
    projection: str = "learned",
    sequential: bool = False,
    runtime: Path = HERE / "node_modules" / "onnxruntime-web" / "dist",
) -> dict[str, Any]:
    """Write the whole site to ``output``, in place of what was there.

    Args:
        output: directory of the site.
        model: returns ``last_hidden_state`` for ``input_ids`` and ``attention_mask``; unchanged.
        tokenizer: of the model, Hugging Face.
        calibration: sentences that the compression may see.
        name: of the model, for the page.
        reductions: the values of c; one compressed model each.
        projection: of :class:`ss1_compile.SS1Config`.
        sequential: calibrate each layer behind the compressed ones: closer, and slower.
        runtime: directory with the files of ``onnxruntime-web``.

    Returns:
        What ``manifest.json`` holds.

    Raises:
        FileNotFoundError: ``onnxruntime-web`` is not installed.
        SS1Error: compression or export failed, or an exported file computes something else.
    """
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(HERE / "site", output)
    for file in RUNTIME_FILES:
        shutil.copy2(runtime / file, output / file)
    sentences = [tokenizer(text)["input_ids"] for text in SENTENCES]
    timed = tokenizer(
        " ".join(SENTENCES * 4), truncation=True, max_length=TIMED_TOKENS, padding="max_length"
    )["input_ids"]
    models = [_export_dense(model, sentences[0], output / "dense.onnx")]
    batches = data.tokenize(tokenizer, calibration)
    for reduction in reductions:
        config = SS1Config.from_dict({"reduction": reduction, "projection": projection})
        path = output / f"ss1-c{reduction}-int8.onnx"
        compressed = copy.deepcopy(model)
        with warnings.catch_warnings():
            # Each names a layer that lost much at this c; the page shows what becomes of the whole.
            warnings.simplefilter("ignore", ss1_compile.SS1Warning)
            ss1_compile.compress(compressed, config, batches, sequential=sequential, progress=False)
        models.append(_export_compressed(compressed, config, sentences[0], path))
    embeddings = [_embed(output / entry["file"], sentences) for entry in models]
    for entry, rows in zip(models, embeddings, strict=True):
        entry["cosines"] = [round(float(c), 6) for c in (rows * embeddings[0]).sum(1)]
        entry["model_bytes"] = (output / entry["file"]).stat().st_size
    for entry in models[1:]:
        models[0]["linear_bytes"] = entry.pop("linear_bytes_dense")
    manifest = {
        "model": name,
        "sentences": [
            {"text": text, "input_ids": ids} for text, ids in zip(SENTENCES, sentences, strict=True)
        ],
        "timed_ids": timed,
        "models": models,
        "versions": {p: metadata.version(p) for p in ("ss1-compile", "torch", "onnxruntime")},
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _export_dense(model: nn.Module, ids: list[int], path: Path) -> dict[str, Any]:
    args, dynamic_shapes = _example(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            SentenceEncoder(model).eval(),
            args,
            path,
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    return {"label": "Dense, float32", "file": path.name, "reduction": None, "error": 0.0}


def _export_compressed(
    model: nn.Module, config: SS1Config, ids: list[int], path: Path
) -> dict[str, Any]:
    args, dynamic_shapes = _example(ids)
    report = ss1_compile.export_onnx(
        SentenceEncoder(model).eval(),
        args,
        path,
        dynamic_shapes=dynamic_shapes,
        opset=OPSET,
        quantization="int8_dynamic",
        config=config,
    )
    print(report)
    return {
        "label": f"SS1 int8, c = {config.reduction}",
        "file": path.name,
        "reduction": config.reduction,
        "error": report.max_error,
        "linear_bytes": report.linear_bytes,
        "linear_bytes_dense": report.linear_bytes_dense,
    }


def _example(ids: list[int]) -> tuple[tuple[Tensor, Tensor], Any]:
    tokens = torch.tensor([ids, ids])
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return (tokens, torch.ones_like(tokens)), (both, both)


def _embed(path: Path, sentences: list[list[int]]) -> np.ndarray[Any, Any]:
    """Embeddings ``[sentences, features]``, one sentence at a time, as the page computes them.

    Int8 activations are quantised per tensor: sentences in one batch would change each other.
    """
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = []
    for ids in sentences:
        tokens = np.array([ids], dtype=np.int64)
        feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        rows.append(session.run(None, feeds)[0][0])
    return np.stack(rows)


def _calibration_sentences(count: int) -> list[str]:
    """Half from news articles, half from documentation; none of them is on the page."""
    articles = data.load_articles(count, 0, 0).calibration
    news = [sentence for a in articles for sentence in a.body.split(". ") if len(sentence) > 40]
    random.Random(0).shuffle(news)
    return news[: count - count // 2] + data.load_sentences(count // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--output", type=Path, default=HERE / "dist", help="folder of the site")
    parser.add_argument("--reductions", type=int, nargs="+", default=[2, 4], metavar="C")
    parser.add_argument("--projection", choices=["learned", "calibrated"], default="learned")
    parser.add_argument("--sequential", action="store_true", help="closer, and slower")
    parser.add_argument("--calibration", type=int, default=512, help="number of sentences")
    options = parser.parse_args()
    subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=HERE, check=True
    )
    torch.manual_seed(0)
    model, tokenizer = data.load_model()
    manifest = build(
        options.output,
        model,
        tokenizer,
        _calibration_sentences(options.calibration),
        name="all-MiniLM-L6-v2",
        reductions=options.reductions,
        projection=options.projection,
        sequential=options.sequential,
    )
    for entry in manifest["models"]:
        print(f"{entry['label']}: mean cosine to dense {np.mean(entry['cosines']):.3f}")
    print(f"python -m http.server -b 127.0.0.1 -d {options.output}")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, and the defaults."""


if __name__ == "__main__":
    main()
