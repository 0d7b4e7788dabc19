"""One self-contained HTML page of a study: plots as inline SVG, tables, and the data as JSON."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ss1_compile.errors import MissingPackageError
from ss1_compile.study.study import METHODS, Point, Study

_COLOURS = {
    "dense": "#444444",
    "average": "#c44e52",
    "calibrated": "#dd8452",
    "learned": "#4c72b0",
    "plan": "#2a9d5c",
}
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: #555; margin-top: 0; } figure { margin: 1rem 0; }
figcaption { color: #555; font-size: .9rem; } svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4;
  white-space: nowrap; }
th { background: #f5f5f5; position: sticky; top: 0; } td:first-child, th:first-child,
td.note, th.note { text-align: left; } td.note { white-space: normal; color: #555; }
tr.front td { background: #eef7f1; } .key { font-size: .85rem; color: #555; }
"""


def write_page(study: Study, path: str | Path) -> list[Path]:
    """Write the page, and each plot as PNG beside it (``<name>-<plot>.png``).

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    path = Path(path)
    figures = _figures(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path]
    svgs: dict[str, str] = {}
    for name, figure in figures.items():
        png = path.with_name(f"{path.stem}-{name}.png")
        figure.savefig(png, dpi=144)
        svgs[name] = _svg(figure, name)
        written.append(png)
    path.write_text(page(study, svgs), encoding="utf-8")
    return written


def page(study: Study, svgs: Mapping[str, str]) -> str:
    """The HTML document."""
    dense = study.points[0]
    shown = detailed(study)
    best = "more" if study.more_is_better else "less"
    title = html.escape(study.title)
    data = json.dumps(study.to_dict()).replace("<", "\\u003c")  # no tag, whatever it holds
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="lead">{html.escape(study.metric)} on held-out batches ({best} is better); '
        f"latency of those batches, eager, on {html.escape(study.device)}.</p>",
        _figure("pareto", svgs, "Size and latency against quality; the line joins the models that "
                "no other beats in both."),
        "<h2>Before and after</h2>",
        _table_of_points(study, dense),
        '<p class="key">Shaded: on the front of size and quality.</p>',
    ]  # fmt: skip
    if shown is not None:
        label = html.escape(shown.label)
        sections += [
            f"<h2>Error of each layer: {label}</h2>",
            _figure("errors", svgs, "Relative error of each layer's output on the calibration "
                    "inputs, at the same cost for all methods."),
            f"<h2>Where the budget went: {label}</h2>",
            _figure("budget", svgs, "Bytes of each layer before (grey) and after."),
            "<h2>Layers</h2>",
            _table_of_layers(shown),
        ]  # fmt: skip
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: SS1 report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="study">{data}</script>\n</body>\n</html>\n'
    )


def detailed(study: Study) -> Point | None:
    """The point whose layers are shown: the best method's at the smallest reduction."""
    found = [point for point in study.points if point.layers]
    return min(found, key=lambda p: (p.reduction, -METHODS.index(p.method)), default=None)


def _figure(name: str, svgs: Mapping[str, str], caption: str) -> str:
    return f"<figure>{svgs[name]}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _table_of_points(study: Study, dense: Point) -> str:
    front = {id(point) for point in study.front("model_bytes")}
    rows = [
        (
            p.label,
            f"{p.linear_bytes / 2**20:.2f}",
            f"{p.model_bytes / 2**20:.2f}",
            f"{p.model_bytes / dense.model_bytes:.0%}",
            f"{p.latency_ms:.1f}",
            f"{dense.latency_ms / p.latency_ms:.2f}×",
            f"{p.quality:.4f}",
        )
        for p in study.points
    ]
    heads = ("model", "linears MiB", "model MiB", "of dense", "ms", "speed-up", study.metric)
    marks = ["front" if id(point) in front else "" for point in study.points]
    return _table(heads, rows, marks)


