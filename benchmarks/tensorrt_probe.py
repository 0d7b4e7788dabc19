"""Whether engines with SS1 layers run on this GPU, and how far they are from eager mode.

    python benchmarks/tensorrt_probe.py [--output benchmarks/results/tensorrt.json]
    python benchmarks/tensorrt_probe.py --render    # the table of docs/tensorrt.md

First one product in a raw engine: built, asked for its validity (``Runtime.get_engine_validity``),
deserialised, executed. If that works, SS1 models are compiled through Torch-TensorRT in float32,
float16 and bfloat16 with a dynamic batch (rotations; learned sketches and int8 weights in float16)
and compared with eager mode. Every stage writes what
happened, exact messages included, and what failed stops only what depends on it. No times: a GPU
that TensorRT-RTX does not list is no place for them.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import inspect
import json
import platform
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ss1_compile import SS1Linear, SS1Structure, compress

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BATCHES = (1, 4, 16)
DOORS = {"dynamo": "torch_tensorrt.dynamo.compile", "torch_compile": "torch.compile"}
ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "tensorrt.json"
PAGE = ROOT / "docs" / "tensorrt.md"
BEGIN = "<!-- probe:begin (written by benchmarks/tensorrt_probe.py; do not edit) -->"
END = "<!-- probe:end -->"
PACKAGES = (
    "torch",
    "torch-tensorrt",
    "torch-tensorrt-rtx",
    "tensorrt",
    "tensorrt-rtx",
    "tensorrt-rtx-cu13-libs",
)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def raw_tensorrt() -> Any:
    """The TensorRT that is installed, RTX or classic."""
    for name in ("tensorrt_rtx", "tensorrt"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reason = error
    raise reason


class Messages:
    """A TensorRT logger that keeps warnings and errors."""

    def __init__(self, trt: Any) -> None:
        kept: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.WARNING:
                    kept.append(f"{severity.name}: {message}")

        self.logger, self.kept = Logger(), kept


def one_product() -> dict[str, Any]:
    """Build, judge, deserialise and execute ``y = x wᵀ``."""
    trt = raw_tensorrt()
    messages = Messages(trt)
    result: dict[str, Any] = {"tensorrt": f"{trt.__name__} {trt.__version__}"}
    capabilities = getattr(trt, "ComputeCapability", None)
    if capabilities is not None:
        result["listed_capabilities"] = sorted(capabilities.__members__)
    x, w = torch.randn(8, 64, device="cuda"), torch.randn(32, 64)
    builder = trt.Builder(messages.logger)
    net = builder.create_network(0)
    source = net.add_input("x", trt.float32, (8, 64))
    weight = net.add_constant((32, 64), trt.Weights(w.numpy())).get_output(0)
    none, transpose = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
    y = net.add_matrix_multiply(source, none, weight, transpose).get_output(0)
    y.name = "y"
    net.mark_output(y)
    try:
        engine = builder.build_serialized_network(net, builder.create_builder_config())
        result["built_bytes"] = None if engine is None else engine.nbytes
        runtime = trt.Runtime(messages.logger)
        if hasattr(runtime, "get_engine_validity"):
            validity, diagnostics = runtime.get_engine_validity(engine)
            result["validity"] = str(validity)
            result["diagnostics"] = str(diagnostics)
        loaded = runtime.deserialize_cuda_engine(engine)
        result["deserialised"] = loaded is not None
        if loaded is not None:
            context = loaded.create_execution_context()
            result["context"] = context is not None
            out = torch.zeros(8, 32, device="cuda")
            context.set_tensor_address("x", x.data_ptr())
            context.set_tensor_address("y", out.data_ptr())
            done = context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
            exact = x.double() @ w.double().cuda().T
            result["executed"] = bool(done)
            result["relative_error"] = relative(out, exact)
    finally:
        result["messages"] = messages.kept
    return result


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    """``‖y − exact‖ / ‖exact‖``, in float64."""
    exact = exact.double()
    return float((y.double() - exact).norm() / exact.norm())


class Block(nn.Module):
    """A pre-norm feed-forward block with a residual: SS1 layers between TensorRT's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(256),
            nn.Linear(256, 1024),
            nn.Linear(1024, 256),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x + down(gelu(up(norm(x))))``."""
        h: torch.Tensor = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return x + h


class Stack(nn.Module):
    """Layers in a row.

    A class of its own: the arguments of a bare ``nn.Sequential`` are ``args[0]`` to Dynamo, which
    Torch-TensorRT 2.11 cannot make dynamic (``'GetItemSource' object has no attribute
    'local_name'``; mended in 2.13).
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All layers, one after the other."""
        y: torch.Tensor = self.layers(x)
        return y


def models() -> dict[str, nn.Module]:
    """Stacks of compressed blocks with a layer of uneven sizes behind."""
    data = [torch.randn(64, 256) for _ in range(4)]
    options: dict[str, dict[str, Any]] = {
        "rotation": {},
        "learned": {"projection": "learned", "calibration": data},
        "rotation, int8 weights": {"quantization": "int8_weight_only"},
    }
    found: dict[str, nn.Module] = {}
    for name, given in options.items():
        torch.manual_seed(0)
        stack = nn.Sequential(Block(), Block(), nn.Linear(256, 200), nn.ReLU())
        compress(stack, reduction=4, warn_error=1.0, progress=False, **given)
        uneven = SS1Linear(SS1Structure.create(200, 90, 3, num_hashes=4))
        found[name] = Stack(stack.append(uneven)).eval().cuda()
    return found


def numerics(model: nn.Module, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """Engine and eager mode in ``dtype`` against eager mode, for every batch size.

    The latter in float64, or in float32, the widest that layers with int8 weights have.
    """
    import torch_tensorrt

    from ss1_compile.tensorrt import register

    register()
    quantized = any(buffer.dtype == torch.int8 for buffer in model.buffers())
    wide = torch.float32 if quantized else torch.float64
    exact_model, model = copy.deepcopy(model).to(wide), copy.deepcopy(model).to(dtype)
    example = torch.randn(4, 32, 256, device="cuda", dtype=dtype)
    batch = torch.export.Dim("batch", min=1, max=16)
    with torch.no_grad():
        if backend == "dynamo":
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
            shape = tuple(example.shape[1:])
            spec = torch_tensorrt.Input(
                min_shape=(1, *shape), opt_shape=(4, *shape), max_shape=(16, *shape), dtype=dtype
            )
            settings: dict[str, Any] = {"min_block_size": 1, "require_full_compilation": True}
            if "use_explicit_typing" in _parameters(torch_tensorrt.dynamo.compile):
                settings["use_explicit_typing"] = True
            compiled: Any = torch_tensorrt.dynamo.compile(program, inputs=[spec], **settings)
        else:
            torch._dynamo.reset()
            options = {"min_block_size": 1, "pass_through_build_failures": True}
            compiled = torch.compile(model, backend="torch_tensorrt", dynamic=True, options=options)
        rows = {}
        for size in BATCHES:
            x = torch.randn(size, 32, 256, device="cuda", dtype=dtype)
            exact = exact_model(x.to(wide))
            rows[size] = {
                "engine": relative(compiled(x), exact),
                "eager": relative(model(x), exact),
            }
    return {"relative_error": rows}


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def attempt(result: dict[str, Any], name: str, run: Callable[[], Any]) -> bool:
    """Record what ``run`` returned, or its exact message; whether it succeeded."""
    print(f"{name} …", flush=True)
    try:
        result[name] = run()
    except Exception as error:
        result[name] = {
            "error": f"{type(error).__name__}: {error}",
            "trace": traceback.format_exc().splitlines()[-12:],
        }
    print(json.dumps(result[name], indent=1, default=str), flush=True)
    return "error" not in result[name]


def measure(output: Path) -> None:
    """Run every stage and write the outcome after each."""
    major, minor = torch.cuda.get_device_capability()
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "versions": versions(),
    }

    def stage(name: str, run: Callable[[], Any]) -> bool:
        done = attempt(result, name, run)
        output.write_text(json.dumps(result, indent=1, default=str) + "\n")  # a crash keeps it
        return done

    if not stage("one_product", one_product) or not result["one_product"].get("executed"):
        return
    for model_name, model in models().items():
        every = model_name == "rotation"
        for backend in DOORS if every else ("dynamo",):
            for dtype_name in DTYPES if every else ("float16",):
                stage(
                    f"{model_name} | {backend} | {dtype_name}",
                    lambda m=model, d=DTYPES[dtype_name], b=backend: numerics(m, d, b),
                )


def table(result: Mapping[str, Any]) -> str:
    """What the engines computed, as Markdown."""
    product = result["one_product"]
    lines = [
        "| layers | door | dtype | engine | eager |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for name, found in result.items():
        if name.count(" | ") != 2:
            continue
        model, door, dtype = name.split(" | ")
        if "error" in found:
            errors = [" ".join(found["error"].splitlines()[:2]), ""]
        else:
            rows = found["relative_error"].values()
            errors = [f"{max(row[key] for row in rows):.1e}" for key in ("engine", "eager")]
        lines.append(f"| {model} | `{DOORS[door]}` | {dtype} | {' | '.join(errors)} |")
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return (
        f"{result['gpu']} (compute capability {result['compute_capability']}; the library lists "
        f"{', '.join(c for c in product['listed_capabilities'] if c.startswith('SM'))}). A raw "
        f"engine of one product: built, validity {product['validity'].split('.')[-1]}, executed "
        f"with a relative error of {product['relative_error']:.1e}.\n\n"
        + "\n".join(lines)
        + f"\n\nRelative errors against eager mode in float64 (int8: float32), dynamic batch, the "
        f"worst of {', '.join(map(str, BATCHES))}. {versions}."
    )


def rendered(page: str) -> str:
    """``page`` with the table between its markers."""
    before, rest = page.split(BEGIN)
    text = table(json.loads(RESULT.read_text(encoding="utf-8")))
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--render", action="store_true", help="write the table of docs/tensorrt.md")
    options = parser.parse_args()
    if options.render:
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        measure(options.output)


if __name__ == "__main__":
    main()
