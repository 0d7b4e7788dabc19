"""What ``ss1_compile.tensorrt`` says where TensorRT cannot be had."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ss1_compile.tensorrt as ss1_tensorrt
from ss1_compile.errors import MissingPackageError, TensorRTError

ROOT = Path(__file__).resolve().parent.parent


def test_importing_it_imports_nothing_of_tensorrt():
    code = (
        "import sys, ss1_compile, ss1_compile.tensorrt; "
        "print([m for m in sys.modules if m.split('.')[0].endswith(('tensorrt', 'tensorrt_rtx'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("call", ["register", "export", "compile"])
def test_without_the_package_the_message_names_both_extras(monkeypatch, tmp_path, call):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    model, x = nn.Linear(64, 64).requires_grad_(False), torch.randn(2, 64)
    options = {"inner_backend": "torch_tensorrt", "reduction": 1, "min_features": 1}

    def run():
        if call == "register":
            ss1_tensorrt.register()
        elif call == "export":
            ss1_tensorrt.export_tensorrt(model, (x,), tmp_path / "model.engine")
        else:
            torch.compile(model, backend="ss1", options=options)(x)

    with pytest.raises(Exception, match=r"ss1-compile\[tensorrt\]") as caught:
        run()
    error = getattr(caught.value, "inner_exception", caught.value)  # Dynamo wraps it
    assert isinstance(error, MissingPackageError)
    assert "ss1-compile[tensorrt-rtx]" in str(error)
    assert "not both" in str(error)
    assert not list(tmp_path.iterdir())


def test_a_package_that_does_not_load_is_no_missing_package(monkeypatch):
    def halt(name):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(importlib, "import_module", halt)
    with pytest.raises(TensorRTError, match="and a GPU: Torch not compiled"):
        ss1_tensorrt.register()


def test_a_library_that_is_missing_is_named(monkeypatch):
    def halt(name):
        raise ImportError("libnvinfer.so.10: cannot open shared object file", name="tensorrt")

    monkeypatch.setattr(importlib, "import_module", halt)
    with pytest.raises(TensorRTError, match=r"is installed, but libnvinfer\.so\.10"):
        ss1_tensorrt.register()


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_what_engines_computed():
    probe = script("tensorrt_probe")
    page = probe.PAGE.read_text(encoding="utf-8")
    assert probe.rendered(page) == page


def test_the_page_holds_the_sizes_that_were_measured():
    forms = script("tensorrt_forms")
    page = forms.PAGE.read_text()
    assert forms.rendered(page) == page
    sizes = {(r["layers"], r["n"], r["form"]): r["engine_bytes"] for r in measured(forms)}
    for layers, n, form in sizes:
        if form in ("dense", "matrix", "slices"):  # the form that is used is the smallest
            assert sizes[layers, n, "gather"] < sizes[layers, n, form]


def measured(forms):
    return json.loads(forms.RESULT.read_text())["rows"]
