"""SS1 layers inside TensorRT engines, through Torch-TensorRT.

* :func:`register` teaches Torch-TensorRT the SS1 operators, for ``torch_tensorrt.dynamo.compile``
  and ``torch.compile(model, backend="torch_tensorrt")``;
* ``torch.compile(model, backend="ss1", options={"inner_backend": "torch_tensorrt"})`` compresses
  first and calls :func:`register` itself;
* :func:`export_tensorrt` writes a serialised engine.

Inside an engine TensorRT runs its own kernels, on the layers that
:mod:`ss1_compile.tensorrt.layers` describes; the kernels of this package play no part there.
Importing this module imports nothing of TensorRT.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export._tree_utils import reorder_kwargs
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_flatten, tree_unflatten

from ss1_compile.errors import MissingPackageError, TensorRTError

_WHY = (
    "pip install 'ss1-compile[tensorrt]' for data-centre GPUs (its libraries come from NVIDIA's "
    "package index), or 'ss1-compile[tensorrt-rtx]' for GeForce and RTX GPUs and for building "
    "engines without a GPU; not both, since they install the same package"
)


def register() -> None:
    """Register Torch-TensorRT's converters for the SS1 operators; calling it again does nothing.

    Covered: ``ss1::linear`` with either kind of sketch in float32, float16 and bfloat16, and
    ``ss1::linear_quantized`` with int8 weights and ``dynamic=False``. What is left (float64, float8
    weights, quantised activations) stays in PyTorch, beside the engine.

    Raises:
        MissingPackageError: Torch-TensorRT is not installed.
        TensorRTError: it is installed and does not load, for want of a GPU above all.
    """
    _torch_tensorrt("ss1_compile.tensorrt.register")
    importlib.import_module("ss1_compile.tensorrt.converters")


def export_tensorrt(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **settings: Any,
) -> Path:
    """Write ``model`` as one serialised TensorRT engine.

    The engine holds the whole model. Where an operator of the model has no converter, use
    :func:`register` and ``torch_tensorrt.dynamo.compile``, which leaves it to PyTorch.

    Args:
        model: a compressed module, or a program from :func:`ss1_compile.compress_exported`. Its
            dtype is the engine's: call ``model.half()`` for float16.
        args: example inputs; their sizes are the ones that the engine is optimised for.
        path: the file to write, in an existing folder. It replaces an existing file as a whole.
        kwargs: example keyword inputs.
        dynamic_shapes: as in ``torch.export.export``; every ``Dim`` needs ``max``. ``None`` means
            that of the program if ``model`` is one, and fixed sizes otherwise.
        **settings: of ``torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine``,
            ``use_fp32_acc=True`` for instance.

    Returns:
        ``path``.

    Raises:
        MissingPackageError: Torch-TensorRT is not installed.
        TensorRTError: it does not load, an input is no tensor, a dynamic dimension has no upper
            bound, or TensorRT cannot build the engine.
    """
    torch_tensorrt = _torch_tensorrt("ss1_compile.tensorrt.export_tensorrt")
    register()
    program = model
    if not isinstance(program, ExportedProgram):
        program = torch.export.export(
            program.eval(), tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes
        )
    elif dynamic_shapes is not None:
        raise TensorRTError(
            "dynamic_shapes has no effect on an ExportedProgram, which has its own: export the "
            "module with them"
        )
    inputs = _inputs(torch_tensorrt, program, args, kwargs or {})
    name = type(model).__name__
    try:
        engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program, arg_inputs=inputs[0], kwarg_inputs=inputs[1], **settings
        )
    except Exception as error:
        raise TensorRTError(
            f"TensorRT cannot build one engine of {name}: {error}. "
            f"torch_tensorrt.dynamo.compile leaves such operators to PyTorch"
        ) from error
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(engine)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _torch_tensorrt(caller: str) -> ModuleType:
    """The package, imported now."""
    try:
        return importlib.import_module("torch_tensorrt")
    except ImportError as error:
        if error.name == "torch_tensorrt":
            raise MissingPackageError(f"{caller} needs Torch-TensorRT: {_WHY}") from error
        raise TensorRTError(f"{caller}: torch_tensorrt is installed, but {error}") from error
    except Exception as error:  # it asks for the GPU while it is imported
        raise TensorRTError(
            f"{caller}: torch_tensorrt is installed and does not load here, which it does only "
            f"with a CUDA build of PyTorch and a GPU: {error}"
        ) from error


def _inputs(
    torch_tensorrt: ModuleType,
    program: ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``args`` and ``kwargs`` with a ``torch_tensorrt.Input`` in place of every tensor.

    The program's inputs are in the order of ``args`` and then of its own keyword arguments.
    """
    in_spec = program.call_spec.in_spec
    ordered = reorder_kwargs(dict(kwargs), in_spec) if in_spec is not None else dict(kwargs)
    leaves, spec = tree_flatten((tuple(args), ordered))
    specs = program.graph_signature.input_specs
    names = [spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    if len(leaves) != len(names):
        raise TensorRTError(
            f"the program takes {len(names)} inputs ({', '.join(names)}), got "
            f"{len(leaves)}; pass args and kwargs as for torch.export.export"
        )
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TensorRTError(
                f"the input {name} is no tensor but {leaf!r}, and an engine takes tensors only: "
                f"wrap the model in a module that fixes it"
            )
    given = [
        _input(torch_tensorrt, name, nodes[name].meta["val"], leaf, program)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    result: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(given, spec)
    return result


def _input(
    torch_tensorrt: ModuleType, name: str, value: Any, example: Tensor, program: ExportedProgram
) -> Any:
    """The shapes that the engine shall take for one input: fixed, or min, optimal and max."""
    if not any(isinstance(size, torch.SymInt) for size in value.shape):
        return torch_tensorrt.Input(shape=tuple(value.shape), dtype=value.dtype)
    low, high = [], []
    for axis, size in enumerate(value.shape):
        if not isinstance(size, torch.SymInt):
            low.append(size)
            high.append(size)
            continue
        symbols = size.node.expr.free_symbols
        ranges = [program.range_constraints.get(symbol) for symbol in symbols]
        bounds = ranges[0] if len(symbols) == 1 and size.node.expr in symbols else None
        if bounds is None or not bounds.upper.is_Integer:  # infinity is none
            raise TensorRTError(
                f"dimension {axis} of the input {name} has no upper bound, which an engine needs: "
                f"export with torch.export.Dim(..., min=1, max=...)"
            )
        low.append(int(bounds.lower))
        high.append(int(bounds.upper))
    return torch_tensorrt.Input(
        min_shape=tuple(low),
        opt_shape=tuple(example.shape),
        max_shape=tuple(high),
        dtype=value.dtype,
    )
