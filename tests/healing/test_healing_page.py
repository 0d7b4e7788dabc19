"""docs/healing.md states what benchmarks/results/healing.json has, and healing helped."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import harness
import render_healing


def test_the_page_has_the_figures():
    text = render_healing.PAGE.read_text(encoding="utf-8")
    assert render_healing.page(text, harness.read("healing")["rows"]) == text


def test_healing_helped():
    rows = [row for row in harness.read("healing")["rows"] if row["finished"]]
    assert rows
    for row in rows:
        first, last = row["points"][0], row["points"][-1]
        assert first["step"] == 0
        if row.get("budget"):
            # less where a machine's time was over; the row says so
            assert "ended after" in row.get("note", "") or row["seconds"] >= 0.98 * row["budget"]
            assert 0.9 * row["budget"] <= row["seconds"] <= 1.02 * row["budget"]
        else:
            assert last["step"] == row["steps"] + row["block_steps"]
        if "perplexity" in first:
            assert last["perplexity"] < first["perplexity"]
        else:
            assert last["cosine"] > first["cosine"]
            assert last["rank_correlation"] > first["rank_correlation"]
