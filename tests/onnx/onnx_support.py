"""A layer as an ONNX model without PyTorch's exporter, and a small model to export."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import ss1_compile
from ss1_compile import SS1Structure
from ss1_compile.kernels.quantize import quantize_rows
from ss1_compile.onnx.functions import Traits, function_body
from ss1_compile.onnx.operators import DOMAIN, Operator
from ss1_compile.onnx.quantization import round_rows

DYNAMIC = torch.export.Dim.DYNAMIC


class LearnedLinear(nn.Module):
    """The operator with a learned sketch, J column blocks."""

    def __init__(self, k: int, n: int, groups: int, rank: int, num_hashes: int = 1) -> None:
        super().__init__()
        size = -(-k // groups)
        self.sketch = nn.Parameter(torch.randn(num_hashes, groups, size, rank) / size**0.5)
        self.z = nn.Parameter(torch.randn(n, groups * rank))
        self.bias = nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.ss1.linear(x, self.sketch, self.z, self.bias)
        return y


class QuantizedLinear(nn.Module):
    """The quantised operator on the tensors of a floating layer."""

    def __init__(
        self, layer: Any, dynamic: bool, dtype: torch.dtype = torch.int8, groups: int = 1
    ) -> None:
        super().__init__()
        z, scale = quantize_rows(layer.z.detach(), dtype=dtype, groups=groups)
        self.dynamic = dynamic
        tensors = {"sketch": layer.sketch, "z": z, "scale": scale, "bias": layer.bias}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.ss1.linear_quantized(
            x, self.sketch, self.z, self.scale, self.bias, self.dynamic
        )
        return y


def small_model(bias: bool = True) -> nn.Module:
    """Two SS1 layers, ragged in K (72) and N (34), with different structures."""
    model = nn.Sequential(nn.Linear(72, 96, bias), nn.GELU(), nn.Linear(96, 34, False)).eval()
    ss1_compile.compress(model, block_k=16, min_features=8, warn_error=10, progress=False)
    return model


def layer_model(
    operator: Operator,
    sketch: Tensor,
    z: Tensor,
    bias: Tensor | None,
    in_features: int,
    *,
    opset: int = 18,
    traits: Traits | None = None,
    levels: int = 63,
) -> onnx.ModelProto:
    """One node with its body, inputs ``X [batch, rows, K]``."""
    weights: dict[str, Any] = {"sketch": sketch.numpy(), "Z": z.numpy()}
    weights["B"] = np.zeros((), z.numpy().dtype) if bias is None else bias.numpy()
    if operator.quantization is not None:
        weights["Z"], weights["scale"] = round_rows(z.numpy(), levels)
    kind = helper.np_dtype_to_tensor_dtype(z.numpy().dtype)
    attributes = {"in_features": in_features}
    if operator.kind == "rotation":
        attributes["block_k"] = z.shape[1] // sketch.shape[1]
    node = helper.make_node(
        operator.name, list(operator.operands), ["Y"], domain=DOMAIN, **attributes
    )
    dims = ["batch", "rows"]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("X", kind, [*dims, in_features])],
        [helper.make_tensor_value_info("Y", kind, [*dims, z.shape[0]])],
        [numpy_helper.from_array(weights[name], name) for name in operator.operands[1:]],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        functions=[function_body(operator, opset, traits)],
        ir_version=10,
    )


def run_ort(model: onnx.ModelProto, x: Tensor) -> Tensor:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    return torch.from_numpy(session.run(None, {"X": x.numpy()})[0])


def rotation(k: int, n: int, c: int, num_hashes: int, block_k: int, seed: int) -> SS1Structure:
    return SS1Structure.create(k, n, c, num_hashes=num_hashes, block_k=block_k, seed=seed)


def float_info(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
