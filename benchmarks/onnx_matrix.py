"""Which tools take the exported files: opset × form × z × tool, with dynamic batch and sequence.

Writes ``benchmarks/results/onnx_matrix.json`` and the table of ``docs/onnx.md``:

    python benchmarks/onnx_matrix.py [--opsets 18 21]

Needs onnxslim, onnxsim and openvino beside the extra ``onnx``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import torch
from torch import nn

import ss1_compile
from ss1_compile import export_onnx
from ss1_compile.onnx import register_schemas
from ss1_compile.onnx.export import OPSETS
from ss1_compile.onnx.oracle import oracle_of
from ss1_compile.onnx.quantization import SEVEN_BITS
from ss1_compile.onnx.runner import relative_error

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "onnx_matrix.json"
PAGE = ROOT / "docs" / "onnx.md"
BEGIN, END = "<!-- matrix: benchmarks/onnx_matrix.py -->", "<!-- end of matrix -->"
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxslim", "onnxsim", "openvino")
NEEDS_KERNEL = "needs a kernel"

BLOCK_K = {None: 8, "int8_dynamic": 32}
"""B_K by quantisation: below and above the size up to which the sketch works on single features."""

Array = np.ndarray[Any, Any]
Pairs = Sequence[tuple[Array, Array]]


class Block(nn.Module):
    """A feed-forward block with a residual; K = 72 and N = 90 are ragged."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(72)
        self.up, self.down = nn.Linear(72, 90), nn.Linear(90, 72, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, 72]`` to the same."""
        return x + self.down(nn.functional.relu(self.up(self.norm(x))))


# --- tools: each raises, or returns the worst error where it computes ----------------------------


def _close(pairs: Pairs, run: Callable[[Array], Any], tolerance: float) -> None:
    for x, expected in pairs:
        found = np.asarray(run(x))
        if found.shape != expected.shape:
            raise ValueError(f"shape {found.shape}, not {expected.shape}")
        error = relative_error(torch.from_numpy(found), torch.from_numpy(expected))
        if not error <= tolerance:
            raise ValueError(f"relative error {error:.1e}")


def _session(model: Any) -> Callable[[Array], Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options)
    return lambda x: session.run(None, {"x": x})[0]


def run_ort(path: Path, pairs: Pairs, tolerance: float) -> None:
    _close(pairs, _session(path), tolerance)


def run_reference(path: Path, pairs: Pairs, tolerance: float) -> None:
    evaluator = onnx.reference.ReferenceEvaluator(str(path))
    _close(pairs, lambda x: evaluator.run(None, {"x": x})[0], tolerance)


def run_checker(path: Path, pairs: Pairs, tolerance: float) -> None:
    onnx.checker.check_model(str(path), full_check=True)


def run_inference(path: Path, pairs: Pairs, tolerance: float) -> None:
    inferred = onnx.shape_inference.infer_shapes(
        onnx.load(path), check_type=True, strict_mode=True, data_prop=True
    )
    last = inferred.graph.output[0].type.tensor_type.shape.dim[-1]
    if last.dim_value != pairs[0][1].shape[-1]:
        raise ValueError(f"the last dimension of the output is {last}")


def run_onnxslim(path: Path, pairs: Pairs, tolerance: float) -> None:
    import onnxslim

    _close(pairs, _session(onnxslim.slim(onnx.load(path))), tolerance)


def run_onnxsim(path: Path, pairs: Pairs, tolerance: float) -> None:
    import onnxsim

    simplified, checked = onnxsim.simplify(onnx.load(path))
    if not checked:
        raise ValueError("onnxsim's own check failed")
    _close(pairs, _session(simplified), tolerance)


def run_openvino(path: Path, pairs: Pairs, tolerance: float) -> None:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    _close(pairs, lambda x: compiled([x])[0], tolerance)


TOOLS: dict[str, Callable[[Path, Pairs, float], None]] = {
    "ONNX Runtime": run_ort,
    "onnx.reference": run_reference,
    "checker, full": run_checker,
    "strict inference": run_inference,
    "onnxslim": run_onnxslim,
    "onnxsim": run_onnxsim,
    "OpenVINO": run_openvino,
}
SYMBOLIC = ("checker, full", "strict inference")


# --- the matrix ----------------------------------------------------------------------------------


def measure(opsets: Sequence[int], tools: Sequence[str] = tuple(TOOLS)) -> list[dict[str, Any]]:
    """A row per opset, form and quantisation; a cell per tool: ``"ok"`` or what went wrong."""
    torch.manual_seed(0)
    register_schemas()
    example = torch.randn(2, 5, 72)
    programs = {quantization: _program(example, b) for quantization, b in BLOCK_K.items()}
    inputs = [example, torch.randn(3, 7, 72)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for opset in opsets:
            for quantization, program in programs.items():
                for form in ("function", "standard", "custom"):
                    export_onnx(
                        program,
                        (),
                        path,
                        form=form,
                        opset=opset,
                        quantization=quantization,  # type: ignore[arg-type]
                    )
                    pairs = [(x.numpy(), _expected(program, x, quantization)) for x in inputs]
                    tolerance = 1e-5 if quantization is None else 1e-2
                    cells = {name: _cell(name, form, path, pairs, tolerance) for name in tools}
                    row = {"opset": opset, "form": form, "z": quantization or "float32"}
                    rows.append({**row, **cells})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _program(example: torch.Tensor, block_k: int) -> torch.export.ExportedProgram:
    model = nn.Sequential(Block(), Block()).eval()
    ss1_compile.compress(model, block_k=block_k, min_features=8, warn_error=10, progress=False)
    axis = torch.export.Dim.DYNAMIC
    return torch.export.export(Wrapped(model), (example,), dynamic_shapes=({0: axis, 1: axis},))


class Wrapped(nn.Module):
    """Names the input ``x``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The inner model of ``x``."""
        y: torch.Tensor = self.inner(x)
        return y


def _expected(program: Any, x: torch.Tensor, quantization: str | None) -> Array:
    with torch.no_grad():
        y: torch.Tensor = oracle_of(program, quantization, SEVEN_BITS)([x])  # type: ignore[arg-type]
    return y.numpy()


def _cell(name: str, form: str, path: Path, pairs: Pairs, tolerance: float) -> str:
    if form == "custom" and name not in SYMBOLIC:
        return NEEDS_KERNEL
    try:
        TOOLS[name](path, pairs, tolerance)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
    return "ok"


# --- the page ------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The matrix in Markdown; rows that agree on every tool are one."""
    tools = [tool for tool in TOOLS if tool in result["rows"][0]]
    merged: dict[tuple[str, ...], list[int]] = {}
    notes: list[str] = []
    for row in result["rows"]:
        cells = []
        for tool in tools:
            cell = row[tool]
            if cell == NEEDS_KERNEL:
                cell = "—"
            elif cell != "ok":
                if cell not in notes:
                    notes.append(cell)
                cell = f"fails [{notes.index(cell) + 1}]"
            cells.append(cell)
        merged.setdefault((row["form"], row["z"], *cells), []).append(row["opset"])
    lines = [
        f"| form | z | opset | {' | '.join(tools)} |",
        f"|{'---|' * (len(tools) + 3)}",
    ]
    for (form, z, *cells), opsets in sorted(merged.items()):
        lines.append(f"| {form} | {z} | {_ranges(opsets)} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += ["", f"Measured with {versions}. —: the tool has no kernel for a bare node."]
    lines += [f"\n[{i + 1}] `{note}`" for i, note in enumerate(notes)]
    return "\n".join(lines)


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a} … {b}" if a < b else str(a) for a, b in runs)


def render(page: Path = PAGE, results: Path = RESULTS) -> str:
    """The page with the matrix of the results in its place."""
    text = page.read_text()
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"{page} has no place for the matrix")
    return f"{head}{BEGIN}\n\n{table(json.loads(results.read_text()))}\n\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--opsets", type=int, nargs="+", default=list(OPSETS))
    parser.add_argument("--render-only", action="store_true")
    options = parser.parse_args()
    if not options.render_only:
        versions = {name: metadata.version(name) for name in PACKAGES}
        rows = measure(options.opsets)
        RESULTS.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
