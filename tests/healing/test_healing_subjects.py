"""The text that benchmarks/healing.py trains on."""

import sys
from pathlib import Path
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ss1_compile.demo.data import tokenize

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


def whitespace_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """Tokens are the words 0 … words - 1, then padding."""
    known = {str(word): word for word in range(words)}
    backend = Tokenizer(WordLevel({**known, "pad": words}, unk_token="0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="pad")


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 150), max_size=12),
    size=st.integers(1, 5),
    at_once=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_tokens_are_those_of_transformers(lengths, size, at_once, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(20, (n,), generator=generator).tolist() for n in lengths]
    texts = [" ".join(map(str, row)) for row in rows]
    tokenizer = whitespace_tokenizer(20)
    with mock.patch.object(healing_subjects, "AT_ONCE", at_once):
        found = healing_subjects.tokenized(tokenizer, texts, size)
        wider = healing_subjects.tokenized(tokenizer, texts, size, 16)
    wanted = tokenize(tokenizer, texts, batch_size=size)
    assert len(found) == len(wider) == len(wanted)
    for here, there, further in zip(found, wanted, wider, strict=True):
        assert here.keys() == there.keys() == further.keys()
        assert all(torch.equal(here[name], there[name]) for name in there)
        n, width = here["input_ids"].shape
        assert further["input_ids"].shape == (n, -(-width // 16) * 16)
        assert torch.equal(further["input_ids"][:, :width], here["input_ids"])
        assert bool((further["input_ids"][:, width:] == 20).all())
        assert further["attention_mask"].sum() == here["attention_mask"].sum()


def test_windows_are_cut_elsewhere_each_time():
    subject = object.__new__(quality_models.SmolLM2)
    subject._tokenizer = whitespace_tokenizer(1300)
    texts = [" ".join(map(str, range(first, first + n))) for first, n in ((0, 700), (1000, 300))]
    subject._articles = subject._tokens([*texts, "1 2 3"])
    subject._calibration = subject.windows([*texts, "1 2 3"])
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
