"""The picture of the pipeline shows what the passes do, and the page's example runs."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "images" / "pipeline.svg"


def test_the_picture_is_what_the_passes_do():
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "draw_pipeline.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_boxes_of_the_picture_overlap():
    boxes = []
    for rect in ElementTree.parse(PICTURE).getroot().iter("{http://www.w3.org/2000/svg}rect"):
        if rect.get("rx") == "5":
            x, y, width, height = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
            boxes.append((x, y, x + width, y + height))
    assert len(boxes) > 20
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:i]:
            apart = right < other[0] or other[2] < left or bottom < other[1] or other[3] < top
            assert apart


def test_the_example_writes_the_files_that_the_page_names():
    page = (ROOT / "docs" / "pipeline.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    scope = {}
    exec(compile(code, "pipeline.md", "exec"), scope)
    folder = Path(scope["folder"]) / "graph_000"
    for name in ("00_captured.txt", "05_rewrite_sites.txt", "passes.txt", "passes.json"):
        assert name in page
        assert (folder / name).exists()
    assert (folder / "05_rewrite_sites.diff").exists()
    for file in re.findall(r"`((?:passes|kernels|ss1_compile)/[\w/]+\.py)`", page):
        assert (ROOT / file).exists(), file
