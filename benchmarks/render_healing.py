"""Write the figures of docs/healing.md from benchmarks/results/healing.json.

``--check`` says whether it is up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from render import markdown

PAGE = Path(__file__).parents[1] / "docs" / "healing.md"
BEGIN = "<!-- figures:begin (written by benchmarks/render_healing.py; do not edit) -->"
END = "<!-- figures:end -->"
Row = dict[str, Any]


def settings(row: Row) -> str:
    """How the row came about, where it is not the default."""
    words = [f"c = {row['reduction']:g}, {'planned' if row['plan'] else 'uniform'}"]
    if row.get("projection") == "calibrated":
        words.append("rotations")
    if not row["sequential"]:
        words.append("one-shot")
    if row.get("alike"):
        words.append("outputs alike")
    if row["train"] == "all":
        words.append("all parameters trained")
    if row["block_steps"]:
        words.append(f"{row['block_steps']} steps block by block")
    words.append(f"rate {row['learning_rate']:g}")
    if row["hidden_weight"] != 1:
        words.append(f"hidden states weigh {row['hidden_weight']:g}")
    if row.get("label_weight"):
        words.append(f"next tokens weigh {row['label_weight']:g}")
    if row.get("sampled"):
        words.append(f"{row['sampled']} of the texts sampled")
    if row["seed"]:
        words.append(f"seed {row['seed']}")
    if row.get("note"):
        words.append(row["note"])
    return ", ".join(words)


def minilm(row: Row) -> list[str]:
    """Cosine and rank correlation of both kinds of text."""
    first, last = row["points"][0], row["points"][-1]
    names = ("cosine", "rank_correlation", "docstring_cosine", "docstring_rank_correlation")
    return [f"{first[name]:.3f} → {last[name]:.3f}" for name in names]


def language_model(row: Row) -> list[str]:
    """Perplexity, and what it is above the dense model's."""
    first, last = row["points"][0], row["points"][-1]
    dense = row["dense"]["perplexity"]
    over = last["perplexity"] / dense - 1
    return [f"{dense:.2f}", f"{first['perplexity']:.2f} → {last['perplexity']:.2f}", f"{over:+.1%}"]


def met(row: Row) -> bool:
    """Whether the aim is: cosine and rank correlation ≥ 0.97, or perplexity ≤ +10 %."""
    last = row["points"][-1]
    if "perplexity" in last:
        return bool(last["perplexity"] <= 1.1 * row["dense"]["perplexity"])
    return bool(last["cosine"] >= 0.97 and last["rank_correlation"] >= 0.97)


def rank(row: Row) -> float:
    """Least for the best row."""
    last = row["points"][-1]
    return float(last["perplexity"] if "perplexity" in last else -last["cosine"])


def table(rows: list[Row], head: list[str], figures: Callable[[Row], list[str]]) -> str:
    """A line per row, and the curves."""
    lines = []
    for row in rows:
        last = row["points"][-1]
        steps = f"{last['step']}"
        if row.get("done"):  # more steps than were judged
            steps += f" of {row['done']}"
        if not row["finished"]:
            steps += ", broken off" if row.get("budget") else f" of {row['steps']}"
        seconds = row["seconds"] if row["finished"] else 60 * last["at_minute"]
        trained = f"{steps} × {row['batch']}"
        cells = [row["on"], settings(row), trained, f"{row['texts']}", f"{seconds:.0f}"]
        lines.append([*cells, *figures(row), "met" if met(row) else "missed"])
    first = ["on", "compressed", "steps × batch", rows[0]["unit"], "seconds"]
    return markdown([*first, *head, "aim"], lines)


def curve(row: Row) -> str:
    """The figure that counts, step by step."""
    points = row["points"]
    name = next(name for name in points[0] if name != "step")
    head = ["step", *(str(point["step"]) for point in points)]
    return markdown(head, [[name, *(f"{point[name]:.3f}" for point in points)]])


def losses(row: Row) -> str:
    """What was minimised, in ten places of the run."""
    entries = row["losses"]
    chosen = [entries[i * (len(entries) - 1) // 9] for i in range(10)]
    head = ["step", *(str(step) for step, _ in chosen)]
    return markdown(head, [["loss", *(f"{loss:.3f}" for _, loss in chosen)]])


def figures(rows: list[Row]) -> str:
    """What stands between the markers; of runs that were broken off, as far as they came."""
    rows = [row for row in rows if len(row["points"]) > 1]
    parts: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        parts.append(f"### {model}\n")
        if "perplexity" in own[0]["points"][0]:
            parts.append("Perplexity on Wikipedia articles that nothing was trained on.\n")
            text = table(own, ["dense", "perplexity", "over dense"], language_model)
        else:
            head = ["cosine", "rank corr.", "cosine, docstrings", "rank corr., docstrings"]
            parts.append(
                "Cosine of the embeddings to the dense model's, and rank correlation of their "
                "similarities: on spans of news articles that nothing was trained on, and on "
                "sentences from docstrings, a kind of text that the training has none of.\n"
            )
            text = table(own, head, minilm)
        parts.append(text + "\n")
        best = min(own, key=rank)
        parts += [f"The curve of {best['on']}, {settings(best)}:\n", curve(best) + "\n"]
        if len(best.get("losses", ())) >= 10:
            parts += ["Its loss, the mean of ten steps:\n", losses(best) + "\n"]
    return "\n".join(parts).rstrip("\n")


def page(text: str, rows: list[Row]) -> str:
    """The page with its figures renewed."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{figures(rows)}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    old = PAGE.read_text(encoding="utf-8")
    new = page(old, harness.read("healing")["rows"])
    if "--check" in sys.argv[1:]:
        if new != old:
            sys.exit("docs/healing.md is out of date: run render_healing.py")
        return
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
