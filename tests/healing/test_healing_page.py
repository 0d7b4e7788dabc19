"""docs/healing.md states what benchmarks/results/healing.json has, and healing helped."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import harness

PAGE = Path(__file__).parents[2] / "docs" / "healing.md"


def test_the_page_has_the_figures_and_they_climb():
    text = PAGE.read_text()
    for row in harness.read("healing")["rows"]:
        cells = [f"{row['steps']}", f"{row['seconds']:.0f}"]
        for figure in ("cosine", "spearman"):
            before, after = row["before"][figure], row["after"][figure]
            assert after > before
            cells.append(f"{before:.3f} → {after:.3f}")
        assert f"| {' | '.join(cells)} |" in text
        measured = [entry["metric"] for entry in row["curve"] if "metric" in entry]
        assert measured[-1] == max(measured)
