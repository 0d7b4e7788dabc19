"""Dense against SS1 in ONNX Runtime on one CPU thread: single layers, and MiniLM end to end.

Writes ``benchmarks/results/onnx_cpu.json`` and the tables of ``docs/onnx.md``:

    python benchmarks/onnx_cpu.py [--seconds 0.5] [--quick] [--render-only]

The four kinds of file are dense float32, ONNX Runtime's own dynamic int8 of that
(``quantize_dynamic``), SS1 float32 and SS1 ``int8_dynamic``. All files of a case take turns, call
by call, and every figure is a median of CPU time, which is the wall time of one thread without the
waiting for other processes. The weights are random or averaged: they do not change the time. J = 1
is measured with ``B_K = 32``, for which the sketch is one product on single features.

MiniLM is exported at opset 23, whose ``Attention`` is the faster spelling for the dense file, too.
"Tuned" is the dense file after :func:`ss1_compile.onnx.surroundings.tune_for_cpu`, which
``export_onnx`` applies to its own: what is left of the gain is the layers'.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from cpu_layers import cpu_name
from harness import read, write
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

import ss1_compile
from ss1_compile.onnx import compress_onnx
from ss1_compile.onnx.surroundings import tune_for_cpu

PAGE = Path(__file__).resolve().parents[1] / "docs" / "onnx.md"
BEGIN, END = "<!-- speed: benchmarks/onnx_cpu.py -->", "<!-- end of speed -->"
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
SHAPES = ((1024, 1024), (768, 3072), (3072, 768), (4096, 4096))
TOKENS = (1, 128, 512)
REDUCTIONS = (2, 4, 8)
MODEL_TOKENS = 128
MODEL_OPSET = 23
BLOCK_K = {1: 32}
"""B_K by J; others have the default."""
MODEL_ROWS = {
    "dense": f"dense float32, opset {MODEL_OPSET}",
    "dense 20": "dense float32, opset 20",
    "tuned": "dense float32, tuned",
    "ort int8 dense": "ONNX Runtime int8",
    "ort int8 tuned": "ONNX Runtime int8, tuned",
}
Call = Callable[[], object]


def session(path: Path) -> ort.InferenceSession:
    """The file on one thread, every optimisation on."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def calls(sessions: Mapping[str, ort.InferenceSession], feeds: dict[str, Any]) -> dict[str, Call]:
    """A callable for each session."""
    return {name: lambda s=held: s.run(None, feeds) for name, held in sessions.items()}


