"""Write docs/performance.md and its plot from the JSON files of the GPU measurements.

    python benchmarks/render.py           # write
    python benchmarks/render.py --check   # exit code 1 if the page is out of date

Every figure comes from ``results/layers.json`` (``benchmarks/layers.py``) or from the package's
table of the same GPU (``python -m ss1_compile.kernels.tune``).
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "images" / "speedup_by_rows.svg"
TABLE = ROOT / "kernels" / "tables" / "nvidia_h200.json"
KINDS = ("rotation", "learned")
REDUCTIONS = (2, 4, 8)
PANELS = ((4096, 14336), (4096, 4096), (1024, 4096))
Row = Mapping[str, Any]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def best_dense(row: Row) -> float:
    """The faster of the library's dense layer and the compiled one."""
    return min(t for t in (row["dense_us"], row.get("compiled_dense_us")) if t)


def speedup(row: Row) -> float:
    return best_dense(row) / row["us"]


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def verdict(passed: bool) -> str:
    return "met" if passed else "**missed**"


def target_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The layer, sketch and decode rows of the targets: target, measured, verdict."""
    rows = []
    for kind, target in (("rotation", 0.50), ("learned", 0.58)):
        found = harness.geomean(
            row["of_floor"] for row in pick(result["layers"], method=f"ss1 {kind}")
        )
        name = f"layers, {kind}: fraction of floor, geometric mean"
        rows.append([name, f"≥ {target:.2f}", f"{found:.2f}", verdict(found >= target)])
    goals = {
        (8192, 4096, 14336): {"rotation": (1.85, 3.4, 5.8), "learned": (1.85, 3.4, 5.8)},
        (16384, 4096, 1024): {"rotation": (1.2, 1.4, 1.5), "learned": (1.4, 1.9, 2.2)},
    }
    for (m, k, n), by_kind in goals.items():
        for kind, targets in by_kind.items():
            of_kind = pick(result["layers"], method=f"ss1 {kind}", M=m, K=k, N=n)
            found = [speedup(pick(of_kind, c=c)[0]) for c in REDUCTIONS]
            met = [f >= t for f, t in zip(found, targets, strict=True)]
            rows.append(
                [
                    f"{m} x {k} → {n}, {kind}, c = 2/4/8: over the faster dense",
                    "≥ " + "/".join(f"{t:g}" for t in targets) + "×",
                    "/".join(f"{f:.2f}" for f in found) + "×",
                    "met" if all(met) else "/".join(verdict(ok) for ok in met),
                ]
            )
    for name in ("sketch", "unsketch"):
        found = [row[f"{name}_of_copy"] for row in result["sketches"]]
        passed = sum(f >= 0.85 for f in found)
        rows.append(
            [
                f"{name} alone: fraction of copy bandwidth, every c, J and kind",
                "≥ 0.85",
                f"{passed} of {len(found)} (median {sorted(found)[len(found) // 2]:.2f})",
                verdict(passed == len(found)),
            ]
        )
    decode = result["decode"]
    passed = sum(row["us"] <= row["accept_us"] for row in decode)
    name = "decode, M = 1 … 64: time ≤ floor/0.65 + 4 µs"
    rows.append([name, "all", f"{passed} of {len(decode)}", verdict(passed == len(decode))])
    least = min(speedup(row) for row in decode)
    name = "decode: over the faster dense, least of all rows"
    rows.append([name, "≥ 1×", f"{least:.2f}×", verdict(least >= 1)])
    return rows


def layer_table(rows: Sequence[Row]) -> str:
    """One line per shape and c; a cell is the speed-up over the faster dense (of floor)."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shapes = list(dict.fromkeys((row["M"], row["K"], row["N"]) for row in rows))
    lines = []
    for m, k, n in shapes:
        for c in REDUCTIONS:
            here = pick(rows, M=m, K=k, N=n, c=c)
            cells = []
            for method in methods:
                row = pick(here, method=method)[0]
                cells.append(f"{speedup(row):.2f}× ({row['of_floor']:.2f})")
            lines.append([f"{m} x {k} → {n}", str(c), f"{best_dense(here[0]):.0f}", *cells])
    return markdown(["M x K → N", "c", "dense, µs", *methods], lines)


