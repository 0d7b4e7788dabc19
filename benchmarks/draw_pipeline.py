"""Draw docs/images/pipeline.svg: one graph as captured, rewritten and fused by ``backend="ss1"``.

    python benchmarks/draw_pipeline.py           # write
    python benchmarks/draw_pipeline.py --check   # exit code 1 if the picture is out of date

The graphs are those that the backend made in this run. Parameters are named in the box that reads
them, and views that move no data are left out; nothing else is.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import ss1_compile  # noqa: F401 - the backend's operators

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "pipeline.svg"
D = 256
TITLES = ("captured", "rewrite_sites", "fuse")
CHARACTER, LINE, PAD, GAP_X, GAP_Y, MARGIN = 6.7, 16.0, 8.0, 22.0, 30.0, 20.0
FILLS = {
    "dense": ("#dbe9f9", "#3b6ea5"),
    "ss1": ("#d9f2e1", "#2c8a4f"),
    "fused": ("#ffe6c2", "#c0720a"),
    "other": ("#f4f4f4", "#8a8a8a"),
    "end": ("#ffffff", "#555555"),
}
VIEWS = ("flatten", "view", "getitem", "reshape")


class FeedForward(nn.Module):
    """The gated feed-forward block of a decoder, with its norm and its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)
        self.gate = nn.Linear(D, 3 * D, bias=False)
        self.up = nn.Linear(D, 3 * D, bias=False)
        self.down = nn.Linear(3 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., D]`` and the same out."""
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


# --- graphs -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Box:
    """A node of the picture; ``lines`` is empty for a bend of an edge that passes its row."""

    lines: list[str]
    kind: str
    inputs: list[Box] = field(default_factory=list)
    row: int = 0
    x: float = 0.0

    @property
    def width(self) -> float:
        """In SVG units."""
        return CHARACTER * max(map(len, self.lines)) + 2 * PAD if self.lines else 12.0

    @property
    def height(self) -> float:
        """In SVG units."""
        return LINE * len(self.lines) + PAD if self.lines else 0.0


def graphs() -> list[fx.Graph]:
    """The block's graph before the backend's passes, after the rewrite, and after fusion."""
    captured: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        captured.append(gm.graph)
        return gm.forward

    torch._dynamo.register_backend(keep, name="ss1_drawing")
    model, x = FeedForward().eval(), torch.randn(1, 8, D)
    options = {"inner_backend": "ss1_drawing", "warn_error": 2.0}
    with torch.no_grad():
        for how in (None, {**options, "fuse": False}, {**options, "fuse": True}):
            torch._dynamo.reset()
            if how is None:
                torch.compile(model, backend=keep, dynamic=False)(x)
            else:
                torch.compile(model, backend="ss1", dynamic=False, options=how)(x)
    return captured


def boxes(graph: fx.Graph) -> list[Box]:
    made: dict[fx.Node, Box] = {}
    drawn: list[Box] = []
    for node in graph.nodes:
        if node.op == "placeholder" and parameter(node) is not None:
            continue
        inputs = [n for n in node.all_input_nodes if parameter(n) is None]
        if operator(node).partition(".")[0] in VIEWS and len(inputs) == 1:
            made[node] = made[inputs[0]]
            continue
        box = Box(describe(node), kind(node))
        box.inputs = list(dict.fromkeys(made[n] for n in inputs))
        made[node] = box
        drawn.append(box)
    return drawn


def operator(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return "x" if node.op == "placeholder" else "return"
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.replace("::", ".")
        return name.removeprefix("aten.")
    return getattr(node.target, "__name__", str(node.target))


def parameter(node: fx.Node) -> str | None:
    """``gate.weight``, ``gate.z`` or ``sketch``; ``None`` for anything that is no parameter."""
    if node.op != "placeholder":
        return None
    if "sketch" in node.name:
        return "sketch"
    found = re.search(r"modules_(\w+?)_parameters_weight_(?:_(z)_\d+)?$", node.name)
    return f"{found[1]}.{found[2] or 'weight'}" if found else None


def shape(node: fx.Node) -> str:
    value = node.meta.get("example_value", node.meta.get("val"))
    return "×".join(map(str, value.shape)) if isinstance(value, Tensor) else ""


def describe(node: fx.Node) -> list[str]:
    if node.op == "output":
        return ["return"]
    lines = [operator(node)]
    if operator(node) == "slice":
        lines = [f"columns {node.args[2]} … {int(str(node.args[3])) - 1}"]
    named = [f"{parameter(n)} {shape(n)}" for n in node.all_input_nodes if parameter(n)]
    lines += named
    extra = [a for a in node.args if isinstance(a, str) and a != "none"]
    lines += [f"activation: {a}" for a in extra]
    if shape(node):
        lines.append(f"→ {shape(node)}")
    return lines


def kind(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return "end"
    name = operator(node)
    if name == "ss1.linear":
        return "ss1"
    if name.startswith("ss1."):
        return "fused"
    return "dense" if name == "linear" else "other"


# --- layout -------------------------------------------------------------------------------------


def layout(drawn: list[Box]) -> tuple[list[list[Box]], list[list[Box]]]:
    """Rows of boxes by longest path, and every edge as the boxes and bends that it runs through."""
    for box in drawn:
        box.row = max((i.row + 1 for i in box.inputs), default=0)
    rows: list[list[Box]] = [[] for _ in range(max(b.row for b in drawn) + 1)]
    for box in drawn:
        rows[box.row].append(box)
    edges = []
    for box in drawn:
        for start in box.inputs:
            bends = [Box([], "bend", row=r) for r in range(start.row + 1, box.row)]
            for bend, before in zip(bends, [start, *bends], strict=False):
                bend.inputs = [before]
                rows[bend.row].append(bend)  # after the boxes: long edges run on the right
            edges.append([start, *bends, box])
    place(rows, edges)
    return rows, edges


def place(rows: list[list[Box]], edges: list[list[Box]]) -> None:
    """Move boxes towards their neighbours, keeping the order of each row and the gaps in it."""
    near: dict[Box, list[Box]] = {}
    for path in edges:
        for a, b in itertools.pairwise(path):
            near.setdefault(a, []).append(b)
            near.setdefault(b, []).append(a)
    for row in rows:
        spread(row, [0.0] * len(row))
    for _ in range(60):
        for row in rows:
            spread(row, [sum(n.x for n in near[b]) / len(near[b]) for b in row])


def spread(row: list[Box], wanted: list[float]) -> None:
    for box, x in zip(row, wanted, strict=True):
        box.x = x
    for _ in range(40):
        for a, b in itertools.pairwise(row):
            overlap = (a.width + b.width) / 2 + GAP_X - (b.x - a.x)
            if overlap > 0:
                a.x, b.x = a.x - overlap / 2, b.x + overlap / 2


# --- drawing ------------------------------------------------------------------------------------


def svg(columns: Iterable[list[Box]]) -> str:
    parts: list[str] = []
    left, bottom = MARGIN, 0.0
    for title, drawn in zip(TITLES, columns, strict=True):
        rows, edges = layout(drawn)
        every = [box for row in rows for box in row]
        low = min(b.x - b.width / 2 for b in every)
        high = max(b.x + b.width / 2 for b in every)
        for box in every:
            box.x += left - low
        tops, y = [], 56.0
        for row in rows:
            tops.append(y)
            y += max(b.height for b in row) + GAP_Y
        middle = left + (high - low) / 2
        parts.append(f'<text class="title" x="{middle:.1f}" y="32">{escape(title)}</text>')
        parts += [arrow(path, rows, tops) for path in edges]
        parts += [draw(box, tops[box.row], rows) for box in every if box.lines]
        left += high - low + 3 * MARGIN
        bottom = max(bottom, y)
    legend, width = key(bottom), left - 2 * MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {bottom + 32:.0f}" '
            f'width="{width:.0f}" height="{bottom + 32:.0f}" font-family="ui-monospace, '
            'SFMono-Regular, Menlo, Consolas, monospace" font-size="11">',
            "<style>.title { font-weight: bold; font-size: 15px } text { text-anchor: middle } "
            ".key { text-anchor: start } path { fill: none; stroke: #666; stroke-width: 1.2 }"
            "</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><polygon points="0,0 8,4 0,8" fill="#666"/></marker>'
            "</defs>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *parts,
            legend,
            "</svg>",
            "",
        ]
    )


def centre(box: Box, top: float, rows: list[list[Box]]) -> float:
    """The y of the middle of the box's row."""
    return top + max(b.height for b in rows[box.row]) / 2


