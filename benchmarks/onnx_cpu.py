"""Dense against SS1 in ONNX Runtime on one CPU thread: single layers, and MiniLM end to end.

Writes ``benchmarks/results/onnx_cpu.json`` and the tables of ``docs/onnx.md``:

    python benchmarks/onnx_cpu.py [--seconds 0.5] [--only model] [--quick] [--render-only]

The kinds of file are dense float32, ONNX Runtime's own dynamic int8 of that
(``quantize_dynamic``), SS1 float32 and SS1 ``int8_dynamic``. All files of a case take turns, call
by call, and every figure is a median of CPU time, which is the wall time of one thread without the
waiting for other processes. The weights are random or averaged: they do not change the time. J = 1
is measured with ``B_K = 32``, for which the sketch is one product on single features. Learned
sketches of single layers have groups of 128; MiniLM's are fitted, and shared by q, k and v.

MiniLM is exported at opset 23, whose ``Attention`` is the faster spelling for the dense file, too.
"Tuned" is the dense file after :func:`ss1_compile.onnx.surroundings.tune_for_cpu`, which
``export_onnx`` applies to its own: what is left of the gain is the layers'.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
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
from ss1_compile import SS1Linear
from ss1_compile.config import Quantization
from ss1_compile.learned import LearnedStructure
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
MODEL_BUDGETS = 4
"""Times as long as a shape and T: its calls take longer."""
SKETCHES = ("J = c", "J = 1", "learned")
BLOCK_K = {"J = 1": 32}
"""B_K of rotations; others have the default."""
CALIBRATION_DOCUMENTS = 16
MODEL_ROWS = {
    "dense": f"dense float32, opset {MODEL_OPSET}",
    "dense 20": "dense float32, opset 20",
    "tuned": "dense float32, tuned",
    "ort int8 dense": "ONNX Runtime int8",
    "ort int8 tuned": "ONNX Runtime int8, tuned",
}
ARITHMETIC: dict[str, Quantization | None] = {"float32": None, "int8": "int8_dynamic"}
Call = Callable[[], object]


def session(path: Path) -> ort.InferenceSession:
    """The file on one thread, every optimisation on."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def calls(
    sessions: Mapping[str, ort.InferenceSession], *inputs: np.ndarray[Any, Any]
) -> dict[str, Call]:
    """A callable for each session; the inputs have other names in each."""

    def call(held: ort.InferenceSession) -> Call:
        names = [found.name for found in held.get_inputs()]
        feeds = dict(zip(names, inputs, strict=True))
        return lambda: held.run(None, feeds)

    return {name: call(held) for name, held in sessions.items()}


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


def learned_layer(path: Path, k: int, n: int, c: int, quantization: Quantization | None) -> None:
    """A layer with a learned sketch and random weights as a file with dynamic rows."""
    layer = SS1Linear(LearnedStructure.create(k, n, c))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=k**-0.5)
    model = torch.nn.Sequential(layer).eval()
    rows = torch.export.Dim.DYNAMIC
    ss1_compile.export_onnx(
        model,
        (torch.randn(5, k),),
        path,
        dynamic_shapes=({0: rows},),
        quantization=quantization,
        verify=False,
    )


def layer_sessions(folder: Path, k: int, n: int) -> dict[str, ort.InferenceSession]:
    """``dense``, ``ort int8`` and ``c, sketch, z`` for every reduction, sketch and arithmetic."""
    dense_layer(folder / "dense.onnx", k, n)
    ort_int8(folder / "dense.onnx", folder / "int8.onnx")
    sessions = {
        "dense": session(folder / "dense.onnx"),
        "ort int8": session(folder / "int8.onnx"),
    }
    for c, sketch, z in itertools.product(REDUCTIONS, SKETCHES, ARITHMETIC):
        path = folder / "ss1.onnx"
        if sketch == "learned":
            learned_layer(path, k, n, c, ARITHMETIC[z])
        else:
            compress_onnx(
                folder / "dense.onnx",
                path,
                reduction=c,
                num_hashes=c if sketch == "J = c" else 1,
                block_k=BLOCK_K.get(sketch),
                warn_error=10.0,
                quantization=ARITHMETIC[z],
            )
        sessions[f"{c}, {sketch}, {z}"] = session(path)
    return sessions


def measure_layers(k: int, n: int, seconds: float) -> list[dict[str, Any]]:
    """A row per number of tokens."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sessions = layer_sessions(Path(folder), k, n)
    for tokens in TOKENS:
        rng = np.random.default_rng(tokens)
        taken = medians(calls(sessions, rng.standard_normal((tokens, k), np.float32)), seconds)
        row = {"in_features": k, "out_features": n, "tokens": tokens}
        rows.append({**row, "ms": {name: round(1e3 * t, 4) for name, t in taken.items()}})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Progress: what matters of a row."""
    ms = row["ms"]
    ratios = [f"{ms['ort int8'] / ms[f'4, {sketch}, int8']:.2f}× {sketch}" for sketch in SKETCHES]
    return (
        f"{row['in_features']} → {row['out_features']}, T = {row['tokens']}: dense "
        f"{ms['dense']:.3f} ms, ORT int8 {ms['ort int8']:.3f}, SS1 int8 at c = 4 over that: "
        f"{', '.join(ratios)}"
    )


