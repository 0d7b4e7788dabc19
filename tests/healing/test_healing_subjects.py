"""The text that benchmarks/healing.py trains on."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import healing_subjects
import quality_models


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


def test_batches_have_few_forms():
    ids = torch.randint(1, 9, (4, 21))
    batches = [{"input_ids": ids, "attention_mask": ids > 3}, {"input_ids": ids[:3]}]
    (kept,) = healing_subjects.whole(batches, 4)
    assert kept is batches[0]
    assert healing_subjects.whole(batches[1:], 4) == batches[1:]
    wider = healing_subjects.padded(kept)
    assert {tensor.shape for tensor in wider.values()} == {(4, 32)}
    assert torch.equal(wider["input_ids"][:, :21], ids)
    assert not wider["attention_mask"][:, 21:].any()
    assert healing_subjects.padded({"input_ids": ids[:, :16]})["input_ids"].shape == (4, 16)


def test_windows_are_cut_elsewhere_each_time():
    class Tokens:
        def __init__(self, texts):
            self.input_ids = [[int(word) for word in text.split()] for text in texts]

    subject = object.__new__(quality_models.SmolLM2)
    subject._tokenizer = Tokens
    texts = [" ".join(map(str, range(first, first + n))) for first, n in ((0, 700), (1000, 300))]
    subject._articles = [*texts, "1 2 3"]
    subject._calibration = subject.windows(subject._articles)
    once = subject.windows_but_evaluated()
    assert sorted(int(window[0]) for window in once) == [0, 256, 1000]
    found = subject.windows_but_evaluated(4)
    assert all(len(window) == 256 for window in found)
    assert all(torch.equal(window, torch.arange(256) + window[0]) for window in found)
    starts = sorted(int(window[0]) for window in found)
    assert starts == [0, 64, 128, 192, 256, 320, 384, 1000]


def test_cutting_again_gives_further_spans():
    bodies = [" ".join(f"This is sentence number {i} of its text." for i in range(40))]
    further = [" ".join(f"And this is the other text, sentence {i}." for i in range(9))]
    options = healing_subjects.Options(texts=None, batch=2, seed=3, cuts=3)
    found = healing_subjects.all_spans(bodies, further, options)
    once = healing_subjects.spans(bodies, 3)
    assert set(found) > set(once)
    assert len(found) == len(set(found)) > 60
    assert all(span in bodies[0] or span in further[0] for span in found)
    assert sum(span in further[0] for span in found) == 9
    less = healing_subjects.Options(texts=50, batch=2, seed=3, cuts=3)
    some = healing_subjects.all_spans(bodies, further, less, unwanted=once[:1])
    assert len(some) == 50
    assert set(some) < set(found) - {once[0]}
