"""Write docs/quantization.md: how to quantise, and what the measurements say.

    python benchmarks/render_quantization.py           # write
    python benchmarks/render_quantization.py --check   # exit code 1 if the page is out of date

Figures come from ``results/quantized.json`` (``benchmarks/quantized.py``, a GPU),
``quantized_cpu.json`` (``quantized_cpu.py``) and ``quantized_accuracy.json``
(``quantized_accuracy.py``); a part whose file is missing is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from quantized_cpu import FORMS, REDUCTIONS
from render import markdown, pick, verdict

PAGE = harness.RESULTS.parent.parent / "docs" / "quantization.md"
GPU_FORMS = ("int8 weight-only", "int8 dynamic", "fp8 dynamic")
TARGETS = {"int8 dynamic": 1.25, "fp8 dynamic": 1.5}
MANY_ROWS = 4096
WIDE = 4096
Result = Mapping[str, Any]

USE = """\
# Quantised layers

SS1 and quantisation multiply: c times fewer multiplications and weights, and a weight of 8 bits.

```python
import torch
import ss1_compile

model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256))
report = ss1_compile.compress(model, reduction=2, quantization="int8_dynamic", warn_error=1)
print(report)  # error of the projection + what rounding z adds
```
"""

FORMS_TABLE = (
    (
        '`"int8_weight_only"`',
        "int8, a float32 scale per row, or per `quantization_group_size` slots of it",
        "as they are",
        "everywhere",
    ),
    (
        '`"int8_dynamic"`',
        "int8, a scale per row",
        "int8, a scale per token, rounded *after* the sketch",
        "everywhere",
    ),
    (
        '`"fp8_dynamic"`',
        "float8 (e4m3), a scale per row",
        "float8, likewise",
        "GPUs from compute capability 8.9; on the CPU to check with only",
    ),
)

RULES = """
- The options mean the same in `compress`, `compile`, `torch.compile(model, backend="ss1",
  options={...})` and `compress_exported`. They can differ by layer:
  `overrides={"*.down_proj": {"quantization": None}, "head": {"reduction": 2}}`.
- `rounding="calibrated"` rounds z so that the layer's *output* on the calibration inputs moves
  least (GPTQ, in the sketched space); it needs calibration data. The default is to nearest.
- Learned sketches are balanced first: `S A` and `z A⁻ᵀ` compute the same for any invertible A per
  group, and the A that is taken makes the sketched inputs and z equally hard to round and spreads
  outliers (`ss1_compile.quantization.balancing` has the equations). It costs nothing when the layer
  runs, and is best with calibration data. Layers that share a sketch go on sharing it.
- A quantised z is frozen: it is a buffer. Train or heal first, and quantise then:
  `ss1_compile.quantize(model, quantization="int8_dynamic")` works on a model that is compressed
  already. Gradients still pass through to inputs, biases and learned blocks.
- `half()`, `to(dtype)` and autocast leave z and its scales alone. `save` and `load` keep them
  (format 4; models without quantised layers stay readable by earlier versions).
- Symmetric throughout: int8 is -127 … 127, int8 sums are exact (int32), a row of zeros has scale 1,
  a row of x with a NaN or an infinity gives a row of NaN.
- Not quantised, and refused by name: experts and float64 layers. Fusion passes leave quantised
  layers as they are. TensorRT takes `int8_weight_only`, ONNX both int8 forms
  ([onnx.md](onnx.md)).

`ss1_compile.sensitivity(model, batches, reduction=4, quantization="int8_dynamic")` measures, layer
by layer, what SS1 alone, quantisation alone and both cost.

On the command line `compress`, `plan` (whose errors are then those of the quantised layers) and
`heal` (which quantises what it healed) take the same options:

```bash
ss1 compress MODEL_DIR OUT_DIR -c 2 --quantization int8_dynamic --calibration texts.txt \\
  --rounding calibrated
ss1 compress MODEL_DIR OUT_DIR -c 2 --projection average --quantization int8_weight_only \\
  --quantization-group-size 32
ss1 plan MODEL_DIR --calibration texts.txt --target 50% --quantization int8_dynamic
ss1 heal MODEL_DIR SMALL_DIR OUT_DIR --data texts.txt --quantization int8_dynamic
```

