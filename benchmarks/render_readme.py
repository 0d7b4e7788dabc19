"""Write the measured figures into README.md and docs/minilm.md.

    python benchmarks/render_readme.py           # write
    python benchmarks/render_readme.py --check   # exit code 1 if a page is out of date

Those of the CPU are what ``ss1 demo`` writes (``make figures`` runs the demo and then this). In
README.md only: what the best settings give, from ``quality.py`` and ``healing.py``, and the GPU's,
from ``layers.py`` and ``models.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ss1_compile.demo import show

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKERS = {
    name: (
        f"<!-- {name}:begin (written by benchmarks/render_readme.py; do not edit) -->",
        f"<!-- {name}:end -->",
    )
    for name in ("figures", "best", "gpu")
}
PAGES = {"README.md": ("figures", "best", "gpu"), "docs/minilm.md": ("figures",)}
GPU_LAYERS = ((8192, 4096, 14336), (8192, 14336, 4096), (16384, 1024, 4096), (16384, 4096, 1024))
GPU_DECODE = ((1, 4096, 14336), (16, 4096, 14336))
REDUCTIONS = (2, 4, 8)
GPU_MODELS = (
    ("bert-large", "128 x 128", "all encoder linears, c = 4"),
    ("llama-3-8b", "prefill 8192", "all layers, c = 4"),
    ("llama-3-8b decode", "batch 1, 2048 cached", "all layers, c = 4"),
    ("gpt2-l", "16 x 1024", "FFN, c = 4"),
    ("vit-l", "128 x 224²", "all encoder linears, c = 4"),
    ("mixer-l", "256 x 224²", "channel MLPs, c = 4"),
)
MODEL_WAYS = {"speedup": "launched", "graph_speedup": "in a CUDA graph"}
Result = Mapping[str, Any]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures(result: Result) -> str:
    """The pretrained model on the CPU."""
    machine, versions, documents = (result[k] for k in ("machine", "versions", "documents"))
    difference = max(result["checks"]["compiled_vs_eager"].values())
    quality = table(show.QUALITY_COLUMNS, show.quality_rows(result))
    sentences = table(show.SENTENCE_COLUMNS, show.sentence_rows(result))
    speed = table(show.SPEED_COLUMNS, show.speed_rows(result))
    return f"""\
all-MiniLM-L6-v2, all 36 linear layers of the encoder, {documents["calibration"]} news articles for
calibration, quality on {documents["held_out"]} others, no fine-tuning:

{quality}

The same on short sentences, {documents["sentences"]} from the docstrings of Python's standard
library, two thirds of them for calibration:

{sentences}

Speed in the same run, float32, against dense `torch.compile` (the linears alone: eager):

{speed}

{machine["cpu"]}, {machine["threads"]} threads, load {machine["load_before"]:.1f} before the run;
torch {versions["torch"]}, transformers {versions["transformers"]}, Python {machine["python"]}.
Compiled and eager embeddings differ by {difference:.0e} (relative), the saved and reloaded model
not at all. The whole run took {result["seconds"]:.0f} s."""


def best_figures(quality: Result, healing: Result) -> str:
    """What the best settings give, against the strongest baseline at the same size."""
    minilm, language = "all-MiniLM-L6-v2", "SmolLM2-135M, blocks 2-27"
    svd = "activation-aware SVD, outputs weighed"
    cases = ((minilm, 2, "cosine"), (minilm, 4, "cosine"), (language, 2, "perplexity"))

    labels = {
        "learned sketch": "learned sketch, one c for all layers",
        "learned sketch, planned": "learned sketch, `plan`",
        svd: "low rank (activation-aware SVD)",
        f"{svd}, planned": "low rank, planned likewise",
    }
    cells: dict[str, list[str]] = {method: [] for method in labels}
    for model, c, metric in cases:
        of_case = [row for row in quality["rows"] if (row["model"], row["c"]) == (model, c)]
        sizes = [(row["method"], round(row["calibration_tokens"] / 1024)) for row in of_case]
        common = set.intersection(*({n for m, n in sizes if m == method} for method in labels))
        for method, found in cells.items():  # all methods with equally much text
            alike = [r for r, of in zip(of_case, sizes, strict=True) if of == (method, max(common))]
            fresh = [row for row in alike if "note" not in row]  # of the library as it is
            found.append(f"{fmean(row[metric] for row in fresh or alike):.3g}")
    rows = [(label, *cells[method]) for method, label in labels.items()]
    healed = [row for row in healing["rows"] if row["model"] == minilm and row["plan"]]
    last = max(healed, key=lambda row: float(row["points"][-1]["cosine"]))
    cosine, seconds, c = last["points"][-1]["cosine"], last["seconds"], last["reduction"]
    dense = next(row["perplexity"] for row in quality["dense"] if row["model"] == language)
    columns = ["", *(f"{model}, c = {c}: {metric}" for model, c, metric in cases)]
    return f"""\
{table(columns, rows)}

