from __future__ import annotations

import io
import json
import re
import sys

import pytest
import torch
from rich.console import Console

from ss1_compile.config import SS1Config
from ss1_compile.errors import NothingToCompressError, SS1Warning
from ss1_compile.report import EXACT_ERROR, LayerReport, Report, tensor_bytes


def row(name: str, error: float | None = 0.25, **changes: object) -> LayerReport:
    values: dict[str, object] = {
        "op": "Linear",
        "shape": (1536, 384),
        "bytes_before": 4 * 2**20,
        "bytes_after": 2**20,
        "reduction": 4,
        "error": error,
        "error_of": None if error is None else "output",
        "projection": "calibrated",
    }
    return LayerReport(name, **{**values, **changes})  # type: ignore[arg-type]


def dense(name: str, reason: str = "excluded by 'head'") -> LayerReport:
    return LayerReport(name, "Conv1D", None, 2**20, 2**20, reason=reason)


@pytest.fixture
def report() -> Report:
    return Report([row("a.up", 0.25), dense("head"), row("a.down", 0.75), row("a.new", None)])


def test_rows_and_totals(report):
    assert [layer.name for layer in report] == ["a.up", "head", "a.down", "a.new"]
    assert len(report) == 4
    assert [layer.name for layer in report.compressed] == ["a.up", "a.down", "a.new"]
    assert [layer.name for layer in report.left] == ["head"]
    assert report["head"].reason == "excluded by 'head'"
    assert report.bytes_before == 13 * 2**20
    assert report.bytes_after == 4 * 2**20
    assert report.mean_error == 0.5
    with pytest.raises(KeyError, match="tail"):
        report["tail"]


def test_empty_report():
    empty = Report()
    assert (len(empty), empty.bytes_before, empty.bytes_after, empty.mean_error) == (0, 0, 0, None)
    assert empty.summary() == "0 of 0 linear layers are SS1"
    assert empty.summary() in str(empty)
    assert Report([row("a", None)]).mean_error is None
    assert Report().layers is not empty.layers


def test_exact():
    assert row("a", EXACT_ERROR).exact
    assert row("a", 0.0).exact
    assert not row("a", 2 * EXACT_ERROR).exact
    assert not row("a", None).exact


def test_json(report):
    values = json.loads(report.to_json())
    assert values == json.loads(json.dumps(report.to_dict()))
    assert {k: v for k, v in values.items() if k != "layers"} == {
        "compressed": 3,
        "left": 1,
        "bytes_before": 13 * 2**20,
        "bytes_after": 4 * 2**20,
        "mean_error": 0.5,
        "mean_quantization_error": None,
        "notes": [],
    }
    assert values["layers"][0] == {
        "name": "a.up",
        "op": "Linear",
        "shape": [1536, 384],
        "bytes_before": 4 * 2**20,
        "bytes_after": 2**20,
        "reduction": 4,
        "error": 0.25,
        "error_of": "output",
        "projection": "calibrated",
        "quantization": None,
        "bits": None,
        "quantization_error": None,
        "reason": None,
        "lowering": None,
        "speedup": None,
        "fused": [],
    }
    assert values["layers"][1]["shape"] is None
    assert "\n" not in report.to_json(indent=None)


def test_dataframe(report):
    pandas = pytest.importorskip("pandas")
    frame = report.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["name"]) == [layer.name for layer in report]
    assert frame["bytes_after"].sum() == report.bytes_after
    assert frame.loc[1, "reason"] == "excluded by 'head'"


def test_dataframe_without_pandas(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pandas"):
        report.to_dataframe()


def table_row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if re.search(rf"│ {re.escape(name)} +│", line)]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_table(report):
    text = str(report)
    assert "3 of 4 linear layers are SS1, 13.00 → 4.00 MiB, mean relative error 0.500" in text
    assert table_row(text, "a.up") == [
        "a.up",
        "Linear",
        "1536×384",
        "4",
        "4096 → 1024",
        "0.250 (output)",
        "calibrated",
    ]
    assert table_row(text, "head") == ["head", "Conv1D", "", "", "1024", "", "excluded by 'head'"]
    assert table_row(str(Report([row("a", 1e-9)])), "a")[-1] == "exact"


