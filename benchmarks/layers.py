"""SS1 layers on a GPU against dense, compiled dense, low rank and Monarch, in one run.

    python benchmarks/layers.py                       # results/layers.json
    python benchmarks/layers.py --upstream PATH       # also the authors' kernel, from a checkout

Every row states its fraction of the floor (see ``harness.floor_us``), with both ceilings measured
in the same run. Times are medians with a cold L2; see ``ss1_compile.kernels.tune``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import harness
import torch
import torch.nn.functional as F
from baselines import LowRank, Monarch
from torch import Tensor

from ss1_compile.kernels import cuda, lowering, tune
from ss1_compile.kernels.lowering import Layer

TARGET_SHAPES = (
    (16384, 1024, 1024),
    (16384, 1024, 4096),
    (16384, 4096, 1024),
    (32768, 768, 3072),
    (8192, 4096, 4096),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
)
OTHER_SHAPES = (
    (1024, 1024, 1024),
    (32768, 1024, 1024),
    (36864, 768, 768),
    (36864, 768, 3072),
    (36864, 3072, 768),
    (32768, 768, 2304),
    (4096, 4096, 4096),
    (4096, 4096, 1024),
    (4096, 4096, 14336),
    (16384, 4096, 4096),
    (16384, 4096, 14336),
    (16384, 14336, 4096),
)
REDUCTIONS = (2, 4, 8)
DECODE_ROWS = (1, 4, 16, 64)
DECODE_LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096))
SKETCHES = ((16384, 1024), (16384, 4096), (32768, 768), (8192, 14336))


def ss1_layer(kind: str, m: int, k: int, n: int, c: int) -> Layer:
    """The layer that ``tune`` measures for this kind: J = c hashes, or one learned block sketch."""
    pair = tune.layers([(k, n)], [c], biases=[False])
    return replace(next(layer for layer in pair if layer.kind == kind), rows=m)


def parameters(data: tune.Operands) -> int:
    """Stored numbers; a rotation code is structure, learned blocks are parameters."""
    return data.z[0].numel() + (data.code.numel() if data.code.is_floating_point() else 0)


def layer_rows(
    shapes: Sequence[tuple[int, int, int]], compiled: bool, ceilings: tuple[float, float]
) -> list[dict[str, Any]]:
    """One row per shape, c and method."""
    rows: list[dict[str, Any]] = []
    for m, k, n in shapes:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        dense = tune.measure(lambda x=x, w=weight: F.linear(x, w))
        best_dense = None
        if compiled:
            torch._dynamo.reset()
            fast = torch.compile(F.linear, mode="max-autotune-no-cudagraphs", dynamic=False)
            best_dense = tune.measure(lambda f=fast, x=x, w=weight: f(x, w))
        for c in REDUCTIONS:
            floor = harness.floor_us(m, k, n, c, *ceilings)
            calls: dict[str, tuple[Callable[[], Tensor], int, str]] = {}
            for kind in ("rotation", "learned"):
                layer = ss1_layer(kind, m, k, n, c)
                data = tune.operands(layer)
                chosen = lowering.choose(layer, torch.cuda.get_device_name())
                calls[f"ss1 {kind}"] = (
                    lambda d=data, x=x: cuda.linear(x, d.code, d.z[0], None),
                    parameters(data),
                    chosen,
                )
            for name, make in (("low rank", LowRank), ("monarch", Monarch)):
                other = make(k, n, c, torch.bfloat16)
                calls[name] = (lambda o=other, x=x: o(x), other.parameters, "library")
            for name, (call, count, chosen) in calls.items():
                time = tune.measure(call)
                row = {
                    "method": name,
                    "M": m,
                    "K": k,
                    "N": n,
                    "c": c,
                    "us": round(time, 1),
                    "dense_us": round(dense, 1),
                    "compiled_dense_us": best_dense and round(best_dense, 1),
                    "speedup": round(dense / time, 3),
                    "floor_us": round(floor, 1),
                    "of_floor": round(floor / time, 3),
                    "parameters": round(count / (k * n / c), 3),
                    "lowering": chosen,
                }
                rows.append(row)
        print(f"{m} x {k} -> {n}", {r["method"]: r["speedup"] for r in rows[-4:]}, flush=True)
    return rows


def sketch_rows(ceilings: tuple[float, float]) -> list[dict[str, Any]]:
    """Sketch and unsketch alone, as a fraction of copy bandwidth at the bytes they must move.

    ``copy_us`` is a copy of just as many bytes: below a few tens of MB it, too, is off the
    bandwidth of a large copy.
    """
    rows = []
    for m, k in SKETCHES:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        for c in (1, 2, 3, 4, 5, 8, 16):
            for kind in ("rotation", "learned"):
                if kind == "learned" and c not in (2, 4, 8, 16):
                    continue
                layer = ss1_layer(kind, 128, k, 8 * c, c)
                code, reduced = tune.operands(layer).code, layer.reduced_features
                sketched = cuda.sketch(x, code, reduced)
                moved = (x.numel() + sketched.numel()) * 2
                floor = moved / ceilings[0] / 1e6
                source = torch.randn(moved // 4, device="cuda", dtype=torch.bfloat16)
                target = torch.empty_like(source)
                times = {
                    "copy": tune.measure(lambda t=target, s=source: t.copy_(s)),
                    "sketch": tune.measure(lambda x=x, s=code, r=reduced: cuda.sketch(x, s, r)),
                    "unsketch": tune.measure(
                        lambda g=sketched, s=code, k=k: cuda.unsketch(g, s, k)
                    ),
                }
                row: dict[str, Any] = {"kind": kind, "M": m, "K": k, "c": c, "J": layer.hashes}
                row["B_K"] = reduced // code.shape[1] if kind == "rotation" else None
                for name, time in times.items():
                    row[f"{name}_us"] = round(time, 1)
                    row[f"{name}_of_copy"] = round(floor / time, 3)
                rows.append(row)
    return rows


def decode_rows(ceilings: tuple[float, float]) -> list[dict[str, Any]]:
    """M <= 64 in a CUDA graph over rotating weights: every lowering, and both dense layers."""
    rows = []
    for k, n in DECODE_LAYERS:
        for m in DECODE_ROWS:
            first = tune.operands(ss1_layer("rotation", m, k, n, 2))
            torch._dynamo.reset()
            fast = torch.compile(F.linear, mode="max-autotune-no-cudagraphs", dynamic=False)
            with torch.inference_mode():
                compiled = tune.measure_graph(
                    [lambda w=w, x=first.x, f=fast: f(x, w) for w in first.dense]
                )
            for c in REDUCTIONS:
                for kind in ("rotation", "learned"):
                    layer = ss1_layer(kind, m, k, n, c)
                    us = tune.times(layer)
                    chosen = lowering.choose(layer, torch.cuda.get_device_name())
                    weights = n * layer.reduced_features * 2 / ceilings[0] / 1e6
                    time = us[chosen]
                    row = {"kind": kind, "M": m, "K": k, "N": n, "c": c, "us": time}
                    row |= {"lowering": chosen, "dense_us": us["dense"]}
                    row |= {"compiled_dense_us": round(compiled, 2)}
                    row |= {"floor_us": round(weights, 2), "of_floor": round(weights / time, 3)}
                    row |= {"accept_us": round(weights / 0.65 + 4, 2)}
                    rows.append(row)
        print(f"decode {k} -> {n} measured", flush=True)
    return rows


def upstream_rows(path: str) -> list[dict[str, Any]]:
    """The authors' kernel, its tiles autotuned, in float16 as they run it."""
    sys.path.insert(0, path)
    from sketch_structured_linear.SSL_Kernel.SSLForward import ssl_forward_tl

    rows = []
    for m, k, n in TARGET_SHAPES[1:3] + TARGET_SHAPES[5:6]:
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)
        weight = torch.randn(n, k, device="cuda", dtype=torch.float16) * 0.02
        dense = tune.measure(lambda x=x, w=weight: F.linear(x, w))
        for c in (2, 4):
            z = torch.randn(n, k // c, device="cuda", dtype=torch.float16) * 0.02

            def call(x: Tensor = x, z: Tensor = z, c: int = c) -> Tensor:
                m, k, n = x.shape[0], x.shape[1], z.shape[0]
                return ssl_forward_tl(
                    *(x, z.T, None, m, k, n, c, 3, 5, 7, 45007), allow_autotune=True, BIAS=False
                )

            time = tune.measure(call)
            row = {"M": m, "K": k, "N": n, "c": c, "us": round(time, 1)}
            rows.append(row | {"dense_us": round(dense, 1), "speedup": round(dense / time, 3)})
            print("upstream", rows[-1], flush=True)
    return rows


SECTIONS = ("sketches", "layers", "decode", "more_layers", "upstream")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--upstream", metavar="PATH", help="checkout of the authors' kernel")
    parser.add_argument("--name", default="layers", help="results/<name>.json")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        help="measure these and keep the others of an existing results file",
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    exists = (harness.RESULTS / f"{options.name}.json").is_file()
    keep = exists and set(options.sections) != set(SECTIONS)
    result: dict[str, Any] = harness.read(options.name) if keep else {}
    result["environment"] = harness.environment()
    ceilings = tune.ceilings()
    result["copy_tb_s"], result["matmul_tflop_s"] = (round(c, 3) for c in ceilings)
    measured: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "sketches": lambda: sketch_rows(ceilings),
        "layers": lambda: layer_rows(TARGET_SHAPES, compiled=True, ceilings=ceilings),
        "decode": lambda: decode_rows(ceilings),
        "more_layers": lambda: layer_rows(OTHER_SHAPES, compiled=False, ceilings=ceilings),
    }
    if options.upstream:
        measured["upstream"] = lambda: upstream_rows(options.upstream)
    for section in options.sections:
        if section in measured:
            result[section] = measured[section]()
            stamps = result.setdefault("measured", {})
            stamps[section] = f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}"
            harness.write(options.name, result)
    print("wrote", harness.RESULTS / f"{options.name}.json")


if __name__ == "__main__":
    main()