def medians(functions: Mapping[str, Call], budget: float) -> dict[str, float]:
    """Median CPU seconds per call of each function, in turns, for about ``budget`` seconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
        function()
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times[next(iter(times))]) < 7:
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def dense_layer(path: Path, k: int, n: int) -> None:
    """``y = x W + b`` as a file."""
    rng = np.random.default_rng(0)
    weights = {
        "weight": rng.standard_normal((k, n), np.float32) / np.float32(k**0.5),
        "bias": rng.standard_normal(n, np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["product"], name="layer"),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ],
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", n])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def ort_int8(source: Path, target: Path) -> None:
    """ONNX Runtime's own dynamic quantisation; 7 bits, for the reason that SS1's are.

    Of matrix products alone: it takes the standard ``Attention`` for its own of that name and makes
    a file that it cannot load (1.31).
    """
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=QuantType.QInt8,
        reduce_range=True,
    )


def layer_sessions(folder: Path, k: int, n: int) -> dict[str, ort.InferenceSession]:
    """``dense``, ``ort int8`` and ``c J z`` for every reduction, J = c and 1, float32 and int8."""
    dense_layer(folder / "dense.onnx", k, n)
    ort_int8(folder / "dense.onnx", folder / "int8.onnx")
    sessions = {
        "dense": session(folder / "dense.onnx"),
        "ort int8": session(folder / "int8.onnx"),
    }
    for c in REDUCTIONS:
        for hashes, z in itertools.product((c, 1), (None, "int8_dynamic")):
            path = folder / "ss1.onnx"
            compress_onnx(
                folder / "dense.onnx",
                path,
                reduction=c,
                num_hashes=hashes,
                block_k=BLOCK_K.get(hashes),
                warn_error=10.0,
                quantization=z,  # type: ignore[arg-type]
            )
            sessions[f"{c} {hashes} {z or 'float32'}"] = session(path)
    return sessions


def measure_layers(k: int, n: int, seconds: float) -> list[dict[str, Any]]:
    """A row per number of tokens."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sessions = layer_sessions(Path(folder), k, n)
    for tokens in TOKENS:
        rng = np.random.default_rng(tokens)
        feeds = {"x": rng.standard_normal((tokens, k), np.float32)}
        taken = medians(calls(sessions, feeds), seconds)
        row = {"in_features": k, "out_features": n, "tokens": tokens}
        rows.append({**row, "ms": {name: round(1e3 * t, 4) for name, t in taken.items()}})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Progress: what matters of a row."""
    ms = row["ms"]
    return (
        f"{row['in_features']} → {row['out_features']}, T = {row['tokens']}: dense "
        f"{ms['dense']:.3f} ms, ORT int8 {ms['ort int8']:.3f}, SS1 int8 c = 4 {best(ms, 4):.3f} "
        f"({ms['ort int8'] / ms['4 4 int8_dynamic']:.2f}× with J = 4, "
        f"{ms['ort int8'] / ms['4 1 int8_dynamic']:.2f}× with J = 1)"
    )


def best(ms: dict[str, float], c: int) -> float:
    """The faster of J = c and J = 1, int8."""
    return min(ms[f"{c} {hashes} int8_dynamic"] for hashes in (c, 1))


def measure_model(seconds: float) -> dict[str, Any]:
    """all-MiniLM-L6-v2, one sequence of 128 tokens."""
    from ss1_compile.demo.data import load_model

    ids = torch.randint(1000, 20000, (1, MODEL_TOKENS))
    args = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sessions = {}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        dense, _ = load_model()
        for name, opset in (("dense", MODEL_OPSET), ("dense 20", 20)):
            path = folder / f"{name}.onnx"
            torch.onnx.export(
                dense, (), path, kwargs=args, dynamo=True, verbose=False, opset_version=opset
            )
            sessions[name] = session(path)
        tuned = ir.load(folder / "dense.onnx")
        tune_for_cpu(tuned)
        ir.save(tuned, folder / "tuned.onnx")
        for name in ("dense", "tuned"):
            ort_int8(folder / f"{name}.onnx", folder / "int8.onnx")
            sessions[f"ort int8 {name}"] = session(folder / "int8.onnx")
        sessions["tuned"] = session(folder / "tuned.onnx")
        for hashes in (4, 1):
            model, _ = load_model()
            ss1_compile.compress(
                model,
                reduction=4,
                num_hashes=hashes,
                block_k=BLOCK_K.get(hashes),
                warn_error=10,
                progress=False,
            )
            for z in (None, "int8_dynamic"):
                path = folder / "ss1.onnx"
                ss1_compile.export_onnx(
                    model,
                    args,
                    path,
                    opset=MODEL_OPSET,
                    quantization=z,  # type: ignore[arg-type]
                    verify=False,
                )
                sessions[f"4 {hashes} {z or 'float32'}"] = session(path)
    feeds = {name: tensor.numpy() for name, tensor in args.items()}
    taken = medians(calls(sessions, feeds), seconds)
    return {"tokens": MODEL_TOKENS, "ms": {name: round(1e3 * t, 3) for name, t in taken.items()}}


# --- the page ------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    columns = [f"c = {c}" for c in REDUCTIONS]
    lines = [
        "| K → N | T | dense, ms | ORT int8 | J | "
        + " | ".join(f"SS1 {z}, {c}" for z in ("fp32", "int8") for c in columns)
        + " |",
        "|---|" + "---:|" * 3 + "---|" + "---:|" * 6,
    ]
    for row in result["layers"]:
        ms = row["ms"]
        for label in ("c", "1"):
            names = [
                f"{c} {c if label == 'c' else 1} {z}"
                for z in ("float32", "int8_dynamic")
                for c in REDUCTIONS
            ]
            cells = [f"{ms['dense'] / ms[name]:.2f}×" for name in names]
            lines.append(
                f"| {row['in_features']} → {row['out_features']} | {row['tokens']} | "
                f"{ms['dense']:.3f} | {ms['dense'] / ms['ort int8']:.2f}× | {label} | "
                f"{' | '.join(cells)} |"
            )
    model = result["model"]["ms"]
    lines += [
        "",
        f"all-MiniLM-L6-v2, end to end, one sequence of {result['model']['tokens']} tokens, c = 4:",
        "",
        "| | ms | speed-up over dense | over dense, tuned |",
        "|---|---:|---:|---:|",
    ]
    for key, ms in model.items():
        rest = key.partition(" ")[2]
        label = MODEL_ROWS.get(key) or f"SS1 {rest.split()[1]}, J = {rest.split()[0]}"
        lines.append(
            f"| {label} | {ms:.2f} | {model['dense'] / ms:.2f}× | {model['tuned'] / ms:.2f}× |"
        )
    head = result["environment"]
    versions = ", ".join(f"{name} {head[name]}" for name in PACKAGES)
    lines += ["", f"{head['cpu']}, one thread; {versions}."]
    return "\n".join(lines)


def render(page: Path = PAGE) -> str:
    """The page with the tables in their place."""
    head, _, rest = page.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"{page} has no place for the tables")
    return f"{head}{BEGIN}\n\n{tables(read('onnx_cpu'))}\n\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape and T")
    parser.add_argument("--quick", action="store_true", help="print and write nothing")
    parser.add_argument("--render-only", action="store_true")
    options = parser.parse_args()
    if not options.render_only:
        torch.set_num_threads(1)
        environment = {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        }
        model = measure_model(options.seconds)
        print(json.dumps(model), flush=True)
        layers: list[dict[str, Any]] = []
        for k, n in SHAPES:
            layers += measure_layers(k, n, options.seconds)
            if not options.quick:  # shape by shape: a run that is cut short has measured these
                write("onnx_cpu", {"environment": environment, "model": model, "layers": layers})
        if options.quick:
            return
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
