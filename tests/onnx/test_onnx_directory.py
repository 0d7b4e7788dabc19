import onnxruntime as ort
import pytest
import torch
from torch import nn

import ss1_compile
from ss1_compile import SS1Config
from ss1_compile._huggingface import compress_directory
from ss1_compile.errors import CheckpointError, ConfigError, ExportError
from ss1_compile.onnx.directory import example_inputs, export_directory, export_path, load_directory
from ss1_compile.onnx.runner import relative_error
from ss1_compile.serialization.checkpoint import CONFIG_FILE

transformers = pytest.importorskip("transformers", reason="needs the extra hf")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A small BERT through ``ss1 compress``."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=96, max_position_embeddings=24,
    )  # fmt: skip
    config.architectures = ["BertModel"]
    transformers.BertModel(config).save_pretrained(folder / "dense")
    out = folder / "out"
    compress_directory(folder / "dense", out, SS1Config(min_features=8, warn_error=10))
    return folder / "dense", out


def test_what_compress_wrote_is_exported(compressed, tmp_path):
    _, directory = compressed
    path = tmp_path / "m.onnx"
    report = export_path(directory, path, tokens=200)
    assert report.max_error < 1e-5
    assert len(report.layers) >= 6
    assert ((2, 24), (2, 24)) in [tuple(shapes) for shapes in report.shapes]  # not 200: too long
    model = load_directory(directory)
    ids = torch.tensor([[3, 1, 4]])
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    feeds = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    found = torch.from_numpy(ort.InferenceSession(path).run(None, feeds)[0])
    assert relative_error(found, expected.detach()) < 1e-5


def test_other_directories_are_refused(compressed, tmp_path):
    dense, directory = compressed
    with pytest.raises(CheckpointError, match="write one with ss1 compress"):
        export_directory(dense, tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="tokens must be an integer"):
        export_directory(directory, tmp_path / "m.onnx", tokens=0)
    with pytest.raises(CheckpointError, match=r"no program that torch\.export\.save wrote"):
        export_path(directory / CONFIG_FILE, tmp_path / "m.onnx")


def test_example_inputs_of_images_and_of_others():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    inputs, shapes = example_inputs(transformers.ViTModel(config), 128)
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert set(shapes["pixel_values"]) == {0}
    with pytest.raises(ExportError, match="load the model in Python"):
        example_inputs(nn.Linear(2, 2), 128)


def test_save_and_load_agree(compressed):
    _, directory = compressed
    layers = [
        m for m in load_directory(directory).modules() if isinstance(m, ss1_compile.SS1Linear)
    ]
    assert layers
    assert not any(layer.training or layer.z.is_meta for layer in layers)
