"""Does the file compute what PyTorch computes? And how fast, how large."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.config import Quantization
from ss1_compile.errors import VerificationError
from ss1_compile.onnx.layers import Form, OnnxLayer
from ss1_compile.onnx.oracle import Oracle, oracle_of
from ss1_compile.onnx.runner import Runner, race, relative_error

TOLERANCES = {"float64": 1e-5, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
INT8_TOLERANCE = 1e-2
"""An addition in another order can move a value over a rounding boundary of the quantiser."""

JITTER = 1e-6
"""Relative change of every layer's input that two correct runtimes may differ by."""

_ROUNDING_OPS = ("Int8Dynamic", "Int8PerToken")


@dataclass
class ExportReport:
    """What :func:`ss1_compile.export_onnx` wrote and how it compares with PyTorch.

    Attributes:
        path: of the ONNX file.
        form: ``"function"``, ``"standard"`` or ``"custom"``.
        opset: of the standard operators.
        quantization: of z.
        layers: the SS1 layers in the file.
        file_bytes: bytes of the file and its external data.
        shapes: the input shapes on which the outputs were compared; empty if not verified.
        refused: sizes of dynamic dimensions that PyTorch itself refused, with its reason.
        max_error: largest relative error ``‖Δy‖ / ‖y‖`` of an output, against PyTorch in the same
            (quantised) arithmetic; ``None`` if not verified.
        sensitivity: largest relative change of PyTorch's own output when the inputs of its layers
            change by 1e-6, where activations are quantised; see :func:`verify_export`.
        runtime: what ran the file: ``"onnxruntime"``, or ``"onnx.reference"`` where ONNX Runtime
            lacks a kernel on the CPU (all of bfloat16, some of float64).
        milliseconds: median time of the file on the example inputs, ``None`` without ``dense``.
        dense_milliseconds: the same of the dense file.
    """

    path: Path
    form: Form
    opset: int
    quantization: Quantization | None
    layers: list[OnnxLayer]
    file_bytes: int = 0
    shapes: list[list[tuple[int, ...]]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    max_error: float | None = None
    sensitivity: float | None = None
    runtime: str | None = None
    milliseconds: float | None = None
    dense_milliseconds: float | None = None

    @property
    def linear_bytes_dense(self) -> int:
        """Bytes of the dense weights and biases of the compressed layers."""
        return sum(layer.bytes_dense for layer in self.layers)

    @property
    def linear_bytes(self) -> int:
        """Bytes that take their place. Sketches that layers share are counted for each."""
        return sum(layer.bytes_stored for layer in self.layers)

    @property
    def speedup(self) -> float | None:
        """Time of the dense file over that of this one."""
        if self.milliseconds is None or self.dense_milliseconds is None:
            return None
        return self.dense_milliseconds / self.milliseconds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **asdict(self),
            "path": str(self.path),
            "shapes": [[list(shape) for shape in shapes] for shapes in self.shapes],
            "linear_bytes_dense": self.linear_bytes_dense,
            "linear_bytes": self.linear_bytes,
        }

    def __str__(self) -> str:
        before, after = self.linear_bytes_dense / 2**20, self.linear_bytes / 2**20
        text = (
            f"{self.path}: {len(self.layers)} SS1 layers, form {self.form}, opset {self.opset}"
            f"{f', {self.quantization}' if self.quantization else ''}; linear weights "
            f"{before:.2f} → {after:.2f} MiB, file {self.file_bytes / 2**20:.2f} MiB; "
        )
        if self.max_error is None:
            return text + "not verified"
        text += (
            f"{self.runtime} against PyTorch on {len(self.shapes)} shapes: "
            f"relative error {self.max_error:.1e}"
        )
        if self.speedup is not None:
            text += f"; {self.milliseconds:.2f} ms, {self.speedup:.2f}× the speed of the dense file"
        return text


