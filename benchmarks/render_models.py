"""Write docs/models.md and its plots from the JSON files of ``blocks.py`` and ``models.py``.

python benchmarks/render_models.py           # write
python benchmarks/render_models.py --check   # exit code 1 if the page is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from render import ROOT, markdown, pick, verdict

PAGE = ROOT / "docs" / "models.md"
PROFILE = ROOT / "docs" / "images" / "block_profile.svg"
BATCHES = ROOT / "docs" / "images" / "bert_batches.svg"
Row = Mapping[str, Any]
Result = Mapping[str, Any]

WAYS = {"ms": "speedup", "graph_ms": "graph_speedup"}
"""Of launched calls, and of one CUDA graph: time and gain."""
CLASSES = (
    ("matrix product", r"gemm|nvjet|cutlass|_stream|_gemv|splitK|triton_(tem|mm)", "#1b6ca8"),
    ("sketch, with what is fused into it", r"_permute_kernel|_gather|_block_kernel", "#8fbf6b"),
    ("norm of ours", r"^_statistics|^_rows|^_norm", "#3a7d44"),
    ("attention", r"sdpa|flash|fmha", "#d9a441"),
    ("norm and elementwise of PyTorch", r".", "#c8553d"),
)


def kernel_class(name: str) -> str:
    """What a kernel does, from its name. Inductor's own kernels are elementwise here."""
    if re.match(r"triton_(poi|red|per)_", name):
        return CLASSES[-1][0]
    return next(label for label, pattern, _ in CLASSES if re.search(pattern, name, re.IGNORECASE))


def mark(row: Row) -> str:
    """Names the run of a row that is not of the last one."""
    note = f", {row['note']}" if "note" in row else ""
    return f" ({row['run']}{note})" if "run" in row else ""


def runs(result: Result) -> str:
    """What sets the rows of earlier runs apart."""
    return "".join(f"\n\n({name}) {text}." for name, text in result.get("runs", {}).items())


def target_rows(blocks: Result, models: Result) -> list[list[str]]:
    """The block and model rows of the targets: target, measured per kind, verdict."""
    paper, every = "14 layers of the paper, c = 8", "all encoder linears, c = 4"
    wanted: list[tuple[str, Sequence[Row], dict[str, Any], float, float]] = [
        ("feed-forward block 16384 x (1024 → 4096 → 1024), c = 4", blocks["blocks"],
         {"model": "feed-forward 1024/4096", "variant": "c = 4"}, 2.3, 2.6),
        ("feed-forward block 8192 x (4096 → 14336 → 4096), c = 4", blocks["blocks"],
         {"model": "feed-forward 4096/14336", "variant": "c = 4"}, 3.1, 3.1),
        (f"BERT-large, {paper}, batch 128 x 128", models["rows"],
         {"model": "bert-large", "batch": 128, "variant": paper}, 1.45, 1.45),
        *((f"BERT-large, {paper}, batch {batch} x 128", models["rows"],
           {"model": "bert-large", "batch": batch, "variant": paper}, 1.0, 1.0)
           for batch in (8, 16, 32, 64)),
        (f"BERT-large, {every}, batch 128 x 128", models["rows"],
         {"model": "bert-large", "batch": 128, "variant": every}, 1.9, 1.9),
        ("GPT2-L, FFN only, c = 8", models["rows"],
         {"model": "gpt2-l", "variant": "FFN, c = 8"}, 1.4, 1.4),
        ("Llama-3-8B shapes, prefill 8192, layers 18-27, c = 8", models["rows"],
         {"model": "llama-3-8b", "variant": "layers 18-27, c = 8"}, 1.25, 1.25),
        ("Llama-3-8B shapes, prefill 8192, all layers, c = 4", models["rows"],
         {"model": "llama-3-8b", "variant": "all layers, c = 4"}, 2.3, 2.3),
    ]  # fmt: skip
    lines = []
    for name, rows, where, rotation, learned in wanted:
        for kind, target in (("rotation", rotation), ("learned", learned)):
            found = pick(rows, kind=kind, **where)
            if found:
                cells = [f"≥ {target:g}×"]
                for gain in (found[0].get(way) for way in WAYS.values()):
                    cells += [f"{gain:.2f}×", verdict(gain >= target)] if gain else ["", ""]
                lines.append([f"{name}, {kind}{mark(found[0])}", *cells])
    return lines


