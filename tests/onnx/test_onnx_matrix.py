"""A part of the matrix of ``docs/onnx.md``: the tools that the extra ``onnx`` brings."""

from pathlib import Path

import pytest

TOOLS = ("ONNX Runtime", "onnx.reference", "checker, full", "strict inference")


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 25])
def test_every_form_runs(opset, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import onnx_matrix

    rows = onnx_matrix.measure([opset], TOOLS)
    assert [(row["form"], row["z"]) for row in rows] == [
        (form, z)
        for z in ("float32", "int8_dynamic")
        for form in ("function", "standard", "custom")
    ]
    for row in rows:
        for tool in TOOLS:
            bare = row["form"] == "custom" and tool not in onnx_matrix.SYMBOLIC
            assert row[tool] == (onnx_matrix.NEEDS_KERNEL if bare else "ok"), (row, tool)
