"""Quantised SS1 layers on a GPU against bf16 SS1, dense bf16 and dense 8-bit layers, in one run.

    python benchmarks/quantized.py        # results/quantized.json

Dense 8-bit: torchao's ``Int8WeightOnlyConfig`` and ``Int8DynamicActivationInt8WeightConfig`` under
``torch.compile`` where torchao is installed, and the library's own products alone (``_int_mm`` to
int32, ``_scaled_mm`` with row scales), which quantise nothing and so bound any layer built on them.
Times are medians with a cold L2; see ``ss1_compile.kernels.tune``.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any

import harness
import torch
import torch.nn.functional as F
from layers import DECODE_LAYERS, DECODE_ROWS, REDUCTIONS, TARGET_SHAPES, ss1_layer
from torch import Tensor

from ss1_compile.kernels import cuda, quantized_cuda, tune
from ss1_compile.kernels.quantize import quantize_rows

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
KINDS = ("rotation", "learned")
NAMES = {INT8: "int8", FLOAT8: "fp8"}
SHAPES = TARGET_SHAPES
SKETCHES = ((16384, 1024), (16384, 4096), (8192, 14336))
Job = tuple[str, int, int, int, int]


def operands(kind: str, m: int, k: int, n: int, c: int) -> tuple[tune.Operands, dict[Any, Any]]:
    """bf16 operands of one layer and, per quantised dtype, copies of ``(z, scale)``."""
    data = tune.operands(ss1_layer(kind, m, k, n, c))
    return data, {t: [quantize_rows(z, 1, t) for z in data.z] for t in NAMES}


def _compile(job: Job) -> None:
    """Fill Triton's cache for one layer from another process."""
    data, quantized = operands(*job)
    for z in quantized.values():
        for dynamic in (False, True):
            quantized_cuda.linear(data.x, data.code, *z[0], None, dynamic)
    cuda.linear(data.x, data.code, data.z[0], None)
    torch.cuda.synchronize()


def warm(jobs: Iterable[Job], processes: int) -> None:
    """Compile every kernel of ``jobs`` in ``processes`` processes."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(_compile, list(jobs), chunksize=1)


def torchao_layers(k: int, n: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Compiled torchao layers ``K -> N``; none where torchao is missing."""
    try:
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError as error:
        print("torchao:", error)
        return {}
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    configs = {
        "torchao weight-only": Int8WeightOnlyConfig,
        "torchao dynamic": Int8DynamicActivationInt8WeightConfig,
    }
    for name, config in configs.items():
        layer = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
        model = torch.nn.Sequential(layer).eval()
        try:
            quantize_(model, config())
        except Exception as error:  # any version may refuse any torch; the row is then absent
            print(f"{name}: {type(error).__name__}: {error}"[:300])
            continue
        found[name] = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)
    return found


