"""Which text is dealt to which seed of benchmarks/quality.py, and which rows are compared."""

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quality_models
import render_quality


@settings(deadline=None, max_examples=50)
@given(
    unit=st.integers(1, 5),
    rounds=st.integers(1, 4),
    rest=st.integers(0, 4),
    data=st.data(),
)
def test_seeds_share_no_text_and_a_larger_set_contains_the_smaller(unit, rounds, rest, data):
    texts = list(range(3 * unit * rounds + rest))
    larger = data.draw(st.integers(1, unit * rounds))
    smaller = data.draw(st.integers(1, larger))
    found = [quality_models.share(texts, seed, unit, larger) for seed in range(3)]
    assert [len(each) for each in found] == [larger] * 3
    assert len(set().union(*found)) == 3 * larger
    for seed, each in enumerate(found):
        assert quality_models.share(texts, seed, unit, smaller) == each[:smaller]
    # the first unit of each is what follows the first unit of the seed before
    first = [quality_models.share(texts, seed, unit, unit) for seed in range(3)]
    assert list(itertools.chain(*first)) == texts[: 3 * unit]


def test_no_seed_takes_another_ones_text():
    with pytest.raises(ValueError, match="at most 4 calibration texts for seed 1, not 5"):
        quality_models.share(range(12), 1, 2, 5)


def row(method: str, tokens: int, cosine: float, **more: str) -> dict[str, object]:
    return {"method": method, "calibration_tokens": tokens, "cosine": cosine, "seed": 0, **more}


def test_methods_are_compared_with_equally_much_text_from_the_same_code():
    ours = [row("a", 4096, 0.9), row("a", 2048, 0.8), row("a", 2048, 0.1, note="old")]
    bars = [row("b", 2020, 0.7), row("b", 1024, 0.6)]
    assert render_quality.alike(ours, bars) == ([ours[1]], [bars[0]])
    assert render_quality.shown(ours) == [ours[0]]
    stale = [row("b", 4096, 0.7, note="old")]
    assert render_quality.alike(ours, stale) is None
    assert render_quality.shown(stale) == stale


def test_a_page_says_how_much_text_every_row_had():
    rows = [{"model": "m", "c": 2, **each} for each in [row("a", 2048, 0.9), row("a", 1024, 0.8)]]
    rows.append({"model": "m", "c": 2, **row("b", 2048, 0.7)})
    rows.append({"model": "m", "c": 2, **row("b", 1024, 0.7, note="old")})
    text = render_quality.tables({"dense": [{"model": "m"}], "rows": rows})
    assert "| a | 2 K | 1 | 0.900 |" in text
    assert "| b | 2 K | 1 | 0.700 |" in text
    assert "| a | 0.800 | 0.900 |" in text
    assert "| b | 0.7" not in text.partition("by calibration tokens")[2]