def arrow(path: list[Box], rows: list[list[Box]], tops: list[float]) -> str:
    first, last = path[0], path[-1]
    points = [(first.x, centre(first, tops[first.row], rows) + first.height / 2)]
    for bend in path[1:-1]:
        height = max(b.height for b in rows[bend.row])
        points += [(bend.x, tops[bend.row]), (bend.x, tops[bend.row] + height)]
    points.append((last.x, centre(last, tops[last.row], rows) - last.height / 2 - 1))
    text = f"M {points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        half = (y0 + y1) / 2
        text += f" C {x0:.1f} {half:.1f} {x1:.1f} {half:.1f} {x1:.1f} {y1:.1f}"
    return f'<path d="{text}" marker-end="url(#tip)"/>'


def draw(box: Box, top: float, rows: list[list[Box]]) -> str:
    fill, line = FILLS[box.kind]
    y = centre(box, top, rows) - box.height / 2
    parts = [
        f'<rect x="{box.x - box.width / 2:.1f}" y="{y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="5" fill="{fill}" stroke="{line}"/>'
    ]
    for i, text in enumerate(box.lines):
        weight = ' font-weight="bold"' if i == 0 else ' fill="#444"'
        baseline = y + PAD / 2 + LINE * (i + 0.75)
        parts.append(f'<text x="{box.x:.1f}" y="{baseline:.1f}"{weight}>{escape(text)}</text>')
    return "\n".join(parts)


def key(y: float) -> str:
    parts, x = [], MARGIN
    for name, text in (("dense", "dense linear"), ("ss1", "SS1"), ("fused", "SS1, fused")):
        fill, line = FILLS[name]
        parts.append(
            f'<rect x="{x}" y="{y}" width="14" height="14" rx="3" fill="{fill}" stroke="{line}"/>'
            f'<text class="key" x="{x + 20}" y="{y + 11}">{text}</text>'
        )
        x += 20 + CHARACTER * len(text) + 24
    return "\n".join(parts)


def main() -> int:
    picture = svg(boxes(graph) for graph in graphs())
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(picture, encoding="utf-8")
        return 0
    if not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != picture:
        print(f"{PICTURE.name} is out of date: run python benchmarks/draw_pipeline.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
