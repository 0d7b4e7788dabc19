"""The text that benchmarks/healing.py trains on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import healing_subjects


def test_spans_are_sentences_that_follow_each_other():
    body = " ".join(f"This is sentence number {i} of its text." for i in range(30))
    found = healing_subjects.spans([body, "Short. Too short."], seed=1)
    assert all(span in body for span in found)
    assert len(found) == len(set(found)) == 30
    assert {span.count("number") for span in found} <= {1, 2, 3, 4, 5}
    assert {span.split(" of ")[0] for span in found} == {
        f"This is sentence number {i}" for i in range(30)
    }
    assert found == healing_subjects.spans([body], seed=1)
    assert found != healing_subjects.spans([body], seed=2)


def test_texts_come_without_markup(tmp_path):
    (tmp_path / "b.txt").write_text("plain  text\n\n\nof two lines\n")
    (tmp_path / "a.html").write_text("<p>Tom &amp; <b>Ann</b></p><script>let x</script>")
    (tmp_path / "c.json").write_text("{}")
    assert healing_subjects.read_texts([tmp_path]) == ["Tom & Ann", "plain text\nof two lines"]
    assert healing_subjects.read_texts([tmp_path / "b.txt"]) == ["plain text\nof two lines"]