def table(rows: Sequence[Row]) -> str:
    """Every measured row: time and speed-up, launched and replayed, memory, first call."""
    lines = []
    for row in rows:
        cells = [f"{row['model']}, {row['size']}", row["variant"] + mark(row), row["kind"] or ""]
        for time, gain in WAYS.items():
            cells.append(f"{row[time]:.2f}" if time in row else "")
            cells.append(f"{row[gain]:.2f}×" if gain in row else "")
        cells += [str(row.get("tokens_per_s", "")), str(row["peak_mb"])]
        lines.append([*cells, f"{row['weights_mb']:.0f}", f"{row['first_call_s']:.0f}"])
    columns = ["model", "compressed", "sketch"]
    for way in ("launched, ms", "CUDA graph, ms"):
        columns += [way, "over dense"]
    return markdown([*columns, "tokens/s", "peak, MB", "weights, MB", "first call, s"], lines)


def fusion_table(blocks: Result) -> str:
    """What the fusion passes bring: each block with and without them."""
    lines = []
    for row in blocks["unfused"]:
        same = {key: row[key] for key in ("model", "variant", "kind")}
        fused = pick(blocks["blocks"], **same)[0]
        cells = [f"{row[time]:.3f}" for time in WAYS]
        cells += [f"{fused[time]:.3f}" for time in WAYS]
        gain = row["graph_ms"] / fused["graph_ms"]
        cells += [f"{gain:.2f}×", f"{fused['of_floor']:.2f}"]
        lines.append([row["model"], row["variant"], row["kind"], *cells])
    columns = ["block", "c", "sketch", "unfused, ms", "graph", "fused, ms", "graph"]
    columns += ["gain, graph", "of GEMM floor"]
    return markdown(columns, lines)


def profiles(blocks: Result, models: Result) -> dict[str, list[tuple[str, Sequence[Row]]]]:
    """Bars by title: their labels and kernels."""
    bars: dict[str, list[tuple[str, Sequence[Row]]]] = {}
    for fused, rows in ((True, blocks["blocks"]), (False, blocks["unfused"])):
        for row in rows:
            if row.get("kernels"):
                label = f"{row['kind']}, {'fused' if fused else 'unfused'}"
                label = label if row["kind"] else "dense"
                bars.setdefault(f"{row['model']}, c = 4", []).append((label, row["kernels"]))
    for row in models["rows"]:
        if row.get("kernels"):
            label = f"{row['variant']}, {row['kind']}" if row["kind"] else "dense"
            title = f"{row['model']}, {row['size']}"
            bars.setdefault(title, []).append((label, row["kernels"]))
    return bars


def plot_profiles(bars: Mapping[str, Sequence[tuple[str, Sequence[Row]]]]) -> None:
    """A stacked bar per block or model and variant: microseconds by class of kernel."""
    from matplotlib import pyplot as plt

    heights = [len(stacks) for stacks in bars.values()]
    figure, axes = plt.subplots(
        len(bars), 1, figsize=(9, 0.38 * sum(heights) + 0.5 * len(bars)),
        squeeze=False, height_ratios=heights,
    )  # fmt: skip
    for axis, (title, stacks) in zip(axes[:, 0], bars.items(), strict=True):
        for at, (_, kernels) in enumerate(stacks):
            left = 0.0
            for label, _, color in CLASSES:
                width = sum(k["us"] for k in kernels if kernel_class(k["kernel"]) == label)
                axis.barh(at, width, left=left, color=color, label=label if at == 0 else None)
                left += width
            axis.text(left, at, f" {left:.0f}", va="center", fontsize=8)
        axis.set_yticks(range(len(stacks)), [label for label, _ in stacks], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("microseconds of kernel time per call")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="upper right", ncols=len(CLASSES))
    PROFILE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PROFILE, metadata={"Date": None})


def _batches(models: Result) -> set[int]:
    return {row["batch"] for row in pick(models["rows"], model="bert-large")}


