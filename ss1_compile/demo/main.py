"""The main job: compress, compile, check, time, save and reload a pretrained model, offline.

``ss1 demo`` and ``examples/compress_minilm.py`` run it. Quality is measured on documents that
the calibration did not see; every speed is a ratio to dense ``torch.compile`` in the same run.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ss1_compile.calibration.statistics import Statistics, calibrate
from ss1_compile.compression.compress import compress
from ss1_compile.config import SS1Config
from ss1_compile.demo import data, show
from ss1_compile.demo.measure import (
    Examiner,
    Speed,
    embed,
    rank_correlation,
    relative_difference,
)
from ss1_compile.errors import SS1Warning, VerificationError
from ss1_compile.report import Report
from ss1_compile.serialization.load import load
from ss1_compile.serialization.save import save

RESULT_FILE = "minilm_cpu.json"
PLOT_FILE = "minilm_cpu.png"
METHODS = ("average", "calibrated", "learned")
TOLERANCE = 1e-4
"""Largest relative difference of compiled to eager embeddings, float32."""


@dataclass(frozen=True)
class DemoOptions:
    """What to run.

    Attributes:
        output: directory for the JSON, the plot and the saved model.
        threads: CPU threads.
        reductions: the values of c whose quality is measured, and the whole model's speed.
        timed_reductions: the values of c of the encoder layer's and the linears' speed.
        calibration: number of calibration documents.
        labelled: number of documents that the section centroids are made of.
        held_out: number of documents that quality is measured on.
        sentences: number of short sentences for a second, unlabelled measurement at the smallest c:
            two thirds for calibration, the rest held out.
        sequential: also learn sequentially (passes over the data, block by block).
        encoder_layer: also time a BERT-base-shaped encoder layer and its linears alone.
        rounds: turns of each candidate of a timing.
    """

    output: Path = Path("out")
    threads: int = 2
    reductions: tuple[int, ...] = (2, 4)
    timed_reductions: tuple[int, ...] = (2, 4, 8)
    calibration: int = 256
    labelled: int = 100
    held_out: int = 150
    sentences: int = 1536
    sequential: bool = False
    encoder_layer: bool = True
    rounds: int = 6

    @classmethod
    def quick(cls, **changes: Any) -> DemoOptions:
        """A minute's version: the same steps on fewer documents and one c."""
        small = {
            "reductions": (2,),
            "timed_reductions": (2,),
            "calibration": 32,
            "labelled": 40,
            "held_out": 40,
            "sentences": 96,
            "encoder_layer": False,
            "rounds": 2,
        }
        return cls(**{**small, **changes})


def run_demo(options: DemoOptions, console: Console | None = None) -> dict[str, Any]:
    """Run everything and write ``minilm_cpu.json`` and ``minilm_cpu.png``.

    Returns:
        What the JSON holds.

    Raises:
        MissingPackageError: the pretrained model, the text or a library is not installed.
        VerificationError: a compiled or reloaded model differs from the eager one.
    """
    console = console or Console()
    started = time.perf_counter()
    load_before = os.getloadavg()[0]
    show.require_packages()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.output.mkdir(parents=True, exist_ok=True)

    console.rule("model and text")
    model, tokenizer = data.load_model()
    articles = data.load_articles(options.calibration, options.labelled, options.held_out)
    batches = data.tokenize(tokenizer, [a.body for a in articles.calibration])
    console.print(
        f"all-MiniLM-L6-v2; {len(articles.calibration)} BBC articles for calibration, "
        f"{len(articles.held_out)} held out; {options.threads} threads"
    )
    step = _Steps(console)

    console.rule("quality")
    with step("input statistics of the dense model"):
        statistics = calibrate(model, batches, weigh_outputs=True)
    job = _QualityJob(model, statistics, batches, Examiner(articles, tokenizer), step)
    quality = job.run(options)
    console.print(job.shown)
    sentences = job.run_sentences(tokenizer, options)

    console.rule("speed and checks")
    sample = data.sample_batch(tokenizer, [a.body for a in articles.held_out])
    speed = Speed(rounds=options.rounds, console=console)
    checks = _check_compiled(speed.minilm({1: model, **job.kept}, sample), sample)
    if options.encoder_layer:
        speed.encoder_layer(options.timed_reductions)
        speed.linears(options.timed_reductions)
    smallest = max(options.reductions)
    checks["reloaded_equal"] = _check_reload(
        job.kept[smallest], model, options.output / f"minilm-c{smallest}", sample
    )
    if not all(entry <= TOLERANCE for entry in checks["compiled_vs_eager"].values()):
        raise VerificationError(f"compiled and eager embeddings differ: {checks}")

    result = {
        "schema": 1,
        "machine": _machine(options, load_before),
        "versions": {p: metadata.version(p) for p in ("ss1-compile", "torch", "transformers")},
        "documents": {
            "calibration": options.calibration,
            "labelled": options.labelled,
            "held_out": options.held_out,
            "sentences": options.sentences,
            "max_tokens": data.MAX_TOKENS,
        },
        "quality": quality,
        "sentences": sentences,
        "speed": speed.results,
        "checks": checks,
        "seconds": round(time.perf_counter() - started, 1),
    }
    path = options.output / RESULT_FILE
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show.draw(result, options.output / PLOT_FILE)
    console.rule("summary")
    for table in show.tables(result):
        console.print(table)
    console.print(
        f"compiled equals eager to {max(checks['compiled_vs_eager'].values()):.0e}; the reloaded "
        f"model is equal; {result['seconds']:.0f} s in all\n"
        f"figures: {path}\nplot:    {options.output / PLOT_FILE}",
        highlight=False,
    )
    return result


