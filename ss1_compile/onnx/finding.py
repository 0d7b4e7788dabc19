"""The linear layers of an ONNX graph.

A layer is ``MatMul (X, W [K, N])``, perhaps with ``Add (·, B [N])`` behind it, or ``Gemm`` with
``alpha = beta = 1``; W is an initializer, a constant or a transposed one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ss1_compile.config import SS1Config
from ss1_compile.learned import Structure
from ss1_compile.onnx.runner import to_torch

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


@dataclass(eq=False)
class FoundLinear:
    """One linear layer of the file, with its structure or the reason that it has none."""

    name: str
    node: ir.Node
    add: ir.Node | None
    x: ir.Value
    weight: Tensor
    """``[N, K]``."""
    bias: Tensor | None
    structure: Structure | None = None
    reason: str | None = None

    @property
    def bytes(self) -> int:
        """Of the weight and the bias."""
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        return sum(t.numel() * t.element_size() for t in tensors)


def find_linears(
    model: ir.Model, config: SS1Config, *, calibrated: bool = False
) -> list[FoundLinear]:
    """The linear layers of the main graph, in order, with structures or reasons.

    ``calibrated`` says whether there will be statistics of their inputs.
    """
    found = []
    for node in model.graph:
        layer = _linear(node) if node.domain == "" else None
        if layer is None:
            continue
        found.append(layer)
        if layer.reason is not None:
            continue
        n, k = layer.weight.shape
        structure = config.structure_for(layer.name, k, n, calibrated=calibrated)
        if isinstance(structure, str):
            layer.reason = structure
        else:
            layer.structure = structure
    return found


def _linear(node: ir.Node) -> FoundLinear | None:
    """The linear layer that ``node`` is, or ``None``."""
    if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
        return None
    x, w = node.inputs[0], node.inputs[1]
    weight = _weight(w)
    if x is None or w is None or weight is None:
        return None
    name = node.name or w.name or node.op_type
    layer = FoundLinear(name, node, None, x, weight.t(), None)
    if node.op_type == "Gemm":
        attributes = node.attributes
        if attributes.get_int("transB", 0):
            layer.weight = weight
        if attributes.get_int("transA", 0) or attributes.get_float("alpha", 1.0) != 1:
            layer.reason = "transA or alpha"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            layer.bias = _bias(bias, layer.weight)
            if layer.bias is None or attributes.get_float("beta", 1.0) != 1:
                layer.reason = "beta, or a bias that is no constant [N]"
    else:
        _absorb_add(layer)
    return layer


def _absorb_add(layer: FoundLinear) -> None:
    """Take a constant ``[N]`` that is added to the product as the bias."""
    output = layer.node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type != "Add":
        return
    add, index = uses[0]
    other = add.inputs[1 - index]
    bias = None if other is None else _bias(other, layer.weight)
    if bias is not None:
        layer.add, layer.bias = add, bias


def _constant(value: ir.Value) -> Tensor | None:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype not in _FLOATS:
        return None
    return to_torch(np.array(tensor.numpy()))


def _weight(value: ir.Value | None) -> Tensor | None:
    """The matrix that ``value`` is, through at most one transposition."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        inner = _constant(producer.inputs[0])
        return inner.t() if inner is not None and inner.dim() == 2 else None
    weight = _constant(value)
    return weight if weight is not None and weight.dim() == 2 and weight.numel() else None


def _bias(value: ir.Value, weight: Tensor) -> Tensor | None:
    bias = _constant(value)
    fits = bias is not None and bias.shape == (weight.shape[0],) and bias.dtype == weight.dtype
    return bias if fits else None