def verify_export(
    report: ExportReport,
    path: Path,
    program: ExportedProgram,
    levels: int,
    tolerance: float | None = None,
    dense: str | os.PathLike[str] | None = None,
) -> None:
    """Compare ``path`` with ``program`` on several sizes of its dynamic dimensions.

    Fills in the report. ``levels`` is the largest |z| of the int8 arithmetic.

    Raises:
        VerificationError: ONNX Runtime cannot load the file, an output differs in number, shape or
            by more than the tolerance, or no shape could be compared.

    Deep models that quantise activations amplify rounding: a value that falls on the other side of
    a boundary in one layer moves others in the next. Two correct runtimes then differ by as much as
    PyTorch from itself after a change in the last place of float32, so that the tolerance is at
    least twice that, on the inputs in question or on those of a size before.
    """
    runner = Runner(path)
    report.runtime = runner.name
    oracle = oracle_of(program, report.quantization, levels)
    example = _example_inputs(program)
    if len(example) != len(runner.inputs):
        raise VerificationError(
            f"{path.name} has {len(runner.inputs)} inputs ({', '.join(runner.inputs)}) and the "
            f"program {len(example)} tensors; pass tensors only, others as constants of the model"
        )
    shaken = None
    if tolerance is None:
        tolerance = max(TOLERANCES[layer.dtype] for layer in report.layers)
        if any(layer.op.endswith(_ROUNDING_OPS) for layer in report.layers):
            shaken = oracle_of(program, report.quantization, levels, jitter=JITTER)
            tolerance = max(tolerance, INT8_TOLERANCE)
    worst = 0.0
    for sizes in _sizes(runner.inputs, example):
        inputs = _resize(runner.inputs, example, sizes)
        try:
            with torch.no_grad():
                expected = _tensors(oracle(inputs))
        except Exception as error:
            if not report.shapes:
                raise VerificationError(f"PyTorch cannot run the example: {error}") from error
            report.refused.append(f"{sizes}: {str(error).splitlines()[0]:.200}")
            continue
        if shaken is not None:  # at every size: whether a value crosses a boundary is chance
            moved = _sensitivity(expected, shaken, inputs)
            report.sensitivity = max(report.sensitivity or 0.0, moved)
            tolerance = max(tolerance, 2 * moved)
        found = runner.run(inputs)
        shapes = [tuple(tensor.shape) for tensor in inputs]
        worst = max(worst, _compare(path.name, expected, found, shapes, tolerance))
        report.shapes.append(shapes)
    report.max_error = worst
    if dense is not None:
        feeds = runner.feeds(example)
        report.milliseconds, report.dense_milliseconds = race([runner, Runner(Path(dense))], feeds)


# --- inputs, sizes and errors -------------------------------------------------------------------


def _sensitivity(expected: Sequence[Tensor], shaken: Oracle, inputs: Sequence[Tensor]) -> float:
    with torch.no_grad():
        moved = _tensors(shaken(inputs))
    return max((relative_error(b, a) for a, b in zip(expected, moved, strict=True)), default=0.0)


def _example_inputs(program: ExportedProgram) -> list[Tensor]:
    if program.example_inputs is None:
        raise VerificationError("the program has no example inputs to verify with")
    return [x for x in pytree.tree_leaves(program.example_inputs) if isinstance(x, Tensor)]


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _sizes(inputs: Mapping[str, list[Any]], example: Sequence[Tensor]) -> list[dict[str, int]]:
    """Sizes of the dynamic dimensions: the example's, some more, about twice, and 1."""
    sizes: dict[str, int] = {}
    for dims, tensor in zip(inputs.values(), example, strict=True):
        for dim, size in zip(dims, tensor.shape, strict=True):
            if isinstance(dim, str) and re.fullmatch(r"\w+", dim):
                sizes[dim] = int(size)
    if not sizes:
        return [{}]
    return [
        sizes,
        {dim: size + 1 + i for i, (dim, size) in enumerate(sizes.items())},
        {dim: 2 * size + 1 for dim, size in sizes.items()},
        dict.fromkeys(sizes, 1),
    ]


def _resize(
    inputs: Mapping[str, list[Any]], example: Sequence[Tensor], sizes: Mapping[str, int]
) -> list[Tensor]:
    """The example in other sizes: integers (token ids, masks) repeat, floats are drawn anew."""
    generator = torch.Generator().manual_seed(0)
    resized = []
    for dims, tensor in zip(inputs.values(), example, strict=True):
        out = tensor.detach()
        for axis, dim in enumerate(dims):
            if isinstance(dim, str) and dim in sizes:
                index = torch.arange(sizes[dim]) % tensor.shape[axis]
                out = out.index_select(axis, index)
        if out.is_floating_point():
            noise = torch.randn(out.shape, generator=generator)
            out = (noise * tensor.float().std(correction=0) + tensor.float().mean()).to(out.dtype)
        resized.append(out.contiguous())
    return resized


def _compare(
    name: str,
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    tolerance: float,
) -> float:
    where = ", ".join(str(list(shape)) for shape in shapes)
    if len(expected) != len(found):
        raise VerificationError(
            f"{name} has {len(found)} outputs and the model {len(expected)} (inputs {where})"
        )
    worst = 0.0
    for i, (want, got) in enumerate(zip(expected, found, strict=True)):
        if want.shape != got.shape:
            raise VerificationError(
                f"{name}: output {i} is {list(got.shape)} and the model's {list(want.shape)} "
                f"(inputs {where})"
            )
        error = relative_error(got, want)
        if not error <= tolerance:
            raise VerificationError(
                f"{name}: output {i} differs from PyTorch by {error:.2e} relative, more than "
                f"{tolerance:.0e} (inputs {where}); compare in float32, or raise tolerance= if "
                f"that is the rounding of a deep model"
            )
        worst = max(worst, error)
    return worst