class _Steps:
    """Print what is being done and how long it took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.seconds = 0.0

    def __call__(self, title: str) -> _Steps:
        self._title = title
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        self.seconds = time.perf_counter() - self._start
        if error is None:
            self._console.print(f"{self._title}: {self.seconds:.1f} s", highlight=False)

    def warn(self, message: str) -> None:
        self._console.print(f"[yellow]SS1Warning[/yellow] {message}", highlight=False)


class _QualityJob:
    """Compress copies of the dense model in several ways and score each."""

    def __init__(
        self,
        dense: nn.Module,
        statistics: Statistics,
        batches: list[data.Batch],
        examiner: Examiner,
        step: _Steps,
    ) -> None:
        self.dense, self.statistics, self.batches = dense, statistics, batches
        self.examiner, self.step = examiner, step
        self.kept: dict[int, nn.Module] = {}
        """c → the calibrated model."""
        self.shown = Report()
        """The report of the last calibrated model."""

    def run(self, options: DemoOptions) -> list[dict[str, Any]]:
        """A row per compressed model, the dense one first."""
        with self.step("dense: embedding the held-out documents"):
            reference = self.examiner.embed(self.dense)
        linears = sum(
            p.numel() * p.element_size()
            for name, module in self.dense.named_modules()
            if isinstance(module, nn.Linear)
            for p in module.parameters(recurse=False)
        )
        rows = [
            {
                "name": "dense",
                "reduction": None,
                "projection": None,
                "output_error": 0.0,
                "linear_bytes": linears,
                "model_bytes": show.parameter_bytes(self.dense),
                "compress_seconds": 0.0,
                **asdict(self.examiner.score(reference, reference)),
            }
        ]
        methods = [*METHODS, *(["sequential"] if options.sequential else [])]
        for reduction in options.reductions:
            for method in methods:
                model, report = self._compress(reduction, method, self.statistics)
                seconds = self.step.seconds
                with self.step(f"c = {reduction}, {method}: embedding the held-out documents"):
                    embeddings = self.examiner.embed(model)
                rows.append(
                    {
                        "name": f"{method}, c = {reduction}",
                        "reduction": reduction,
                        "projection": method,
                        "output_error": report.mean_error,
                        "linear_bytes": report.bytes_after,
                        "model_bytes": show.parameter_bytes(model),
                        "compress_seconds": round(seconds, 2),
                        **asdict(self.examiner.score(embeddings, reference)),
                    }
                )
                if method == "calibrated":
                    self.kept[reduction], self.shown = model, report
        return rows

    def run_sentences(self, tokenizer: Any, options: DemoOptions) -> list[dict[str, Any]]:
        """The same on short sentences: a row per method at the smallest c."""
        texts = data.load_sentences(options.sentences)
        seen = 2 * len(texts) // 3
        calibration = data.tokenize(tokenizer, texts[:seen], batch_size=64)
        held_out = data.tokenize(tokenizer, texts[seen:], batch_size=64)
        with self.step("input statistics on short sentences"):
            statistics = calibrate(self.dense, calibration, weigh_outputs=True)
        reference = embed(self.dense, held_out)
        reduction, rows = min(options.reductions), []
        for method in METHODS:
            model, report = self._compress(reduction, method, statistics)
            with self.step(f"c = {reduction}, {method}: embedding the held-out sentences"):
                embeddings = embed(model, held_out)
            rows.append(
                {
                    "name": f"{method}, c = {reduction}",
                    "output_error": report.mean_error,
                    "cosine": float((embeddings * reference).sum(1).mean()),
                    "spearman": rank_correlation(embeddings, reference),
                }
            )
        return rows

    def _compress(
        self, reduction: int, method: str, statistics: Statistics
    ) -> tuple[nn.Module, Report]:
        """A compressed copy, and a report whose errors are relative to the layers' outputs."""
        model = copy.deepcopy(self.dense)
        projection = "learned" if method == "sequential" else method
        config = SS1Config.from_dict({"reduction": reduction, "projection": projection})
        seen = {"average": None, "sequential": self.batches}
        calibration = seen.get(method, statistics)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SS1Warning)
            with self.step(f"c = {reduction}, {method}: compressing"):
                report = compress(model, config, calibration, sequential=method == "sequential")
        for warning in caught:
            self.step.warn(str(warning.message))
        if method == "average":
            # The model above saw no data, as in the paper. Its output error is measured on a copy.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SS1Warning)
                report = compress(copy.deepcopy(self.dense), config, statistics, progress=False)
        return model, report


def _check_compiled(
    compiled: Mapping[int, tuple[nn.Module, Callable[..., Any]]], sample: data.Batch
) -> dict[str, Any]:
    """Relative difference of compiled to eager embeddings, by c (1 is dense)."""
    return {
        "compiled_vs_eager": {
            str(reduction): relative_difference(embed(fast, [sample]), embed(eager, [sample]))
            for reduction, (eager, fast) in compiled.items()
        }
    }


def _check_reload(model: nn.Module, dense: nn.Module, directory: Path, sample: data.Batch) -> bool:
    """Save, load into a skeleton without storage, and compare the outputs bit by bit."""
    shutil.rmtree(directory, ignore_errors=True)
    save(model, directory)
    reloaded = load(data.empty_model(dense), directory)
    if not torch.equal(embed(reloaded, [sample]), embed(model, [sample])):
        raise VerificationError(f"the model reloaded from {directory} computes something else")
    return True


def _machine(options: DemoOptions, load_before: float) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "load_before": round(load_before, 2),
        "system": platform.system(),
        "python": platform.python_version(),
    }
