"""Write the figures of benchmarks/results/minilm_cpu.json into README.md and docs/minilm.md.

    python benchmarks/render_readme.py           # write
    python benchmarks/render_readme.py --check   # exit code 1 if a page is out of date

The JSON is what ``ss1 demo`` writes; ``make figures`` runs the demo and then this.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ss1_compile.demo import show

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "minilm_cpu.json"
PAGES = ("README.md", "docs/minilm.md")
BEGIN = "<!-- figures:begin (written by benchmarks/render_readme.py; do not edit) -->"
END = "<!-- figures:end -->"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures(result: Mapping[str, Any]) -> str:
    """The text between the markers."""
    machine, versions, documents = (result[k] for k in ("machine", "versions", "documents"))
    difference = max(result["checks"]["compiled_vs_eager"].values())
    quality = table(show.QUALITY_COLUMNS, show.quality_rows(result))
    sentences = table(show.SENTENCE_COLUMNS, show.sentence_rows(result))
    speed = table(show.SPEED_COLUMNS, show.speed_rows(result))
    return f"""\
all-MiniLM-L6-v2, all 36 linear layers of the encoder, {documents["calibration"]} news articles for
calibration, quality on {documents["held_out"]} others, no fine-tuning:

{quality}

The same on short sentences, {documents["sentences"]} from the docstrings of Python's standard
library, two thirds of them for calibration:

{sentences}

Speed in the same run, float32, against dense `torch.compile` (the linears alone: eager):

{speed}

{machine["cpu"]}, {machine["threads"]} threads, load {machine["load_before"]:.1f} before the run;
torch {versions["torch"]}, transformers {versions["transformers"]}, Python {machine["python"]}.
Compiled and eager embeddings differ by {difference:.0e} (relative), the saved and reloaded model
not at all. The whole run took {result["seconds"]:.0f} s."""


def render(page: str, result: Mapping[str, Any]) -> str:
    """``page`` with the figures of ``result`` between its markers.

    Raises:
        ValueError: the page does not have each marker once, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the page needs {BEGIN!r} and {END!r} once each, in that order")
    return f"{before}{BEGIN}\n{figures(result)}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    stale = []
    for name in PAGES:
        path = ROOT / name
        page = path.read_text(encoding="utf-8")
        new = render(page, result)
        if new != page:
            stale.append(name)
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8")
    if "--check" in arguments and stale:
        print(f"out of date, run make figures: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