def plot_batches(models: Result) -> None:
    """BERT-large: speed-up over dense by batch."""
    from matplotlib import pyplot as plt

    rows = pick(models["rows"], model="bert-large")
    figure, axis = plt.subplots(figsize=(7, 4))
    series = list(dict.fromkeys((r["variant"], r["kind"]) for r in rows if r["kind"]))
    batches: set[int] = set()
    for variant, kind in series:
        found = pick(rows, variant=variant, kind=kind)
        of_batch = {r["batch"]: r["graph_speedup"] for r in found if "graph_speedup" in r}
        points = sorted(of_batch.items())
        batches |= of_batch.keys()
        style = "-" if kind == "rotation" else "--"
        color = "#1b6ca8" if "paper" in variant else "#c8553d"
        x, y = zip(*points, strict=True)
        axis.plot(x, y, style, marker=".", color=color, label=f"{variant}, {kind}")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(
        sorted(batches), [str(b) for b in sorted(batches)]
    )  # nothing is measured between them
    axis.set_xlabel("texts of 128 tokens in a batch")
    axis.set_ylabel("speed-up over dense, CUDA graphs")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(BATCHES, metadata={"Date": None})


def compile_table(result: Result) -> str:
    """What the passes add to compiling, by the number of layers."""
    lines = [
        [
            str(row["layers"]),
            row["variant"],
            f"{row['first_call_s']:.1f}",
            f"{row['projection_ms'] / 1e3:.2f}" if row["projection_ms"] else "",
            f"{row['passes_ms'] / 1e3:.2f}" if row["passes_ms"] else "",
            f"{row['of_dense']:.1%}" if row["passes_ms"] else "",
        ]
        for row in result["rows"]
    ]
    columns = ["layers", "model", "first call, s", "projection, s", "passes, s", "of dense"]
    return markdown(columns, lines)


def page(blocks: Result, models: Result, compiling: Result) -> str:
    """The whole text."""
    env = models["environment"]
    where = compiling["environment"]
    host = where.get("gpu") or f"a CPU, {where['threads']} threads"
    return "\n".join(
        [
            f"""\
# Blocks and models on a GPU

One {env["gpu"]}, torch {env["torch"]}, Triton {env["triton"]}, {env["date"]}; bfloat16, random
weights, no gradients. Written by `benchmarks/render_models.py`. Dense is compiled with
`max-autotune-no-cudagraphs` and by default, of which the faster counts, SS1 with `backend="ss1"`,
in the same run; transformer blocks are compiled one by one, so that equal blocks share a graph, in
both. *Launched* are calls as they are; *CUDA graph* are replays of one `torch.cuda.graph` of such a
call, which leave out what the host takes to launch kernels: most of the time of small batches, on
the slow host of this machine.

On CUDA the operators are launched from C++, from the third call of the same sizes on. It is
compiled in the background at the first call, with the compiler that `torch.compile` uses on the
CPU, and then cached. Until then, without a compiler (the log says so) and with
`SS1_COMPILE_NATIVE=0` in the environment they are launched from Python, three to six times as
slowly.

    python benchmarks/blocks.py
    python benchmarks/models.py
    python benchmarks/render_models.py      # this page
""",
            "## Targets\n\n"
            + markdown(
                ["what", "target", "launched", "", "CUDA graph", ""],
                target_rows(blocks, models),
            )
            + "\n\nA letter names an earlier run, described below the tables of all rows; where a "
            "cell is empty, that run did not measure it. Why the misses are misses: the profile "
            "below and [benchmarks/NOTES.md](../benchmarks/NOTES.md).\n",
            "## Where the time goes\n\n![time by kernel](images/block_profile.svg)\n",
            "## What fusion brings\n\n" + fusion_table(blocks) + "\n",
            *(
                ["## BERT-large by batch\n\n![speed-up by batch](images/bert_batches.svg)\n"]
                if len(_batches(models)) > 1
                else []
            ),
            "## Compile time\n\n"
            "BERT encoders of width 256 as one graph, every row in a fresh process without caches "
            f"(`benchmarks/compile_time.py`, {host}, torch {where['torch']}). *Passes* are this "
            "project's, with fusion; *backend* projects the weights of a dense model at its first "
            "call; *compressed* was compressed before.\n\n" + compile_table(compiling) + "\n",
            "## Models\n\n" + table(models["rows"]) + runs(models) + "\n",
            "## Blocks\n\n" + table(blocks["blocks"]) + runs(blocks) + "\n",
        ]
    )


def main() -> None:
    blocks, models = harness.read("blocks"), harness.read("models")
    text = page(blocks, models, harness.read("compile_time"))
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != text:
            sys.exit(f"{Path(PAGE).relative_to(ROOT)} is out of date: run render_models.py")
        return
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "ss1"
    plot_profiles(profiles(blocks, models))
    if len(_batches(models)) > 1:
        plot_batches(models)
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