def sketch_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        width = "" if row["B_K"] is None else str(row["B_K"])
        cells = []
        for name in ("sketch", "unsketch"):
            of_same = row["copy_us"] / row[f"{name}_us"]
            cells += [f"{row[f'{name}_us']:.1f}", f"{row[f'{name}_of_copy']:.2f}", f"{of_same:.2f}"]
        lines.append([f"{row['M']} x {row['K']}, {row['kind']}", str(row["c"]), width, *cells])
    columns = ["M x K, kind", "c", "B_K", "sketch, µs", "of bandwidth", "of same copy"]
    return markdown([*columns, "unsketch, µs", "of bandwidth", "of same copy"], lines)


def decode_table(rows: Sequence[Row]) -> str:
    lines = []
    for k, n, m in dict.fromkeys((row["K"], row["N"], row["M"]) for row in rows):
        here = pick(rows, K=k, N=n, M=m)
        cells = []
        for kind in KINDS:
            for c in REDUCTIONS:
                row = pick(here, kind=kind, c=c)[0]
                late = "" if row["us"] <= row["accept_us"] else " !"
                cells.append(f"{row['us']:.1f} ({speedup(row):.1f}×, {row['of_floor']:.2f}){late}")
        lines.append([f"{k} → {n}, M = {m}", f"{best_dense(here[0]):.1f}", *cells])
    names = [f"{kind} c = {c}" for kind in KINDS for c in REDUCTIONS]
    return markdown(["layer", "dense, µs", *names], lines)


def curve(table: Mapping[str, Any], kind: str, k: int, n: int, c: int) -> dict[int, float]:
    """Speed-up of the best lowering over the dense layer, by M."""
    for key, by_rows in table["rows"].items():
        found, _, features, reduced, _ = key.split()
        if key.endswith("+bias") or found != kind or features != f"{k}->{n}":
            continue
        if round(k / int(reduced[3:])) == c:
            return {
                int(m): us["dense"] / min(t for name, t in us.items() if name != "dense")
                for m, us in by_rows.items()
            }
    raise KeyError((kind, k, n, c))


def crossings(points: Mapping[int, float]) -> str:
    """Where the curve crosses 1, interpolated in log M."""
    found = []
    items = sorted(points.items())
    for (m0, s0), (m1, s1) in itertools.pairwise(items):
        if (s0 > 1) != (s1 > 1):
            part = math.log(s0) / (math.log(s0) - math.log(s1))
            at = math.exp(math.log(m0) + part * (math.log(m1) - math.log(m0)))
            found.append(f"{'faster' if s1 > 1 else 'slower'} from M ≈ {at:.0f}")
    return ", ".join(found) or ("faster at every M" if items[0][1] > 1 else "slower at every M")


def crossing_table(table: Mapping[str, Any]) -> str:
    lines = []
    for k, n in PANELS:
        for kind in KINDS:
            cells = [crossings(curve(table, kind, k, n, c)) for c in REDUCTIONS]
            lines.append([f"{k} → {n}, {kind}", *cells])
    return markdown(["layer", *[f"c = {c}" for c in REDUCTIONS]], lines)


def slower_share(table: Mapping[str, Any]) -> str:
    """How many measured rows no lowering wins, and up to which M."""
    rows = [us for by_rows in table["rows"].values() for us in by_rows.values()]
    slow = sum(min(t for n, t in us.items() if n != "dense") > us["dense"] for us in rows)
    return f"{slow} of {len(rows)}"