No fine-tuning, all at the same number of parameters in the blocks' linear layers, means over the
seeds measured, unseen text; the language model's dense perplexity is {dense:.3g}. Planned at
c = {c:g} and healed on unlabelled text for {seconds:.0f} s on one {last["on"]}, MiniLM has a
cosine of {cosine:.3f}. Everything measured: [docs/quality.md](docs/quality.md) and
[docs/healing.md](docs/healing.md)."""


def gpu_figures(layers: Result, models: Result) -> str:
    """Layers and models on the GPU, over dense in the same run."""
    columns = ("layer, rows x K → N", "sketch", *(f"c = {c}" for c in REDUCTIONS))
    rows = []
    for kind in ("rotation", "learned"):
        for sizes in GPU_LAYERS:
            rows.append(_layer_row(sizes, kind, layers["layers"], "method", f"ss1 {kind}"))
        for sizes in GPU_DECODE:
            rows.append(_layer_row(sizes, kind, layers["decode"], "kind", kind))
    whole = [
        (
            f"{row['model']}, {row['size']}, {row['variant']}, {row['kind']}"
            + (" \\*" if "run" in row else ""),
            *(f"{row[way]:.2f}×" if way in row else "" for way in MODEL_WAYS),
        )
        for row in models["rows"]
        if row["kind"] is not None and (row["model"], row["size"], row["variant"]) in GPU_MODELS
    ]
    gpu, torch, triton = (layers["environment"][key] for key in ("gpu", "torch", "triton"))
    return f"""\
{table(columns, rows)}

{table(("model", *MODEL_WAYS.values()), whole)}

{gpu}, torch {torch}, Triton {triton}, bfloat16; speed-up over the faster of cuBLAS
and `torch.compile(mode="max-autotune-no-cudagraphs")`, models over the faster of that mode and the
default. \\*: beside other work on the host, which launched calls suffer from, or of an earlier run.
Run on that GPU only; compiled for sm_80, 86 and 89, too. Everything measured, misses included:
[docs/performance.md](docs/performance.md) and [docs/models.md](docs/models.md)."""


def _layer_row(
    sizes: tuple[int, int, int], kind: str, rows: Sequence[Result], key: str, value: str
) -> list[str]:
    m, k, n = sizes
    cells = [f"{m} x {k} → {n}", kind]
    for c in REDUCTIONS:
        (row,) = (
            r for r in rows if (r["M"], r["K"], r["N"], r["c"], r[key]) == (m, k, n, c, value)
        )
        dense = min(t for t in (row["dense_us"], row["compiled_dense_us"]) if t)
        cells.append(f"{dense / row['us']:.2f}×")
    return cells


def read(name: str) -> Result:
    """A results file."""
    found: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def texts() -> dict[str, str]:
    """What belongs between each pair of markers."""
    gpu = gpu_figures(read("layers"), read("models"))
    best = best_figures(read("quality"), read("healing"))
    return {"figures": figures(read("minilm_cpu")), "best": best, "gpu": gpu}


def render(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the markers of ``name``.

    Raises:
        ValueError: the page does not have each marker once, in order.
    """
    start, stop = MARKERS[name]
    before, begin, rest = page.partition(start)
    _, end, after = rest.partition(stop)
    if not begin or not end or start in rest or stop in after:
        raise ValueError(f"the page needs {start!r} and {stop!r} once each, in that order")
    return f"{before}{start}\n{text}\n{stop}{after}"


def main(arguments: Sequence[str]) -> int:
    written = texts()
    stale = []
    for file, names in PAGES.items():
        path = ROOT / file
        page = new = path.read_text(encoding="utf-8")
        for name in names:
            new = render(new, name, written[name])
        if new != page:
            stale.append(file)
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8")
    if "--check" in arguments and stale:
        print(f"out of date, run make figures: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