`heal` refuses a model that is quantised already, whose z is frozen; `plan` leaves compressed layers
as they are and names them. `bench`, `compare` and `export` take quantised models as any other.
"""


def optional(name: str) -> Result | None:
    """A results file, if it is there."""
    try:
        return harness.read(name)
    except FileNotFoundError:
        return None


def gpu_part(result: Result) -> list[str]:
    """The targets and the layers on the GPU."""
    environment = result["environment"]
    rows = [row for row in result["layers"] if row["M"] >= MANY_ROWS]
    lines = []
    for kind in ("rotation", "learned"):
        for form, target in TARGETS.items():
            of_kind = pick(rows, kind=kind)
            found = harness.geomean(row["bf16"] / row[form] for row in of_kind)
            wide = harness.geomean(
                row["bf16"] / row[form] for row in of_kind if min(row["K"], row["N"]) >= WIDE
            )
            name = f"{form}, {kind}, M ≥ {MANY_ROWS}: over bf16 SS1, geometric mean"
            cells = [f"≥ {target}×", f"{found:.2f}×", verdict(found >= target), f"{wide:.2f}×"]
            lines.append([name, *cells])
    table = []
    for row in rows:
        shape = f"{row['M']} x {row['K']} → {row['N']}"
        cells = [f"{row['bf16']:.0f}", *(f"{row['bf16'] / row[f]:.2f}×" for f in GPU_FORMS)]
        over = f"{row['dense bf16'] / min(row[form] for form in GPU_FORMS):.2f}×"
        table.append([shape, row["kind"], str(row["c"]), *cells, over])
    rivals = []
    for row in (row for row in rows if "torchao dynamic" in row):
        shape = f"{row['M']} x {row['K']} → {row['N']}"
        forms = ("dense bf16", "torchao dynamic", "_int_mm alone", "int8 dynamic")
        rivals.append([shape, row["kind"], str(row["c"]), *(f"{row[form]:.0f}" for form in forms)])
    few = []
    for row in result["decode"]:
        shape = f"{row['K']} → {row['N']}, M = {row['M']}"
        cells = [f"{row[form]:.1f}" for form in ("bf16", *GPU_FORMS[:2], "accept")]
        few.append([shape, row["kind"], str(row["c"]), f"{row['dense bf16']:.1f}", *cells])
    return [
        f"## On a GPU\n\nOne {environment['gpu']}, torch {environment['torch']}, Triton "
        f"{environment['triton']}, {environment['date']}; bfloat16 x, one run "
        f"(`python benchmarks/quantized.py`).\n",
        markdown(["target", "", "measured", "", f"of these, K and N ≥ {WIDE}"], lines) + "\n",
        *([result["note"] + "\n"] if "note" in result else []),
        "Many rows: µs of the bfloat16 SS1 layer, how many times faster each form is, and the "
        "fastest over the dense bfloat16 layer. Why: "
        "[benchmarks/NOTES.md](../benchmarks/NOTES.md).\n",
        markdown(["layer", "sketch", "c", "bf16, µs", *GPU_FORMS, "over dense"], table) + "\n",
        "Against torchao's dense layer of dynamic int8 activations, compiled, and the library's "
        "int8 product alone, which quantises nothing (µs):\n",
        markdown(
            ["layer", "sketch", "c", "dense", "torchao int8", "`_int_mm`", "SS1 int8 dynamic"],
            rivals,
        )
        + "\n",
        "Few rows (µs; *accept* is the time to read z at 0.65 of bandwidth, plus 4 µs):\n",
        markdown(
            ["layer", "sketch", "c", "dense", "bf16", *GPU_FORMS[:2], "accept"],
            few,
        )
        + "\n",
    ]


def cpu_part(result: Result) -> list[str]:
    """The layers on the CPU."""
    environment = result["environment"]
    vnni = "with" if environment["vnni"] else "without"
    lines = []
    for row in result["rows"]:
        us = row["us"]
        cells = [f"{us['dense'] / us['dense_int8']:.2f}×"]
        for form in FORMS:
            values = (f"{us['dense'] / us[f'{form} c={c}']:.2f}" for c in REDUCTIONS)
            cells.append(" / ".join(values) + "×")
        shape = f"{row['in']} → {row['out']}"
        lines.append([shape, str(row["tokens"]), f"{us['dense']:.0f}", *cells])
    return [
        f"## On a CPU\n\n{environment['cpu']} ({environment['capability']}, {vnni} VNNI), "
        f"{environment['threads']} threads, torch {environment['torch']}, float32 x, medians of "
        f"one run (`python benchmarks/quantized_cpu.py`): times over the dense float32 layer. "
        f"*Dense int8* is PyTorch's `quantize_dynamic`, which has one scale for all tokens.\n",
        markdown(
            [
                "layer",
                "T",
                "dense, µs",
                "dense int8",
                "SS1, c = 2/4/8",
                "int8 dynamic",
                "int8 weights",
            ],
            lines,
        )
        + "\n",
        "Without VNNI a processor multiplies int8 no faster than float32 if the sums are to be "
        "exact, so int8 gains where the layer is bound by reading weights, at few tokens, and "
        "saves memory at any number. The kernels use VNNI where there is one; that is not "
        "measured.\n",
    ]


def accuracy_part(result: Result) -> list[str]:
    """Models, and the sensitivity of layers."""
    parts = [
        "## Accuracy\n",
        "Pretrained, compressed without fine-tuning, then quantised (`python "
        "benchmarks/quantized_accuracy.py`). *Change*: relative difference of the output (hidden "
        "states, logits) from the unquantised SS1 model's; *added*: by how much the distance from "
        "the *dense* model grows. The aims: at most 2 % of the error, 0.5 % of the perplexity.\n",
    ]
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    runs = {name: result[f"{key}_run"] for key, name in _MODELS.items() if f"{key}_run" in result}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = pick(rows, model=model)
        scores = [key for key in own[0] if key not in _COLUMNS]
        lines = []
        for row in own:
            form = (row["form"] or "not quantised").replace("_", " ")
            named = [row["projection"], f"{row['c']:g}", form, row["rounding"] or ""]
            change = "" if row["form"] is None else f"{row['change']:.4f}"
            cosine = "" if row["form"] is None else f"{row['cosine_to_ss1']:.5f}"
            added = "" if row["form"] is None else f"{row['added']:+.2%}"
            lines.append(
                [*named, change, cosine, f"{row['error']:.3f}", added]
                + [f"{row[score]:.3f}" for score in scores]
            )
        head = ["projection", "c", "z", "rounding", "change", "cosine to SS1", "error", "added"]
        parts += [
            f"### {model}\n",
            f"Calibrated on {runs[model]['calibration_tokens']} tokens; measured on "
            f"{' and '.join(dict.fromkeys(row.get('on', 'CPU') for row in own))}.\n",
            markdown([*head, *(score.replace("_", " ") for score in scores)], lines) + "\n",
            *_verdicts(own),
        ]
    if result.get("layers"):
        lines = [
            [
                layer["name"],
                "×".join(map(str, layer["shape"])),
                *(f"{layer[kind]:.4f}" for kind in ("sketch", "quantized", "both")),
                f"{layer['both'] - layer['sketch']:+.4f}",
            ]
            for layer in result["layers"]
        ]
        parts += [
            "### Layer by layer\n",
            "First and last block of all-MiniLM-L6-v2, calibrated projection, c = 4, "
            "`int8_dynamic`, relative output error on the dense model's inputs "
            "(`ss1_compile.sensitivity`): the two errors add like the sides of a right angle, so "
            "that next to SS1's own that of quantisation all but vanishes (the paper's figure "
            "2).\n",
            markdown(["layer", "weight", "SS1 alone", "int8 alone", "both", "added"], lines) + "\n",
        ]
    return parts


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What int8 adds to one model, against the aims, for every kind of sketch."""
    lines = []
    for projection in dict.fromkeys(row["projection"] for row in rows):
        own = pick(rows, projection=projection)
        int8 = [row for row in own if row["form"] in ("int8_weight_only", "int8_dynamic")]
        most = max(row["added"] for row in int8)
        line = f"- {projection}: int8 adds at most {most:.2%} to the error: {verdict(most <= 0.02)}"
        if "perplexity" in own[0]:
            plain = {row["c"]: row["perplexity"] for row in own if row["form"] is None}
            moved = max(row["perplexity"] / plain[row["c"]] - 1 for row in int8)
            line += f"; to the perplexity {moved:.2%}: {verdict(moved <= 0.005)}"
        lines.append(line + ".\n")
    return ["".join(lines)]


_MODELS = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M, blocks 2-27"}
_COLUMNS = {
    "on",
    "model",
    "projection",
    "c",
    "form",
    "rounding",
    "layer_change",
    "change",
    "cosine_to_ss1",
    "error",
    "added",
}


def page() -> str:
    """The whole text."""
    forms = markdown(["`quantization=`", "z", "activations", "where"], FORMS_TABLE)
    parts = [USE, forms, RULES]
    for name, part in (
        ("quantized_accuracy", accuracy_part),
        ("quantized", gpu_part),
        ("quantized_cpu", cpu_part),
    ):
        result = optional(name)
        if result is not None:
            parts += part(result)
    return "\n".join(parts)


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/{Path(PAGE).name} is out of date: run render_quantization.py")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
