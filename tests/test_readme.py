"""The README's examples run, and its figures are those of the committed measurement."""

import copy
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def render_readme():
    path = ROOT / "benchmarks" / "render_readme.py"
    spec = importlib.util.spec_from_file_location("render_readme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_an_example_for_each_way_in():
    assert len(EXAMPLES) == 3
    ways = ("ss1_compile.compress(", 'backend="ss1"', "ss1_compile.compile(")
    assert all(way in example for way, example in zip(ways, EXAMPLES, strict=True))


@pytest.mark.parametrize("example", EXAMPLES, ids=["compress", "backend", "compile"])
def test_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    if "report" in names:
        assert len(names["report"].compressed) == 2
        assert names["report"].bytes_after < 0.6 * names["report"].bytes_before
    if "y" in names:
        assert names["y"].shape == (len(names["y"]), 256)
        assert names["y"].isfinite().all()


def test_pages_show_the_committed_figures(render_readme):
    assert render_readme.main(["--check"]) == 0


def test_changed_figures_are_noticed(render_readme):
    result = render_readme.read("minilm_cpu")
    changed = copy.deepcopy(result)
    changed["quality"][1]["cosine"] += 0.01
    page = render_readme.render(README, "figures", render_readme.figures(changed))
    assert page != README
    assert render_readme.render(page, "figures", render_readme.figures(result)) == README
    with pytest.raises(ValueError, match="once each"):
        render_readme.render(README + render_readme.MARKERS["figures"][0], "figures", "")


def test_speedups_on_the_gpu_are_over_the_faster_dense(render_readme):
    layers = copy.deepcopy(render_readme.read("layers"))
    (row,) = (
        r
        for r in layers["layers"]
        if (r["M"], r["K"], r["N"], r["c"], r["method"]) == (8192, 4096, 14336, 4, "ss1 learned")
    )
    row.update(us=100.0, dense_us=777.0, compiled_dense_us=654.0)
    text = render_readme.gpu_figures(layers, {"rows": []})
    (line,) = (x for x in text.splitlines() if x.startswith("| 8192 x 4096 → 14336 | learned"))
    assert line.split(" | ")[3] == "6.54×"
