"""Torch-TensorRT on a machine without a GPU, and TensorRT networks that can be looked into.

Torch-TensorRT asks for the GPU while it is imported and deserialises every engine it builds. Where
there is none, :func:`load` answers for the GPU and keeps the engine as the bytes that TensorRT
built. What is tested so: conversion, the network, partitioning and building; not execution.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

EXTRA = "needs the extra tensorrt-rtx (or tensorrt): make test-tensorrt"
INSTALLED = importlib.util.find_spec("torch_tensorrt") is not None
NO_GPU = not torch.cuda.is_available()


class _Device:
    """What is asked of a GPU while an engine is built for it."""

    def __init__(self) -> None:
        self.patches = [
            mock.patch("torch.cuda.get_device_capability", return_value=(8, 9)),
            mock.patch("torch.cuda.current_device", return_value=0),
            mock.patch("torch.cuda.mem_get_info", return_value=(1 << 33, 1 << 33)),
        ]

    def __enter__(self) -> None:
        for patch in self.patches:
            patch.start()

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()


def device() -> Any:
    """A context in which Torch-TensorRT can be imported and can build."""
    return _Device() if NO_GPU else mock.MagicMock()


def load() -> ModuleType:
    """Import ``torch_tensorrt``, without its C++ runtime where there is no GPU."""
    if NO_GPU and not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})
    exists = os.path.isfile

    def hidden(path):
        return exists(path) and not (NO_GPU and "libtorchtrt" in str(path))

    with device(), mock.patch("os.path.isfile", hidden):
        import torch_tensorrt
        import torch_tensorrt.dynamo.conversion._TRTInterpreter as interpreter
    if NO_GPU:
        interpreter.trt = _WithoutRuntime(interpreter.trt)
    return torch_tensorrt


class _WithoutRuntime(ModuleType):
    """TensorRT whose runtime keeps the bytes of an engine, which only a GPU could read."""

    def __init__(self, tensorrt: Any) -> None:
        super().__init__("tensorrt")
        self._tensorrt = tensorrt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensorrt, name)

    class Runtime:
        def __init__(self, logger: object) -> None:
            pass

        def deserialize_cuda_engine(self, engine: Any) -> Any:
            return mock.Mock(serialize=lambda: engine)


class Network:
    """The TensorRT network of a program, made by Torch-TensorRT's own interpreter."""

    def __init__(
        self, program: torch.export.ExportedProgram, inputs: Sequence[Any], **settings: Any
    ) -> None:
        from torch_tensorrt.dynamo import CompilationSettings
        from torch_tensorrt.dynamo.conversion import TRTInterpreter
        from torch_tensorrt.dynamo.lowering import post_lowering

        options = CompilationSettings(**settings)
        module = post_lowering(program.run_decompositions({}).module(), options)
        self.interpreter = TRTInterpreter(module, inputs, compilation_settings=options)
        self.interpreter._construct_trt_network_def()
        self.net = self.interpreter.ctx.net

    @property
    def layers(self) -> list[Any]:
        """The layers, in order, as objects of their own class."""
        layers = [self.net.get_layer(i) for i in range(self.net.num_layers)]
        for layer in layers:
            layer.__class__ = _class_of(layer)
        return layers

    def kinds(self) -> list[str]:
        """The types of all layers but constants."""
        return [layer.type.name for layer in self.layers if layer.type.name != "CONSTANT"]

    def constants(self, dtype: str) -> list[Any]:
        """The constant layers of a dtype, by its name in TensorRT."""
        found = [layer for layer in self.layers if layer.type.name == "CONSTANT"]
        return [layer for layer in found if layer.get_output(0).dtype.name == dtype]

    def build(self) -> bytes:
        """The serialised engine."""
        config = self.interpreter._populate_trt_builder_config()
        engine = self.interpreter.builder.build_serialized_network(self.net, config)
        return bytes(engine)

    def run(self, *inputs: Tensor) -> Tensor:
        """What the network computes by TensorRT's documentation of its layers, in float64."""
        values = {self.net.get_input(i).name: _wide(x) for i, x in enumerate(inputs)}
        for layer in self.layers:
            operands = [values[layer.get_input(i).name] for i in range(layer.num_inputs)]
            values[layer.get_output(0).name] = _evaluate(layer, operands)
        return values[self.net.get_output(0).name]


def _class_of(layer: Any) -> type:
    import tensorrt as trt

    names = {"ELEMENTWISE": "ElementWise", "MATRIX_MULTIPLY": "MatrixMultiply"}
    name = layer.type.name
    found: type = getattr(trt, f"I{names.get(name, name.title())}Layer")
    return found


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _evaluate(layer: Any, operands: list[Tensor]) -> Tensor:
    import numpy as np

    kind = layer.type.name
    if kind == "CONSTANT":
        return _wide(torch.from_numpy(np.array(layer.weights)).reshape(tuple(layer.shape)))
    x = operands[0]
    if kind == "GATHER":
        index = operands[1].long()
        picked = x.index_select(layer.axis, index.flatten())
        return picked.reshape(*x.shape[: layer.axis], *index.shape, *x.shape[layer.axis + 1 :])
    if kind == "CAST":
        return _wide(x) if layer.to_type.name in ("FLOAT", "HALF", "BF16") else x
    if kind == "SHUFFLE":
        x = x.permute(*tuple(layer.first_transpose)[: x.dim()])
        sizes = tuple(layer.reshape_dims)
        return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(sizes)])
    if kind == "ELEMENTWISE":
        operations = {
            "PROD": torch.mul,
            "SUM": torch.add,
            "SUB": torch.sub,
            "LESS": torch.lt,
        }
        assert x.dim() == operands[1].dim(), "TensorRT broadcasts tensors of one rank only"
        return operations[layer.op.name](*operands)
    if kind == "SELECT":
        return torch.where(*operands)
    if kind == "REDUCE":
        axes = [axis for axis in range(x.dim()) if layer.axes >> axis & 1]
        assert layer.op.name == "SUM"
        return x.sum(axes, keepdim=layer.keep_dims)
    if kind == "EINSUM":
        return torch.einsum(layer.equation, *operands)
    if kind == "CONCATENATION":
        return torch.cat(operands, layer.axis)
    if kind == "DEQUANTIZE":
        shape = [-1 if axis == layer.axis else 1 for axis in range(x.dim())]
        return x.double() * operands[1].reshape(shape)
    raise AssertionError(f"no evaluation for the layer {kind}")
