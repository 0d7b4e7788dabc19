"""Pretrained models after compression, without fine-tuning: ours against others, equal parameters.

    python benchmarks/quality.py [--model minilm|smollm2] [--device cuda] [--seeds 0 1 2]
                                 [--reductions 2 4] [--methods "learned sketch" ...]
    python benchmarks/render_quality.py      # docs/quality.md

Appends each finished row to ``benchmarks/results/quality.json`` and leaves out rows that are there,
so that an interrupted run goes on where it was. All methods but the average see the same
calibration text in the same way: layer by layer, on what the layers before have left of the inputs,
towards the dense model's outputs, the asymmetry chosen per layer on every fourth batch. Seeds are
disjoint sets of calibration text; the evaluation text is the same for all. More text is better for
every method up to far beyond what the first rows had: ``--documents``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import harness
import torch
from quality_methods import METHODS
from quality_models import MODELS, Subject
from torch import Tensor, nn

DOCUMENTS = {"minilm": 512, "smollm2": 256, "dinov2": 256}
"""Articles, windows of tokens or images of calibration data per seed."""


def layer_errors(
    dense: nn.Module, model: nn.Module, subject: Subject
) -> tuple[dict[str, float], dict[str, float]]:
    """``sqrt(E‖Δy‖² / E‖y - E[y]‖²)`` of every layer on unseen text: alone, and in the model.

    Alone, both layers read the dense model's inputs; in the model, each its own model's.
    """
    names = subject.layers(dense)
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in names}
    means: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}

    def first(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            mine = model.get_submodule(name).forward(args[0])  # type: ignore[operator]
            kept[name] = y
            wide, rows = y.flatten(0, -2).double(), y[..., 0].numel()
            means[name] = means.get(name, 0) + wide.sum(0)
            sums[name] += torch.tensor(
                [rows, wide.square().sum(), (mine - y).double().square().sum(), 0]
            )

        return hook

    def second(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            sums[name][3] += (y - kept.pop(name)).double().square().sum().cpu()

        return hook

    for batch in subject.unpadded_evaluation():
        for network, make in ((dense, first), (model, second)):
            handles = [
                network.get_submodule(name).register_forward_hook(make(name)) for name in names
            ]
            with torch.no_grad():
                network(**batch)
            for handle in handles:
                handle.remove()
    alone, inside = {}, {}
    for name, (rows, square, own, whole) in sums.items():
        varied = square - (means[name].square().sum().cpu() / rows)
        alone[name] = float((own / varied).sqrt())
        inside[name] = float((whole / varied).sqrt())
    return alone, inside


def measure(subject: Subject, method: str, c: float, seed: int) -> dict[str, Any]:
    """One row: compress a copy and evaluate it."""
    model = copy.deepcopy(subject.model)
    start = time.perf_counter()
    parameters = METHODS[method](model, subject, c, seed)
    seconds = time.perf_counter() - start
    dense = subject.model
    alone, inside = layer_errors(dense, model, subject)
    total = sum(dense.get_submodule(n).weight.numel() for n in alone)  # type: ignore[union-attr,misc]
    return {
        "model": subject.name,
        "method": method,
        "c": c,
        "seed": seed,
        "calibration_tokens": subject.tokens(subject.calibration(seed)),
        "parameters": round(parameters / total, 4),
        "error": round(sum(alone.values()) / len(alone), 4),
        "error_in_model": round(sum(inside.values()) / len(inside), 4),
        **{name: round(value, 4) for name, value in subject.evaluate(model).items()},
        "seconds": round(seconds, 1),
        "device": harness_device(subject.device),
    }


def harness_device(device: torch.device) -> str:
    """The GPU's name, or ``CPU``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def load_results() -> dict[str, Any]:
    """The results file, or an empty one."""
    try:
        return harness.read("quality")
    except FileNotFoundError:
        return {"dense": [], "rows": []}


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a row the same as another."""
    return row["model"], row["method"], float(row["c"]), row["seed"], row["calibration_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reductions", type=float, nargs="+")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--documents", type=int, help="of calibration text per seed: DOCUMENTS")
    parser.add_argument("--minutes", type=float, help="start no further row after so long")
    given = parser.parse_args()
    start = time.monotonic()
    documents: int = given.documents or DOCUMENTS[given.model]
    subject = MODELS[given.model](torch.device(given.device), documents)
    results = load_results()
    if not any(row["model"] == subject.name for row in results["dense"]):
        found = subject.evaluate(subject.model)
        rounded = {name: round(value, 4) for name, value in found.items()}
        results["dense"].append({"model": subject.name, **rounded})
    done = {key(row) for row in results["rows"]}
    asked: list[float] = given.reductions or list(subject.reductions)
    reductions = [int(c) if float(c).is_integer() else c for c in asked]
    for seed, c, method in itertools.product(given.seeds, reductions, given.methods):
        tokens = subject.tokens(subject.calibration(seed))
        wanted = {"model": subject.name, "method": method, "c": c, "seed": seed}
        if key(wanted | {"calibration_tokens": tokens}) in done:
            continue
        if given.minutes is not None and time.monotonic() - start > 60 * given.minutes:
            print("out of time; the next run goes on here")
            return
        row = measure(subject, method, c, seed)
        results = load_results() | {"dense": results["dense"]}  # others may have written meanwhile
        results["rows"].append(row)
        results["torch"] = torch.__version__
        harness.write("quality", results)
        print(row, flush=True)


if __name__ == "__main__":
    main()
