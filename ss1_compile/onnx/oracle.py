"""What a file must compute: the program in PyTorch, its layers in the file's int8 arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.config import Quantization
from ss1_compile.onnx.quantization import emulate

Oracle = Callable[[Sequence[Tensor]], Any]


def oracle_of(
    program: ExportedProgram,
    quantization: Quantization | None,
    levels: int,
    *,
    jitter: float = 0.0,
) -> Oracle:
    """A callable on the list of input tensors that gives the program's outputs.

    Args:
        program: that was exported.
        quantization: the int8 arithmetic of the layers that are floating in the program.
        levels: the largest |z| of it.
        jitter: relative size of a fixed random change of the input of every layer.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    _replace_layers(module, quantization, levels, jitter)
    assert program.example_inputs is not None
    leaves, spec = pytree.tree_flatten(program.example_inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(inputs: Sequence[Tensor]) -> Any:
        values = list(leaves)
        for place, tensor in zip(places, inputs, strict=True):
            values[place] = tensor
        args, kwargs = pytree.tree_unflatten(values, spec)
        return module(*args, **kwargs)

    return call


def _replace_layers(
    module: fx.GraphModule, quantization: Quantization | None, levels: int, jitter: float
) -> None:
    def int8_linear(x: Tensor, sketch: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
        return emulate(x, sketch, z, bias, levels, quantization == "int8_dynamic")

    floating: Any = torch.ops.ss1.linear.default
    targets = {floating: floating if quantization is None else int8_linear}
    quantized: Any = torch.ops.ss1.linear_quantized.default
    targets[quantized] = quantized
    if jitter:
        targets = {target: _shaken(function, jitter) for target, function in targets.items()}
    for submodule in module.modules():
        if not isinstance(submodule, fx.GraphModule):
            continue
        for node in submodule.graph.nodes:
            node.target = targets.get(node.target, node.target)
        submodule.recompile()


def _shaken(function: Callable[..., Tensor], jitter: float) -> Callable[..., Tensor]:
    def shaken(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape, generator=generator) * jitter
        return function(x * (1 + noise).to(x.dtype), *args, **kwargs)

    return shaken
