"""Compressed models through each route: coverage, engines, and the backend in front of TensorRT."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

import ss1_compile
from ss1_compile import SS1Config, SS1Linear, compress
from ss1_compile.errors import ConfigError, TensorRTError
from ss1_compile.tensorrt import export_tensorrt

CONFIG = SS1Config(reduction=2, warn_error=1.0)


def mlp():
    model = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 40), nn.Tanh())
    return model.eval(), {"input": torch.randn(4, 96)}


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    ids = torch.randint(0, 100, (2, 12))
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "return_dict": False}
    return transformers.BertModel(config, add_pooling_layer=False).eval(), inputs


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=100,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = torch.randint(0, 100, (2, 12))
    return transformers.GPT2LMHeadModel(config).eval(), {
        "input_ids": ids,
        "return_dict": False,
        "use_cache": False,
    }


class Tracker:
    """What a dry run of Torch-TensorRT counted; no engine is built."""

    def __init__(self):
        self.found = None
        compiler = "torch_tensorrt.dynamo._compiler"
        self.patches = [
            mock.patch(f"{compiler}.dryrun_stats_display", self.keep),
            # the parts left to PyTorch are moved to the device
            mock.patch(f"{compiler}.to_torch_device", return_value=torch.device("cpu")),
        ]

    def keep(self, tracker, dryrun):
        self.found = tracker

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()

    @property
    def counts(self):
        """(operators that TensorRT takes, all operators, engines)."""
        found = self.found
        return found.supported_ops_in_graph, found.total_ops_in_graph, found.tensorrt_graph_count


def dry_run(torch_tensorrt, program, inputs, **settings):
    with Tracker() as tracker:
        torch_tensorrt.dynamo.compile(
            program, kwarg_inputs=inputs, dryrun=True, min_block_size=1, **settings
        )
    return tracker


def exported(make):
    model, inputs = make()
    report = compress(model, CONFIG)
    with torch.no_grad():
        return torch.export.export(model, (), kwargs=inputs), inputs, report


@pytest.mark.parametrize("make", [mlp, bert, gpt2])
def test_every_operator_of_a_compressed_model_is_taken(torch_tensorrt, make):
    program, inputs, report = exported(make)
    assert len(report.compressed) >= 2
    supported, total, engines = dry_run(torch_tensorrt, program, inputs).counts
    assert supported == total > len(report.compressed)
    assert engines == 1


def test_without_the_converter_the_layers_stay_in_pytorch(torch_tensorrt, monkeypatch):
    from torch_tensorrt.dynamo.conversion import DYNAMO_ATEN_CONVERTERS

    monkeypatch.delitem(DYNAMO_ATEN_CONVERTERS, torch.ops.ss1.linear.default)
    program, inputs, report = exported(mlp)
    tracker = dry_run(torch_tensorrt, program, inputs)
    supported, total, _ = tracker.counts
    assert total - supported == len(report.compressed)
    assert [name for name in tracker.found.unsupported_ops if "ss1.linear" in str(name)]


def test_export_writes_an_engine_of_the_compressed_size(torch_tensorrt, tmp_path):
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval().half()
    batch = torch.export.Dim("batch", min=1, max=32)
    sizes = {}
    for name in ("dense", "ss1"):
        if name == "ss1":
            compress(model, SS1Config(reduction=4, warn_error=1.0))
        path = export_tensorrt(
            model,
            (torch.randn(4, 512, dtype=torch.float16),),
            tmp_path / f"{name}.engine",
            dynamic_shapes=({0: batch},),
        )
        sizes[name] = path.stat().st_size
    saved = 2 * 512 * 512 * 2 * 3 // 4
    # the constants of the sketch and TensorRT's code for it take a part of what is saved
    assert sizes["ss1"] < sizes["dense"] - saved // 3
    assert not list(tmp_path.glob("*.partial"))


def test_export_takes_a_compressed_program_and_keyword_inputs(torch_tensorrt, tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 32)

        def forward(self, x, *, scale, shift):
            return self.fc(x) * scale + shift

    x = torch.randn(3, 64)
    kwargs = {"scale": torch.randn(32), "shift": torch.randn(3, 32)}
    program = torch.export.export(Scaled().eval(), (x,), kwargs=kwargs)
    compressed, _ = ss1_compile.compress_exported(program, CONFIG)
    reversed_order = dict(reversed(kwargs.items()))
    path = export_tensorrt(compressed, (x,), tmp_path / "p.engine", kwargs=reversed_order)
    assert path.stat().st_size > 32 * 32 * 4


def test_a_dimension_without_a_bound_and_wrong_inputs_are_named(torch_tensorrt, tmp_path):
    model, inputs = mlp()
    x = inputs["input"]
    batch = torch.export.Dim("batch", min=1)
    with pytest.raises(TensorRTError, match=r"dimension 0 of the input input has no upper bound"):
        export_tensorrt(model, (x,), tmp_path / "m", dynamic_shapes=({0: batch},))
    program = torch.export.export(model, (x,))
    with pytest.raises(TensorRTError, match="takes 1 inputs"):
        export_tensorrt(program, (x, x), tmp_path / "m")
    with pytest.raises(TensorRTError, match="has its own"):
        export_tensorrt(program, (x,), tmp_path / "m", dynamic_shapes=({0: batch},))
    double = torch.export.export(model.double(), (x.double(),))
    with pytest.raises(TensorRTError, match="cannot build one engine of ExportedProgram"):
        export_tensorrt(double, (x.double(),), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["torch_tensorrt", "tensorrt"])
def test_the_backend_compresses_in_front_of_tensorrt(torch_tensorrt, name):
    torch._dynamo.reset()
    model, inputs = mlp()
    report = ss1_compile.Report()
    options = {
        "inner_backend": name,
        "reduction": 2,
        "warn_error": 1.0,
        "report": report,
        "tensorrt": {"dryrun": True, "min_block_size": 1, "pass_through_build_failures": True},
    }
    with Tracker() as tracker, torch.no_grad():
        y = torch.compile(model, backend="ss1", options=options)(inputs["input"])
    supported, total, engines = tracker.counts
    assert supported == total >= 4
    assert engines == 1
    assert len(report.compressed) == 2
    # in a dry run the partitioned graph runs in PyTorch: the weights arrive where they belong
    torch.testing.assert_close(y, compress_copy(model)(inputs["input"]))


def compress_copy(model):
    compressed = nn.Sequential(*model)
    compress(compressed, CONFIG)
    assert isinstance(compressed[0], SS1Linear)
    return compressed


def test_settings_that_do_not_fit_tensorrt_are_refused(torch_tensorrt):
    model, inputs = mlp()
    refused = {
        "tensorrt settings need": {"tensorrt": {"min_block_size": 1}},
        "fuse=True does not": {"inner_backend": "torch_tensorrt", "fuse": True},
    }
    for message, options in refused.items():
        with pytest.raises(Exception, match=message) as caught, torch.no_grad():
            torch.compile(model, backend="ss1", options=options)(inputs["input"])
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), ConfigError)


def test_parameters_that_torch_compile_passes_as_inputs_are_taken(torch_tensorrt):
    model, inputs = mlp()
    compress(model, CONFIG)
    settings = {"dryrun": True, "min_block_size": 1, "pass_through_build_failures": True}
    torch._dynamo.reset()
    with Tracker() as tracker, torch.no_grad():
        y = torch.compile(model, backend="torch_tensorrt", options=settings)(inputs["input"])
    supported, total, engines = tracker.counts
    assert supported == total >= 4
    assert engines == 1
    torch.testing.assert_close(y, model(inputs["input"]))


class Fixed(nn.Module):
    """A model whose inputs that are no tensors are fixed."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, **tensors):
        return self.model(**tensors, **self.options)[0]


@pytest.mark.parametrize("make", [bert, gpt2])
def test_an_engine_of_a_transformer_is_built(torch_tensorrt, tmp_path, make):
    model, inputs = make()
    compress(model, CONFIG)
    with pytest.raises(TensorRTError, match=r"the input return_dict is no tensor.*wrap"):
        export_tensorrt(model, (), tmp_path / "m.engine", kwargs=inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    fixed = Fixed(model, **{name: inputs[name] for name in inputs.keys() - tensors.keys()})
    path = export_tensorrt(fixed, (), tmp_path / "m.engine", kwargs=tensors)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert path.stat().st_size > held // 2