def dense_times(m: int, k: int, n: int, torchao: bool) -> dict[str, float]:
    """Microseconds of the dense layers and of the library's 8-bit products alone."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    (xq, xs), (wq, _) = quantize_rows(x), quantize_rows(weight)
    xf, wf = (quantize_rows(t, 1, FLOAT8)[0] for t in (x, weight))
    ws = torch.ones(1, n, device="cuda")
    calls: dict[str, Callable[[], Tensor]] = {
        "dense bf16": lambda: F.linear(x, weight),
        "_int_mm alone": lambda: torch._int_mm(xq, wq.t()),
        "_scaled_mm alone": lambda: torch._scaled_mm(
            xf, wf.t(), scale_a=xs, scale_b=ws, out_dtype=torch.bfloat16
        ),
    }
    times = {name: tune.measure(call) for name, call in calls.items()}
    if torchao:
        for name, layer in torchao_layers(k, n).items():
            torch._dynamo.reset()
            times[name] = tune.measure(lambda f=layer: f(x))
    return {name: round(us, 1) for name, us in times.items()}


def layer_row(kind: str, m: int, k: int, n: int, c: int) -> dict[str, Any]:
    """bf16 SS1 and every quantised form of one layer, in microseconds."""
    data, quantized = operands(kind, m, k, n, c)

    def time(lowering: str | None, z: Tensor, scale: Tensor, dynamic: bool) -> float:
        if lowering is not None:
            return tune.measure(
                lambda: quantized_cuda.run(lowering, data.x, data.code, z, scale, None, dynamic)
            )
        return tune.measure(
            lambda: quantized_cuda.linear(data.x, data.code, z, scale, None, dynamic)
        )

    times = {"bf16": tune.measure(lambda: cuda.linear(data.x, data.code, data.z[0], None))}
    for dtype, ((z, scale), *_) in quantized.items():
        times[f"{NAMES[dtype]} weight-only"] = time(None, z, scale, False)
        times[f"{NAMES[dtype]} dynamic"] = time(None, z, scale, True)
        if data.code.shape[0] == 1 and dtype == FLOAT8:
            times["fp8 dynamic, library"] = time("library", z, scale, True)
    row: dict[str, Any] = {"kind": kind, "M": m, "K": k, "N": n, "c": c}
    return row | {name: round(us, 1) for name, us in times.items()}


def layer_rows(shapes: Iterable[tuple[int, int, int]], torchao: set[int]) -> list[dict[str, Any]]:
    """One row per shape, kind and c, with the dense times of the shape."""
    rows = []
    for at, (m, k, n) in enumerate(shapes):
        dense = dense_times(m, k, n, at in torchao)
        for c in REDUCTIONS:
            for kind in KINDS:
                rows.append(layer_row(kind, m, k, n, c) | dense)
                print(rows[-1], flush=True)
    return rows


def sketch_row(m: int, k: int, c: int) -> dict[str, Any]:
    """The quantising sketches of both kinds against the bf16 ones."""
    triton = quantized_cuda._triton()
    assert triton is not None
    times = {}
    for kind in KINDS:
        data = tune.operands(ss1_layer(kind, m, k, 8 * c, c))
        times[f"{kind} bf16"] = tune.measure(
            lambda d=data: cuda.sketch(d.x, d.code, d.z[0].shape[1])
        )
        for variant in ("gather", "permute", "two") if kind == "rotation" else ():
            times[f"rotation {variant}"] = tune.measure(
                lambda d=data, v=variant: triton[0].rotation(
                    d.x, d.code, d.z[0].shape[1], INT8, variant=v
                )
            )
        times[f"{kind} int8"] = tune.measure(
            lambda d=data: quantized_cuda.sketch(d.x, d.code, d.z[0].shape[1], INT8)
        )
    return {"M": m, "K": k, "c": c} | {name: round(us, 1) for name, us in times.items()}


def decode_row(kind: str, m: int, k: int, n: int, c: int, copy_tb_s: float) -> dict[str, Any]:
    """M <= 64: CUDA graph over rotating weights; ``accept`` is reading z once / 0.65 + 4 µs."""
    data, quantized = operands(kind, m, k, n, c)
    calls: dict[str, list[Callable[[], Tensor]]] = {
        "bf16": [lambda z=z: cuda.linear(data.x, data.code, z, None) for z in data.z]
    }
    for name, dynamic in (("int8 weight-only", False), ("int8 dynamic", True)):
        calls[name] = [
            lambda z=z, s=s, d=dynamic: quantized_cuda.linear(data.x, data.code, z, s, None, d)
            for z, s in quantized[INT8]
        ]
    row: dict[str, Any] = {"kind": kind, "M": m, "K": k, "N": n, "c": c}
    row["accept"] = round(data.z[0].numel() / copy_tb_s / 1e6 / 0.65 + 4, 2)
    with torch.inference_mode():
        return row | {name: round(tune.measure_graph(c), 2) for name, c in calls.items()}


def decode_rows(copy_tb_s: float) -> list[dict[str, Any]]:
    """One row per layer, M, kind and c, with the dense time."""
    rows = []
    for k, n in DECODE_LAYERS:
        for m in DECODE_ROWS:
            first = tune.operands(ss1_layer("rotation", m, k, n, 2))
            with torch.inference_mode():
                dense = tune.measure_graph(
                    [lambda w=w, x=first.x: F.linear(x, w) for w in first.dense]
                )
            for c in REDUCTIONS:
                for kind in KINDS:
                    row = decode_row(kind, m, k, n, c, copy_tb_s)
                    rows.append(row | {"dense bf16": round(dense, 2)})
            print(rows[-2:], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sections", nargs="+", default=("sketches", "layers", "decode"))
    parser.add_argument("--shapes", nargs="+", type=int, help="indices into the target shapes")
    parser.add_argument("--torchao", nargs="*", type=int, default=[2, 5], help="shape indices")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile kernels")
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes = [SHAPES[i] for i in options.shapes] if options.shapes else list(SHAPES)
    jobs: list[Job] = []
    if "layers" in options.sections:
        jobs += [(d, m, k, n, c) for m, k, n in shapes for c in REDUCTIONS for d in KINDS]
    if "decode" in options.sections:
        jobs += [
            (d, m, k, n, c)
            for m in DECODE_ROWS
            for k, n in DECODE_LAYERS
            for c in REDUCTIONS
            for d in KINDS
        ]
    warm(jobs, options.jobs)
    result: dict[str, Any] = {"environment": harness.environment()}
    copy, matmul = tune.ceilings()
    result |= {"copy_tb_s": round(copy, 3), "matmul_tflop_s": round(matmul, 1), "unit": "µs"}
    if "sketches" in options.sections:
        result["sketches"] = [sketch_row(m, k, c) for m, k in SKETCHES for c in REDUCTIONS]
        harness.write("quantized", result)
    if "layers" in options.sections:
        result["layers"] = layer_rows(shapes, set(options.torchao))
        harness.write("quantized", result)
    if "decode" in options.sections:
        result["decode"] = decode_rows(copy)
        harness.write("quantized", result)
    print("wrote", harness.RESULTS / "quantized.json")


if __name__ == "__main__":
    main()
