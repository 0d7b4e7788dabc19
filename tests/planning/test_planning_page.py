"""docs/planning.md states what benchmarks/results/planner.json has, and the results hold."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import harness
import planner


def test_the_page_has_the_tables_of_the_results():
    text = planner.PAGE.read_text()
    assert planner.page(text, harness.read("planner")) == text


def test_plans_beat_uniform_reductions_at_no_more_parameters():
    rows = harness.read("planner")["rows"]
    found = {(row["seed"], row["budget"], row["method"]): row for row in rows}
    for seed, budget in {(row["seed"], row["budget"]) for row in rows}:
        uniform, plan = (found[seed, budget, method] for method in ("uniform", "plan"))
        assert plan["parameters"] <= uniform["parameters"]
        assert plan["cosine"] > uniform["cosine"]
        assert plan["spearman"] > uniform["spearman"]
