"""The commands that plan, heal, compare, time and report, on a small model from plan to page."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import assert_fails, hf_dir, run, texts  # noqa: F401 - fixtures

import ss1_compile
from ss1_compile import data_files, model_sources
from ss1_compile.errors import CalibrationError, CheckpointError, ConfigError
from ss1_compile.serialization.checkpoint import read_config

pytest.importorskip("accelerate")

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x):
        return self.layers(x)

def make():
    if torch.empty(0).device.type != "meta":
        torch.manual_seed(0)
    return Net()

def nothing():
    return 3
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """``net:make`` in the current directory, and data for it."""
    (tmp_path / "net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("net", None)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((96, 16)) @ rng.standard_normal((16, 32))
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32))
    yield tmp_path
    sys.modules.pop("net", None)


def test_help_of_every_command_imports_no_torch():
    program = textwrap.dedent("""
        import sys
        from typer.testing import CliRunner
        from ss1_cli import app
        for name in ("compress", "plan", "heal", "compare", "report", "export", "bench", "inspect"):
            assert name in CliRunner().invoke(app, ["--help"]).stdout
            shown = CliRunner().invoke(app, [name, "--help"])
            assert shown.exit_code == 0, shown.output
        assert CliRunner().invoke(app, ["plan"]).exit_code == 2
        assert "torch" not in sys.modules
        assert "ss1_compile" not in sys.modules
    """)
    subprocess.run([sys.executable, "-c", program], check=True)


def test_from_plan_to_healed_model(factory):
    data = ("--batch-size", 16)
    result = run("plan", "net:make", "--calibration", "x.npz", "--target", "60%", *data)
    assert result.exit_code == 0, result.output
    plan = ss1_compile.Plan.load(factory / "plan.json")
    assert {layer.name for layer in plan.layers} == {"layers.0", "layers.2"}
    assert plan.fraction <= 0.6
    assert "layers.0" in result.stdout

    result = run("compress", "net:make", "small", "--plan", "plan.json", "--calibration", "x.npz")
    assert result.exit_code == 0, result.output
    names = {}
    exec(result.stdout.partition("load it with")[2], names)
    assert_fails(
        run("compress", "net:make", "other", "--plan", "plan.json", "--exclude", "x"),
        "ConfigError", "--plan",
    )  # fmt: skip

    heal = ("heal", "net:make", "small", "healed", "--data", "x.npz", "--held-out", "x.npz")
    training = ("--steps", 30, "--learning-rate", 0.003, "--materialize")
    judged = ("--evaluate-every", 10, "--keep-best")
    result = run(*heal, *training, *judged, "--state", "state", *data)
    assert result.exit_code == 0, result.output
    assert "kept: step" in result.stdout
    assert (factory / "state" / "healing.safetensors").is_file()
    result = run(*heal, "--seconds", 90, "--dry-run")
    assert "nothing was written" in result.stdout
    assert "would train 0 steps and 90 s of" in result.stdout

    figures = []
    for directory in ("small", "healed"):
        rows = factory / f"{directory}.json"
        result = run("compare", "net:make", directory, "--data", "x.npz", "--json", rows)
        assert result.exit_code == 0, result.output
        kept = {layer.name for layer in plan.layers if layer.reduction > 1}
        assert {row["name"] for row in json.loads(rows.read_text())} == kept
        figures.append(float(result.stdout.rsplit("compressed ", 1)[1]))
    assert figures[0] < figures[1]

    result = run("bench", "net:make", "small", "--data", "x.npz", "--rounds", 2, "--json", "b.json")
    assert result.exit_code == 0, result.output
    times = json.loads((factory / "b.json").read_text())
    assert set(times) == {"dense", "ss1"}
    assert all(0 < row["least_ms"] <= row["median_ms"] for row in times.values())


@pytest.mark.filterwarnings("ignore:.*projected layers lose more:ss1_compile.SS1Warning")
def test_a_language_model_is_healed_without_data(factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(config)
    dense.save_pretrained("llama")
    result = run("compress", "llama", "small", "-c", 2, "--projection", "average")
    assert result.exit_code == 0, result.output
    heal = ("heal", "llama", "small", "healed", "--steps", 4, "--max-tokens", 9, "--batch-size", 3)
    result = run(*heal, "--sampled", 7, "--dry-run")
    assert "0 batches and 7 texts that it samples" in result.stdout
    result = run(*heal, "--sampled", 7, "--label-weight", 0.5, "--seconds", 0.5)
    assert result.exit_code == 0, result.output
    before, after = (load_file(factory / d / "model.safetensors") for d in ("small", "healed"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert_fails(run(*heal), "ConfigError", "--data or --sampled")
    small = run("compress", "net:make", "net", "-c", 2, "--projection", "average")
    assert small.exit_code == 0, small.output
    assert_fails(run("heal", "net:make", "net", "x", "--sampled", 7), "ConfigError", "sample")


def quantizations(directory):
    layers = read_config(directory).layers
    return {name: layer.quantization for name, layer in layers.items()}


def test_quantised_models(factory):
    compress = ("compress", "net:make", "small", "-c", 2, "--calibration", "x.npz")
    result = run(*compress, "--quantization", "int8_dynamic")
    assert result.exit_code == 0, result.output
    assert "int8_dynamic" in result.stdout
    assert set(quantizations("small").values()) == {"int8_dynamic"}
    names = {}
    exec(result.stdout.partition("load it with")[2], names)
    assert {m.quantization for m in names["model"].modules() if hasattr(m, "z")} == {"int8_dynamic"}
    heal = ("net:make", "small", "healed", "--data", "x.npz", "--steps", 2, "--batch-size", 16)
    for dry in ((), ("--dry-run",)):
        result = run("heal", *heal, *dry)
        assert_fails(result, "ConfigError", "layers.0 is quantised (int8_dynamic)", "heal, then")
    assert not (factory / "healed").exists()

    result = run("plan", "net:make", "--calibration", "x.npz", "--choices", "2,4",
                 "--target", "40%", "--quantization", "int8_weight_only")  # fmt: skip
    assert result.exit_code == 0, result.output
    planned = ("compress", "net:make", "planned", "--plan", "plan.json", "--calibration", "x.npz")
    assert_fails(run(*planned, "--quantization", "int8_dynamic"), "ConfigError", "ss1 plan")
    assert run(*planned).exit_code == 0
    assert set(quantizations("planned").values()) == {"int8_weight_only"}


def test_quantised_after_healing(factory):
    """In groups, and rounded so that the outputs on the training data move least."""
    result = run("compress", "net:make", "small", "-c", 2, "--calibration", "x.npz")
    assert result.exit_code == 0, result.output
    heal = ("heal", "net:make", "small", "healed", "--data", "x.npz", "--steps", 2)
    grouped = ("--quantization", "int8_weight_only", "--quantization-group-size", 2)
    result = run(*heal, "--batch-size", 16, *grouped, "--rounding", "calibrated")
    assert result.exit_code == 0, result.output
    assert set(quantizations("healed").values()) == {"int8_weight_only"}
    config = read_config("healed").config
    assert (config.quantization_group_size, config.rounding) == (2, "calibrated")
    tensors = load_file("healed/model.safetensors")
    assert {name: tensors[f"{name}.z"].dtype for name in ("layers.0", "layers.2")} == {
        "layers.0": torch.int8,
        "layers.2": torch.int8,
    }
    assert tensors["layers.0.scale"].numel() == tensors["layers.0.z"].numel() // 2


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--rounding", "calibrated"), ("--rounding calibrated needs --quantization",)),
        (("--quantization-group-size", 8), ("--quantization-group-size 8 needs",)),
        (("--quantization", "int4"), ("quantization must be one of", "int4")),
        (
            ("--quantization", "int8_dynamic", "--quantization-group-size", 8),
            ("quantization_group_size = 8 is for quantization='int8_weight_only'",),
        ),
        (
            ("--quantization", "int8_dynamic", "--rounding", "calibrated"),
            ("calibrat",),
        ),
    ],
)
def test_bad_quantizations_are_named(factory, options, parts):
    result = run("compress", "net:make", "small", "-c", 2, *options)
    assert_fails(result, "Error", *parts)
    assert not (factory / "small").exists()


def test_a_plan_by_latency_and_a_dry_run(factory):
    arguments = ("plan", "net:make", "--calibration", "x.npz", "--dry-run", "--choices", "1,8")
    result = run(*arguments, "--target", "latency <= 100%")
    assert result.exit_code == 0, result.output
    assert "nothing was written" in result.stdout
    assert not (factory / "plan.json").exists()
    assert_fails(run(*arguments, "--target", "fast"), "ConfigError", "fast")
    assert_fails(run(*arguments[:4], "--choices", "1,two"), "ConfigError", "1,two")
    assert_fails(run("plan", "net:none", "--calibration", "x.npz"), "ConfigError", "net:none")
    assert_fails(run("plan", "net:nothing", "--calibration", "x.npz"), "ConfigError", "int")
    assert_fails(
        run("plan", "net:make", "--calibration", "x.npz", "--device", "cuda:99"),
        "ConfigError", "cuda:99",
    )  # fmt: skip


def test_report_writes_a_page_and_pictures(factory):
    pytest.importorskip("matplotlib")
    result = run(
        "report", "net:make", "--calibration", "x.npz", "--batch-size", 8, "--reductions", "2",
        "--output", "r/page.html", "--json", "study.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    study = json.loads((factory / "study.json").read_text())
    methods = [point["method"] for point in study["points"]]
    assert methods == ["dense", "average", "calibrated", "learned", "plan"]
    assert (factory / "r" / "page.html").stat().st_size > 10_000
    pictures = sorted(path.name for path in (factory / "r").glob("*.png"))
    assert pictures == ["page-budget.png", "page-errors.png", "page-pareto.png"]
    few = run("report", "net:make", "--calibration", "x.npz", "--batch-size", 64)
    assert_fails(few, "CalibrationError", "--batch-size")


def test_a_safetensors_file_is_a_model(hf_dir, texts, tmp_path):  # noqa: F811
    tensors = load_file(hf_dir / "model.safetensors")
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        model_sources.load_model(str(path))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((hf_dir / name).read_bytes())
    loaded = model_sources.load_model(str(path))
    same = model_sources.load_model(str(hf_dir))
    for a, b in zip(loaded.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(a, b)
    batches = data_files.load_batches(texts, loaded, samples=5, batch_size=2, max_tokens=8)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        model_sources.load_model(str(path))


def test_a_compressed_directory_is_a_model(hf_dir, texts, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    assert run("compress", hf_dir, out, "-c", 2, "--calibration", texts).exit_code == 0
    loaded = model_sources.load_model(str(out))
    dense = model_sources.load_model(str(hf_dir))
    again = model_sources.load_compressed(out, dense)
    ids = torch.randint(5, 10, (2, 6))
    with torch.no_grad():
        a, b = loaded.model(input_ids=ids), again(input_ids=ids)
    assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    assert model_sources.tokenizer_of(loaded) is not None


def test_tensors_by_name_and_alone(tmp_path):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x, y=None):
            return self.linear(x)

    loaded = model_sources.Loaded(Two().bfloat16(), "two")
    x, y = torch.randn(5, 4), torch.arange(5)
    options = {"samples": 4, "batch_size": 3, "max_tokens": 1}
    save_file({"x": x, "y": y}, tmp_path / "xy.safetensors")
    first, second = data_files.load_batches(tmp_path / "xy.safetensors", loaded, **options)
    assert torch.equal(first["x"], x[:3].bfloat16())
    assert torch.equal(second["y"], y[3:4])
    np.savez(tmp_path / "one.npz", data=x.numpy())
    (first, _) = data_files.load_batches(tmp_path / "one.npz", loaded, **options)
    assert torch.equal(first, x[:3].bfloat16())
    np.savez(tmp_path / "bad.npz", x=x.numpy(), z=x.numpy())
    np.savez(tmp_path / "uneven.npz", x=x.numpy(), y=x.numpy()[:2])
    (tmp_path / "no.npz").write_bytes(b"PK nothing")
    for name, said in (
        ("bad", "'z' is no argument"), ("uneven", "same number"), ("no", "cannot be read"),
        ("none", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(CalibrationError, match=said):
            data_files.load_batches(tmp_path / f"{name}.npz", loaded, **options)
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(CalibrationError, match="no tokenizer"):
        data_files.load_batches(tmp_path / "t.txt", loaded, **options)


def test_images(tmp_path):
    image = pytest.importorskip("PIL.Image")

    class See(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, pixel_values):
            return self.linear(pixel_values.mean((2, 3)))

    loaded = model_sources.Loaded(See(), "see")
    options = {"samples": 9, "batch_size": 2, "max_tokens": 1}
    with pytest.raises(CalibrationError, match="no images"):
        data_files.load_batches(tmp_path, loaded, **options)
    for i, size in enumerate(((300, 260), (64, 40), (224, 500))):
        image.new("RGB", size, (255, 0, 51 * i)).save(tmp_path / f"{i}.png")
    first, second = data_files.load_batches(tmp_path, loaded, **options)
    assert first["pixel_values"].shape == (2, 3, 224, 224)
    assert second["pixel_values"].shape == (1, 3, 224, 224)
    pixel = second["pixel_values"][0, :, 100, 100]
    wanted = (torch.tensor([1, 0, 0.4]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(pixel, wanted)
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(CalibrationError, match=r"x\.png"):
        data_files.load_batches(tmp_path, loaded, **options)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        model_sources.load_model(str(tmp_path))
    with pytest.raises(ConfigError, match="no_such_module"):
        model_sources.load_model("no_such_module:make")
    with pytest.raises(ConfigError, match="--device gpu"):
        model_sources.device_of("gpu")
