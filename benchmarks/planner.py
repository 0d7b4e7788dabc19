"""Planned against uniform reductions on MiniLM, at equal parameters.

    python benchmarks/planner.py --seed 0      measure, some minutes; replaces that seed's rows
    python benchmarks/planner.py --render      write the tables of docs/planning.md

A seed draws the sentences: 640 for calibration (a quarter of them held out by the planner) and 256
others that only the figures are made of. Both models get the same calibration data and projection.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn

import ss1_compile
from ss1_compile.demo.data import load_model, load_sentences, tokenize
from ss1_compile.demo.measure import embed, rank_correlation
from ss1_compile.planning.measure import stored_numbers

NAME = "planner"
FRACTIONS = (0.3, 0.5, 0.7)
PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
BEGIN = "<!-- figures:begin (written by benchmarks/planner.py; do not edit) -->"
END = "<!-- figures:end -->"


def measure(seed: int) -> None:
    torch.manual_seed(seed)
    model, tokenizer = load_model()
    texts = load_sentences(896, seed=seed)
    calibration, unseen = (
        tokenize(tokenizer, sorted(part, key=len), batch_size=32)
        for part in (texts[:640], texts[640:])
    )
    reference = embed(model, unseen)
    config = ss1_compile.SS1Config(projection="learned")
    started = time.perf_counter()
    plan = ss1_compile.plan(model, calibration, 0.5, config=config, output=embedding)
    seconds = round(time.perf_counter() - started, 1)
    rows = []
    ss1_compile.calibrate(model, calibration)
    for fraction in FRACTIONS:
        uniform = replace(config, reduction=1 / fraction)
        row = score(model, uniform, unseen, reference)
        rows.append({"seed": seed, "budget": fraction, "method": "uniform", **row})
        budget = row["parameters"]
        planned = plan.solve(budget / plan.dense_cost)
        row = score(model, planned.config, unseen, reference)
        if row["parameters"] > budget:  # layers that share a sketch share it with others now
            planned = plan.solve(0.999 * budget**2 / row["parameters"] / plan.dense_cost)
            row = score(model, planned.config, unseen, reference)
        kept = {layer.name: layer.reduction for layer in planned.layers}
        rows.append({"seed": seed, "budget": fraction, "method": "plan", **row, "reductions": kept})
        print(rows[-2:], flush=True)
    try:
        earlier = [row for row in harness.read(NAME)["rows"] if row["seed"] != seed]
    except FileNotFoundError:
        earlier = []
    result = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "planning_seconds": seconds,
        "threads": torch.get_num_threads(),
        "rows": sorted(earlier + rows, key=lambda row: row["seed"]),
    }
    print(harness.write(NAME, result))


def embedding(model: nn.Module, batch: Any) -> torch.Tensor:
    """Sentence embeddings ``[texts, features]``, of unit length."""
    return embed(model, [batch])


def score(
    model: nn.Module, config: ss1_compile.SS1Config, unseen: list[Any], reference: torch.Tensor
) -> dict[str, Any]:
    compressed = copy.deepcopy(model)
    statistics = ss1_compile.Statistics(
        {
            name: found
            for name, p in model.named_parameters()
            if (found := ss1_compile.calibration.statistics.statistics_of(p)) is not None
        }
    )
    report = ss1_compile.compress(compressed, replace(config, warn_error=10.0), statistics)
    kept = [row for row in report if not row.compressed]
    stored = stored_numbers(compressed) + sum(row.shape[0] * row.shape[1] for row in kept)
    embeddings = embed(compressed, unseen)
    return {
        "parameters": stored,
        "cosine": round(float((embeddings * reference).sum(1).mean()), 4),
        "spearman": round(rank_correlation(embeddings, reference), 4),
    }


def tables(result: dict[str, Any]) -> str:
    """The Markdown of the page."""
    rows = result["rows"]
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "| budget | parameters, uniform / plan | cosine, uniform | cosine, plan | rank corr., "
        "uniform | rank corr., plan |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for fraction in FRACTIONS:
        of = {
            method: [r for r in rows if r["budget"] == fraction and r["method"] == method]
            for method in ("uniform", "plan")
        }
        cells = [f"{fraction:.0%}"]
        cells.append(" / ".join(f"{mean(of[m], 'parameters') / 1e6:.2f} M" for m in of))
        for figure in ("cosine", "spearman"):
            cells += [spread(of[m], figure) for m in of]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Mean over {len(seeds)} draw{'s' * (len(seeds) > 1)} of the sentences, and in brackets "
        "the least and the greatest.",
    ]
    return "\n".join(lines)


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{mean(rows, key):.3f} ({min(values):.3f} … {max(values):.3f})"


def page(text: str, result: dict[str, Any]) -> str:
    """The page with its tables renewed."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{tables(result)}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    if arguments.render:
        PAGE.write_text(page(PAGE.read_text(), harness.read(NAME)))
    else:
        measure(arguments.seed)
