"""``docs/onnx.md`` shows what the results files hold."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("benchmark", ["onnx_matrix", "onnx_models", "onnx_cpu"])
def test_tables_are_those_of_the_results(benchmark, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    assert importlib.import_module(benchmark).render() == page


def test_every_opset_form_and_tool_is_there(monkeypatch):
    """And all but the one that the page explains are well."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import onnx_matrix

    rows = json.loads(onnx_matrix.RESULTS.read_text(encoding="utf-8"))["rows"]
    cases = [(row["opset"], row["form"], row["z"]) for row in rows]
    forms, z = ("function", "standard", "custom"), ("float32", "int8_dynamic")
    assert set(cases) == {(o, f, q) for o in onnx_matrix.OPSETS for f in forms for q in z}
    assert len(cases) == len(set(cases))
    failing = {
        (row["form"], tool)
        for row in rows
        for tool in onnx_matrix.TOOLS
        if row[tool] not in ("ok", onnx_matrix.NEEDS_KERNEL)
    }
    assert failing == {("function", "OpenVINO")}
    bare = {tool for row in rows for tool, cell in row.items() if cell == onnx_matrix.NEEDS_KERNEL}
    assert bare == set(onnx_matrix.TOOLS) - set(onnx_matrix.SYMBOLIC)