def measure_model(seconds: float) -> dict[str, Any]:
    """all-MiniLM-L6-v2, one sequence of 128 tokens.

    Measured in a process of its own: in the one that made the files the same file took 35 or 44 ms.
    """
    ids = torch.randint(1000, 20000, (1, MODEL_TOKENS))
    args = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = [tensor.numpy() for tensor in args.values()]
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, spawn) as pool:
        files = model_files(Path(folder), args)
        taken = pool.submit(race_files, files, inputs, seconds).result()
    return {"tokens": MODEL_TOKENS, "ms": {name: round(1e3 * t, 3) for name, t in taken.items()}}


def race_files(
    files: Mapping[str, Path], inputs: Sequence[np.ndarray[Any, Any]], seconds: float
) -> dict[str, float]:
    """Median CPU seconds per call of each file."""
    sessions = {name: session(path) for name, path in files.items()}
    return medians(calls(sessions, *inputs), seconds)


def model_files(folder: Path, args: dict[str, torch.Tensor]) -> dict[str, Path]:
    """MiniLM dense, tuned, in ONNX Runtime's int8, and compressed in every way."""
    from ss1_compile.demo.data import load_articles, load_model, tokenize

    names = (*MODEL_ROWS, *(f"4, {sketch}, {z}" for sketch in SKETCHES for z in ARITHMETIC))
    files = {name: folder / f"{name}.onnx" for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense, tokenizer = load_model()
        for name, opset in (("dense", MODEL_OPSET), ("dense 20", 20)):
            torch.onnx.export(
                dense, (), files[name], kwargs=args, dynamo=True, verbose=False, opset_version=opset
            )
        tuned = ir.load(files["dense"])
        tune_for_cpu(tuned)
        ir.save(tuned, files["tuned"])
        for name in ("dense", "tuned"):
            ort_int8(files[name], files[f"ort int8 {name}"])
        articles = load_articles(CALIBRATION_DOCUMENTS, 1, 1)
        calibration = tokenize(tokenizer, [a.body for a in articles.calibration], batch_size=8)
        for sketch in SKETCHES:
            model, _ = load_model()
            ss1_compile.compress(
                model,
                None,
                calibration if sketch == "learned" else None,
                reduction=4,
                num_hashes=1 if sketch == "J = 1" else None,
                block_k=BLOCK_K.get(sketch),
                warn_error=10,
                progress=False,
            )
            for z, quantization in ARITHMETIC.items():
                ss1_compile.export_onnx(
                    model,
                    args,
                    files[f"4, {sketch}, {z}"],
                    opset=MODEL_OPSET,
                    quantization=quantization,
                    verify=False,
                )
    return files


# --- the page ------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    columns = [f"c = {c}" for c in REDUCTIONS]
    lines = [
        "| K → N | T | dense, ms | ORT int8 | sketch | "
        + " | ".join(f"SS1 {z}, {c}" for z in ARITHMETIC for c in columns)
        + " |",
        "|---|" + "---:|" * 3 + "---|" + "---:|" * 6,
    ]
    for row in result["layers"]:
        ms = row["ms"]
        for sketch in SKETCHES:
            names = [f"{c}, {sketch}, {z}" for z in ARITHMETIC for c in REDUCTIONS]
            cells = [f"{ms['dense'] / ms[name]:.2f}×" for name in names]
            lines.append(
                f"| {row['in_features']} → {row['out_features']} | {row['tokens']} | "
                f"{ms['dense']:.3f} | {ms['dense'] / ms['ort int8']:.2f}× | {sketch} | "
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
        label = MODEL_ROWS.get(key)
        if label is None:
            _, sketch, z = key.split(", ")
            label = f"SS1 {z}, {sketch}"
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
    parser.add_argument("--only", choices=["layers", "model"], help="keep the others' figures")
    parser.add_argument("--render-only", action="store_true")
    options = parser.parse_args()
    if not options.render_only:
        torch.set_num_threads(1)
        result: dict[str, Any] = read("onnx_cpu") if options.only else {}
        result["environment"] = {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        }
        if options.only != "layers":
            result["model"] = measure_model(MODEL_BUDGETS * options.seconds)
            print(json.dumps(result["model"]), flush=True)
        if options.only != "model":
            result["layers"] = []
        for k, n in SHAPES if options.only != "model" else ():
            result["layers"] += measure_layers(k, n, options.seconds)
            if not options.quick:  # shape by shape: a run that is cut short has measured these
                write("onnx_cpu", result)
        if options.quick:
            return
        write("onnx_cpu", result)
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
