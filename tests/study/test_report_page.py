"""The report page: whole, self-contained, and with the study's values."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import ss1_compile
from ss1_compile.errors import ConfigError
from ss1_compile.study.page import detailed, write_page
from ss1_compile.study.study import Point, Study, study, time_models

pytest.importorskip("matplotlib")

NAME = 'MLP <b>"quoted" & co</b>'


class Reader(HTMLParser):
    """Collects tables, the JSON, text of SVGs, and everything that refers to something."""

    def __init__(self):
        super().__init__()
        self.tables, self.links, self.data, self.svg, self.stack = [], [], "", "", []
        self.ids = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "path", "use", "rect", "br", "line"):
            self.stack.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href", "data")]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass

    def handle_data(self, data):
        if "script" in self.stack:
            self.data += data
        elif "svg" in self.stack:
            self.svg += data + "\n"
        elif self.stack and self.stack[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    layers = (nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    model = nn.Sequential(*layers).eval()
    mixing = torch.randn(24, 48)
    batches = [torch.randn(64, 24) @ mixing for _ in range(6)]
    measured = study(
        model, batches[:4], batches[4:], title=NAME, reductions=(2,), rounds=1, progress=False
    )
    directory = tmp_path_factory.mktemp("page")
    files = write_page(measured, directory / "page.html")
    text = files[0].read_text()
    reader = Reader()
    reader.feed(text)
    return model, batches, measured, files, text, reader


def test_the_study_measures_each_model(made):
    model, batches, measured, *_ = made
    assert [p.label for p in measured.points] == [
        "dense", "average, c = 2", "calibrated, c = 2", "learned, c = 2", "plan, c = 2",
    ]  # fmt: skip
    dense, average, calibrated, learned, plan = measured.points
    assert dense.quality == pytest.approx(1)
    assert average.quality < calibrated.quality < 1
    assert learned.quality < 1
    assert dense.model_bytes == sum(4 * p.numel() for p in model.parameters())
    assert average.model_bytes < 0.6 * dense.model_bytes
    assert dense.linear_bytes == dense.model_bytes
    assert plan.linear_bytes < 0.6 * dense.linear_bytes
    assert all(p.latency_ms > 0 for p in measured.points)
    assert Study.from_dict(measured.to_dict()) == measured
    assert all(type(layer) is nn.Linear for layer in model[::2])
    with pytest.raises(ConfigError, match="best"):
        study(model, batches[:1], batches[1:], methods=("best",))
    with pytest.raises(ConfigError, match="no study"):
        Study.from_dict({"points": [{}]})


def test_the_page_refers_to_nothing_outside(made):
    _, _, _, _, text, reader = made
    assert reader.links
    assert all(link.startswith("#") for link in reader.links)
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert "@import" not in text
    assert all(found.startswith("#") for found in re.findall(r"url\(['\"]?([^)]*)\)", text))
    addresses = set(re.findall(r"https?://[^\"'\s<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<b>" not in text  # a title is text


def test_the_page_has_every_layer_and_the_values_of_the_report(made):
    model, batches, measured, files, _, reader = made
    points, layers = reader.tables
    assert [row[0] for row in points[1:]] == [p.label for p in measured.points]
    for row, point in zip(points[1:], measured.points, strict=True):
        assert row[2] == f"{point.model_bytes / 2**20:.2f}"
        assert row[4] == f"{point.latency_ms:.1f}"
        assert row[6] == f"{point.quality:.4f}"
    shown = detailed(measured)
    assert shown.method == "plan"
    assert [row[0] for row in layers[1:]] == ["0", "2", "4"]
    for row, layer in zip(layers[1:], shown.layers, strict=True):
        assert row[4] == f"{layer['bytes_after'] / 1024:.0f}"
        assert row[5] == ("" if layer["error"] is None else f"{layer['error']:.3f}")
        assert layer["name"] in reader.svg.split()
    assert Study.from_dict(json.loads(reader.data)) == measured
    learned = next(p for p in measured.points if p.method == "learned")
    fresh = nn.Sequential(*model)
    report = ss1_compile.compress(
        fresh, calibration=batches[:4], projection="learned", reduction=2, warn_error=10.0,
        progress=False,
    )  # fmt: skip
    for row, layer in zip(report, learned.layers, strict=True):
        assert layer["error"] == pytest.approx(row.error)
        assert layer["bytes_after"] == row.bytes_after
    assert [f.name for f in files[1:]] == [
        "page-pareto.png", "page-errors.png", "page-budget.png",
    ]  # fmt: skip
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])


def test_the_front_leaves_out_what_is_beaten():
    def point(method, size, quality):
        return Point(method, 2, size, size, quality, 1.0)

    points = (
        point("dense", 10, 1.0), point("learned", 5, 0.9), point("plan", 5, 0.95),
        point("average", 6, 0.5),
    )  # fmt: skip
    more = Study("m", "cosine", True, "cpu", points)
    assert [p.method for p in more.front("model_bytes")] == ["plan", "dense"]
    less = Study("m", "perplexity", False, "cpu", points)
    assert [p.method for p in less.front("model_bytes")] == ["learned", "average"]


def test_models_take_turns():
    order = []

    class Noted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            order.append(self.name)
            return x

    times = time_models({"a": Noted("a"), "b": Noted("b")}, [torch.zeros(1)] * 2, rounds=2)
    assert order == ["a", "a", "b", "b"] * 3
    assert set(times["a"]) == {"median_ms", "least_ms"}
