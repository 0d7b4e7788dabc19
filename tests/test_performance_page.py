import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    "script",
    ["render.py", "render_models.py", "render_quality.py", "render_quantization.py"],
)
def test_the_page_is_what_the_measurements_say(script):
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