def _table_of_layers(point: Point) -> str:
    rows = []
    for row in point.layers:
        error, c = row["error"], row["reduction"]
        left = row["reason"] is not None
        rows.append(
            (
                row["name"],
                "×".join(map(str, row["shape"])) if row["shape"] else "",
                "dense" if left else f"{c:.3g}",
                f"{row['bytes_before'] / 1024:.0f}",
                f"{row['bytes_after'] / 1024:.0f}",
                "" if error is None else f"{error:.3f}",
                row["reason"] or row["projection"] or "",
            )
        )
    heads = ("layer", "weight", "c", "KiB before", "KiB after", "error", "note")
    return _table(heads, rows, [""] * len(rows))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str]) -> str:
    head = "".join(
        f'<th class="{"note" if cell == "note" else ""}">{html.escape(cell)}</th>' for cell in heads
    )
    body = []
    for row, mark in zip(rows, marks, strict=True):
        cells = [
            f'<td class="note">{html.escape(cell)}</td>'
            if name == "note"
            else f"<td>{html.escape(cell)}</td>"
            for name, cell in zip(heads, row, strict=True)
        ]
        body.append(
            f'<tr class="{mark}">{"".join(cells)}</tr>' if mark else f"<tr>{''.join(cells)}</tr>"
        )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _figures(study: Study) -> dict[str, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "the report page needs matplotlib: pip install 'ss1-compile[report]'"
        ) from error
    figures: dict[str, Any] = {"pareto": Figure(figsize=(10, 4.2), layout="constrained")}
    axes = figures["pareto"].subplots(1, 2, sharey=True)
    costs = (("model_bytes", 2**20, "model, MiB"), ("latency_ms", 1.0, "latency, ms"))
    for ax, (cost, unit, label) in zip(axes, costs, strict=True):
        front = study.front(cost)
        ax.plot(
            [getattr(p, cost) / unit for p in front],
            [p.quality for p in front],
            color="#bbbbbb", zorder=1,
        )  # fmt: skip
        for method in ("dense", *METHODS):
            points = [p for p in study.points if p.method == method]
            if points:
                x, y = [getattr(p, cost) / unit for p in points], [p.quality for p in points]
                ax.scatter(x, y, color=_COLOURS[method], label=method, zorder=2)
                for point, at_x, at_y in zip(points, x, y, strict=True):
                    if method != "dense":
                        ax.annotate(
                            f"{point.reduction:.3g}", (at_x, at_y), (5, 3), fontsize=8,
                            textcoords="offset points", color=_COLOURS[method],
                        )  # fmt: skip
        ax.set_xlabel(label)
        ax.set_xlim(left=0)
        _plain(ax)
    axes[0].set_ylabel(study.metric)
    axes[0].legend(frameon=False, fontsize=9)
    shown = detailed(study)
    if shown is not None:
        figures |= _layer_figures(study, shown, Figure)
    return figures


def _layer_figures(study: Study, shown: Point, make: Any) -> dict[str, Any]:
    names = [row["name"] for row in shown.layers]
    height = 1.2 + 0.24 * len(names)
    errors = make(figsize=(10, height), layout="constrained")
    ax = errors.subplots()
    same = [p for p in study.points if p.layers and p.reduction == shown.reduction]
    for point in same:
        found = {row["name"]: row["error"] for row in point.layers}
        values = [found.get(name) or 0.0 for name in names]
        ax.plot(
            values, range(len(names)), "o", color=_COLOURS[point.method], label=point.label,
            markersize=5,
        )  # fmt: skip
    ax.set_xlabel("relative output error (0: left dense)")
    ax.set_xlim(left=-0.01)
    _layer_axis(ax, names)
    budget = make(figsize=(10, height), layout="constrained")
    bars = budget.subplots()
    for key, colour, width, label in (
        ("bytes_before", "#dddddd", 0.8, "before"),
        ("bytes_after", _COLOURS[shown.method], 0.45, "after"),
    ):
        sizes = [row[key] / 1024 for row in shown.layers]
        bars.barh(range(len(names)), sizes, width, color=colour, label=label)
    for i, row in enumerate(shown.layers):
        c = "dense" if row["reason"] is not None else f"c = {row['reduction']:.3g}"
        bars.annotate(
            c, (row["bytes_before"] / 1024, i), (4, 0), textcoords="offset points", va="center",
            fontsize=8, color="#555555",
        )  # fmt: skip
    bars.set_xlabel("KiB")
    bars.margins(x=0.1)
    _layer_axis(bars, names)
    return {"errors": errors, "budget": budget}


def _layer_axis(ax: Any, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=5)
    _plain(ax)


def _plain(ax: Any) -> None:
    ax.grid(color="#eeeeee", zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _svg(figure: Any, name: str) -> str:
    """The figure as an ``svg`` element that refers to nothing outside, with ids of its own."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return re.sub(r'xlink:href="#', f'xlink:href="#{name}-', text)