def plot(table: Mapping[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "ss1"
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4), sharey=True)
    for axis, (k, n) in zip(axes, PANELS, strict=True):
        for kind, style in zip(KINDS, ("-", "--"), strict=True):
            for c, color in zip(REDUCTIONS, ("#1b6ca8", "#c8553d", "#3a7d44"), strict=True):
                points = sorted(curve(table, kind, k, n, c).items())
                label = f"{kind}, c = {c}"
                axis.plot(*zip(*points, strict=True), style, color=color, label=label, marker=".")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_yticks([0.5, 1, 2, 4], ["0.5×", "1× (dense)", "2×", "4×"])
        axis.set_title(f"{k} → {n}")
        axis.set_xlabel("rows M")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("speed-up over the dense layer")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def page(result: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    env = result["environment"]
    stamps = ", ".join(f"{name} {when}" for name, when in result["measured"].items())
    sections = [
        f"""\
# Performance on a GPU

One {env["gpu"]}, torch {env["torch"]}, Triton {env["triton"]}, driver {env["driver"]},
{env["date"]}; bfloat16, no bias unless said. Written by `benchmarks/render.py`; absolute times
hold on this GPU only. Ceilings measured in the same run: device copy {result["copy_tb_s"]:.2f} TB/s
(read plus write), 8192³ product {result["matmul_tflop_s"]:.0f} TFLOP/s.

- *Rotation* is SS1 with J = c hashes, *learned* one block-diagonal sketch (J = 1, groups of 128).
- *Floor*: `max(2·M·N·K/c ÷ product rate, bytes of x, z and y ÷ copy bandwidth)`. X̃ is not in it.
- *Dense* is the faster of `F.linear` (cuBLAS) and
  `torch.compile(mode="max-autotune-no-cudagraphs")` in the same run, where both were measured.
- Times are medians of single launches with a cold, clean L2; for M ≤ 64, of CUDA-graph replays
  over copies of the weights that exceed the L2.
- Measured at: {stamps}. A dense layer is always timed in the run of its row.

    python -m ss1_compile.kernels.tune      # the table that chooses the kernels
    python benchmarks/layers.py             # the comparison; --upstream PATH adds the authors'
    python benchmarks/render.py             # this page
""",
        "## Targets\n\n"
        + markdown(["what", "target", "measured", ""], target_rows(result))
        + "\n\nWhat was tried, and the next idea for each miss: "
        "[benchmarks/NOTES.md](../benchmarks/NOTES.md).\n",
        "## Speed-up by rows\n\n![speed-up by rows](images/speedup_by_rows.svg)\n\n"
        "Where the best lowering starts or stops beating the dense layer:\n\n"
        + crossing_table(table)
        + f"\n\nOver all layers of the table, with and without bias, no lowering wins in "
        f"{slower_share(table)} rows, most of them 768 or 1024 features wide and M from 64 to 4096:"
        " two launches do not fit into a dense layer of 8 µs. "
        "`ss1_compile.kernels.lowering.beats_dense` tells.\n",
        "## Layers\n\nSpeed-up over the faster dense, in brackets the fraction of the floor. "
        "*Learned* has up to 12 % more parameters than `K·N/c` (its blocks), *low rank* and "
        "*monarch* (4 blocks) are ours, at `K·N/c` parameters.\n\n"
        + layer_table(result["layers"])
        + "\n\nLow rank writes and reads less between its two products, so it is the faster one "
        "where N is small; SS1 keeps full rank.\n\nMore shapes, against `F.linear` alone:\n\n"
        + layer_table(result["more_layers"])
        + "\n",
    ]
    if result.get("upstream"):
        lines = [
            [
                f"{r['M']} x {r['K']} → {r['N']}",
                str(r["c"]),
                f"{r['us']:.0f}",
                f"{r['speedup']:.2f}×",
            ]
            for r in result["upstream"]
        ]
        sections.append(
            "## The authors' kernel\n\nTheir public repository (branch clean), float16, tiles "
            "autotuned, over `F.linear` in float16.\n\n"
            + markdown(["M x K → N", "c", "µs", "over dense"], lines)
            + "\n"
        )
    sections += [
        "## Few rows\n\nMicroseconds (over the faster dense, fraction of the time to read z once); "
        "`!` marks rows over floor/0.65 + 4 µs.\n\n" + decode_table(result["decode"]) + "\n",
        "## Sketches alone\n\n*Of bandwidth* against a large copy, *of same copy* against a copy "
        "of as many bytes: at 67 MB the copy itself has 0.87 of the bandwidth of a large one.\n\n"
        + sketch_table(result["sketches"])
        + "\n",
    ]
    return "\n".join(sections)


def main() -> None:
    result, table = harness.read("layers"), json.loads(TABLE.read_text())
    text = page(result, table)
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != text:
            sys.exit(f"{PAGE.relative_to(ROOT)} is out of date: run benchmarks/render.py")
        return
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    plot(table)
    print(f"wrote {PAGE.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
