"""The ONNX route: the exported file through TensorRT's parser, which inlines local functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ss1_compile import SS1Config, compress

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def parse(path):
    """TensorRT's network of the file, its builder, parser and logger: they must outlive it."""
    import tensorrt as trt

    class Kept(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors = []

        def log(self, severity, message):
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    logger = Kept()
    builder = trt.Builder(logger)
    net = builder.create_network(0)
    parser = trt.OnnxParser(net, logger)
    done = parser.parse_from_file(str(path))
    errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
    return done, errors, net, builder, parser, logger


@pytest.mark.parametrize("quantization", [None, "int8_weight_only"])
def test_the_function_form_is_parsed_and_built_if_float(torch_tensorrt, tmp_path, quantization):
    import onnx

    from ss1_compile import export_onnx

    model = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 40)).eval()
    compress(model, SS1Config(reduction=2, warn_error=1.0))
    x = torch.randn(4, 96)
    batch = torch.export.Dim("batch", min=1, max=16)
    # the export compares the file with PyTorch in ONNX Runtime
    export_onnx(
        model,
        (x,),
        tmp_path / "model.onnx",
        dynamic_shapes=({0: batch},),
        quantization=quantization,
    )
    file = onnx.load(tmp_path / "model.onnx")
    functions = {f.name for f in file.functions}
    calls = [node for node in file.graph.node if node.op_type in functions]
    assert len(calls) == 2

    done, errors, net, builder, _parser, logger = parse(tmp_path / "model.onnx")
    assert done, errors
    assert tuple(net.get_output(0).shape) == (-1, 40)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape(net.get_input(0).name, (1, 96), (4, 96), (16, 96))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(net, config)
    if quantization is None:
        assert engine.nbytes > 40 * 32
    else:  # the file casts its int8 weights, which TensorRT takes before DequantizeLinear only
        assert engine is None
        assert "Quantized constant" in "".join(logger.errors)


def test_the_custom_form_needs_kernels_that_tensorrt_has_not(torch_tensorrt, tmp_path):
    from ss1_compile import export_onnx

    model = nn.Sequential(nn.Linear(64, 64)).eval()
    compress(model, SS1Config(reduction=2, warn_error=1.0))
    path = tmp_path / "model.onnx"
    export_onnx(model, (torch.randn(2, 64),), path, form="custom", verify=False)
    done, errors, *_kept = parse(path)
    assert not done
    assert any("SS1" in error for error in errors)
