"""The README's examples run, and its figures are those of the committed measurement."""

import copy
import importlib.util
import json
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
    result = json.loads(render_readme.RESULT.read_text(encoding="utf-8"))
    changed = copy.deepcopy(result)
    changed["quality"][1]["cosine"] += 0.01
    assert render_readme.render(README, changed) != README
    again = render_readme.render(render_readme.render(README, changed), result)
    assert again == README
    with pytest.raises(ValueError, match="once each"):
        render_readme.render(README + render_readme.BEGIN, result)