def test_rich_prints_the_same_table(report):
    console = Console(file=io.StringIO(), width=140, no_color=True)
    console.print(report)
    assert console.file.getvalue() == str(report)  # type: ignore[attr-defined]


def test_brackets_are_text_and_not_markup():
    reason = "excluded by 'layer.[abc].[/bold]*'"
    text = str(Report([dense("blocks[red]", reason)]))
    assert table_row(text, "blocks[red]")[-1] == reason


def test_str_is_plain_text_wherever_it_is_printed(report, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in str(report)


def test_long_names_are_never_cut():
    name = ".".join(["transformer.encoder.very_long_layer_name"] * 4)
    lines = str(Report([row(name)])).splitlines()
    assert "".join(line.split("│")[1].strip() for line in lines if line.startswith("│")) == name


def test_warns_once_and_names_the_worst():
    report = Report([row(f"layer.{i}", i / 10, error_of="weight") for i in range(10)])
    with pytest.warns(SS1Warning) as caught:
        report.warn_if_ruined(0.5)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("4 of 10 projected layers lose more than 50% ")
    assert "worst: layer.9 0.90 (weight), layer.8 0.80 (weight), layer.7 0.70 (weight))" in message
    assert "calibrate" in message
    assert "max_error" in message


def test_warning_after_calibration_does_not_advise_to_calibrate():
    with pytest.warns(SS1Warning, match="use a smaller reduction for them") as caught:
        Report([row("a", 0.9)]).warn_if_ruined(0.5)
    assert "ss1_compile.calibrate" not in str(caught[0].message)


def test_does_not_warn_without_a_cause():
    ruined_but_dense = dense("b")
    Report([row("a", 0.5), row("c", None), ruined_but_dense]).warn_if_ruined(0.5)
    Report().warn_if_ruined(0.5)


def test_require_some():
    Report([row("a"), dense("b")]).require_some(SS1Config())
    Report([dense("b")]).require_some(SS1Config(allow_empty=True))
    with pytest.raises(NothingToCompressError, match=r"the model has none.*allow_empty=True"):
        Report().require_some(SS1Config())
    rows = [dense(f"layer{i}", f"reason {i}") for i in range(7)]
    with pytest.raises(NothingToCompressError) as caught:
        Report(rows).require_some(SS1Config())
    message = str(caught.value)
    assert "layer0: reason 0; layer1: reason 1" in message
    assert "layer4" in message
    assert "layer5" not in message


def test_tensor_bytes():
    tensors = [torch.zeros(3, 5), None, torch.zeros(7, dtype=torch.bfloat16), torch.zeros(0)]
    assert tensor_bytes(tensors) == 3 * 5 * 4 + 7 * 2
    assert tensor_bytes([]) == 0


def test_record_replaces_a_row_of_the_same_name_and_operation(report):
    report.record(row("a.up", 0.5))
    assert [layer.name for layer in report] == ["a.up", "head", "a.down", "a.new"]
    assert report["a.up"].error == 0.5
    report.record(row("a.up", 0.5, op="aten.addmm"))
    assert len(report) == 5


def test_fused_layers_say_so(report):
    report.note_fused({"a.up": ("norm", "shared with down"), "elsewhere": ("residual",)})
    assert report["a.up"].fused == ("norm", "shared with down")
    assert "fused: norm, shared with down" in " ".join(str(report).split())
    assert json.loads(report.to_json())["layers"][0]["fused"] == ["norm", "shared with down"]
    assert "elsewhere" not in [row.name for row in report]


def test_a_layer_that_the_backend_leaves_keeps_the_row_of_compress():
    made = LayerReport("up", "Linear", (8, 8), 256, 64, reduction=4)
    report = Report([made])
    report.record(LayerReport("up", "linear", (8, 8), 256, 256, reason="not included"))
    assert list(report) == [made]
    report.record(LayerReport("up", "linear", (8, 4), 128, 128, reason="another layer"))
    assert len(report) == 2
    report.record(LayerReport("up", "linear", (8, 4), 128, 128, reason="another reason"))
    assert [row.reason for row in report] == [None, "another reason"]
