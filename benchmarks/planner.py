"""Planned against uniform reductions on MiniLM, at equal parameters.

    python benchmarks/planner.py [--device cuda] [--seeds 0 1 2] [--minutes 8]
    python benchmarks/planner.py --render      write the tables of docs/planning.md

Finished rows are kept, so that an interrupted run goes on, and the plans lie in ``--directory``.
With ``--minutes`` no further row is begun after so long. Rows of other devices are replaced.

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
CONFIG = ss1_compile.SS1Config(projection="learned")
PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
BEGIN = "<!-- figures:begin (written by benchmarks/planner.py; do not edit) -->"
END = "<!-- figures:end -->"


class Draw:
    """One seed's sentences, and the model on them.

    Args:
        seed: of the draw.
        device: to run on.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        model, tokenizer = load_model()
        self.seed, self.model = seed, model.to(device)
        texts = load_sentences(896, seed=seed)
        self.calibration, self.unseen = (
            [
                {name: tensor.to(device) for name, tensor in batch.items()}
                for batch in tokenize(tokenizer, sorted(part, key=len), batch_size=32)
            ]
            for part in (texts[:640], texts[640:])
        )
        self.reference = embed(self.model, self.unseen).cpu()

    def plan(self, directory: Path) -> tuple[ss1_compile.Plan, float | None]:
        """The plan for a half, and the seconds that it took; ``None`` if it was there."""
        path = directory / f"minilm-{self.seed}.json"
        if path.is_file():
            return ss1_compile.Plan.load(path), None
        started = time.perf_counter()
        plan = ss1_compile.plan(self.model, self.calibration, 0.5, config=CONFIG, output=embedding)
        directory.mkdir(parents=True, exist_ok=True)
        plan.save(path)
        return plan, round(time.perf_counter() - started, 1)


def measure(arguments: argparse.Namespace) -> None:
    """Append the missing rows."""
    started = time.monotonic()
    device = arguments.device
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    try:
        earlier = [row for row in harness.read(NAME)["rows"] if row.get("on") == on]
    except FileNotFoundError:
        earlier = []
    done = {(row["seed"], row["budget"]) for row in earlier}
    for seed in arguments.seeds:
        missing = [fraction for fraction in FRACTIONS if (seed, fraction) not in done]
        if not missing:
            continue
        if late(started, arguments.minutes):
            return
        draw = Draw(seed, device)
        plan, seconds = draw.plan(arguments.directory / f"{device.type}")
        print(f"seed {seed}: planned in {seconds} s", flush=True)
        ss1_compile.calibrate(draw.model, draw.calibration, weigh_outputs=True, progress=False)
        for fraction in missing:
            if late(started, arguments.minutes):
                return
            pair = compared(draw, plan, fraction)
            earlier += [{**row, "on": on} for row in pair]
            result = {
                "torch": torch.__version__,
                "rows": sorted(earlier, key=lambda row: (row["seed"], row["budget"])),
            }
            harness.write(NAME, result)
            for row in pair:
                print({k: v for k, v in row.items() if k != "reductions"}, flush=True)


def late(started: float, minutes: float | None) -> bool:
    """Whether the minutes are over, which it says."""
    over = minutes is not None and time.monotonic() - started > 60 * minutes
    if over:
        print("out of time; the next run goes on here")
    return over


def compared(draw: Draw, plan: ss1_compile.Plan, fraction: float) -> list[dict[str, Any]]:
    """The row of uniform reductions, and that of a plan with no more parameters."""
    row = score(draw, replace(CONFIG, reduction=1 / fraction))
    rows = [{"seed": draw.seed, "budget": fraction, "method": "uniform", **row}]
    budget = row["parameters"]
    planned = plan.solve(budget / plan.dense_cost)
    row = score(draw, planned.config)
    if row["parameters"] > budget:  # layers that share a sketch share it with others now
        planned = plan.solve(0.999 * budget**2 / row["parameters"] / plan.dense_cost)
        row = score(draw, planned.config)
    kept = {layer.name: layer.reduction for layer in planned.layers}
    own = {"seed": draw.seed, "budget": fraction, "method": "plan", **row, "reductions": kept}
    return [*rows, own]


def embedding(model: nn.Module, batch: Any) -> torch.Tensor:
    """Sentence embeddings ``[texts, features]``, of unit length."""
    return embed(model, [batch])


def score(draw: Draw, config: ss1_compile.SS1Config) -> dict[str, Any]:
    """A compressed copy's stored numbers, and how near its embeddings are to the dense ones."""
    model = draw.model
    compressed = copy.deepcopy(model)
    statistics = ss1_compile.Statistics(
        {
            name: found
            for name, p in model.named_parameters()
            if (found := ss1_compile.calibration.statistics.statistics_of(p)) is not None
        }
    )
    config = replace(config, warn_error=10.0)
    report = ss1_compile.compress(compressed, config, statistics, progress=False)
    kept = [row for row in report if not row.compressed]
    stored = stored_numbers(compressed) + sum(row.shape[0] * row.shape[1] for row in kept)
    embeddings = embed(compressed, draw.unseen).cpu()
    return {
        "parameters": stored,
        "cosine": round(float((embeddings * draw.reference).sum(1).mean()), 4),
        "spearman": round(rank_correlation(embeddings, draw.reference), 4),
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
    on = " and ".join(dict.fromkeys(row["on"] for row in rows if "on" in row))
    draws = "One draw of the sentences"
    if len(seeds) > 1:
        draws = (
            f"Mean over {len(seeds)} draws of the sentences, and in brackets the least and the "
            f"greatest"
        )
    lines += ["", f"{draws}{on and f'; on {on}'}."]
    return "\n".join(lines)


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    among = f" ({min(values):.3f} … {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean(rows, key):.3f}{among}"


def page(text: str, result: dict[str, Any]) -> str:
    """The page with its tables renewed."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{tables(result)}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, help="begin no further row after so long")
    parser.add_argument("--directory", type=Path, default=Path("out/planner"), help="for plans")
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    if arguments.render:
        PAGE.write_text(page(PAGE.read_text(), harness.read(NAME)))
    else:
        measure(arguments)
