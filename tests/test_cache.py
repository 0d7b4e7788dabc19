"""Inductor's caches in fresh processes: a warm start hits, and no result is ever stale."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import copy, json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import ss1_compile

D = 64
calls = []
for call in json.loads(sys.argv[1]):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(call.get("weights", 0))
    model = nn.Sequential(nn.Linear(D, 2 * D), nn.Linear(2 * D, D)).eval()
    x = torch.randn(4, D)
    if call.get("calibrated"):
        ss1_compile.calibrate(model, [torch.randn(300, D) @ torch.randn(D, D) + 1])
    options = {"warn_error": 3.0, **call["options"]}
    other = copy.deepcopy(model)
    for parameter, copied in zip(model.parameters(), other.parameters(), strict=True):
        statistics = ss1_compile.calibration.statistics.statistics_of(parameter)
        if statistics is not None:
            ss1_compile.calibration.statistics.rebind(copied, statistics)
    ss1_compile.compress(other, progress=False, **options)
    with torch.no_grad():
        y = torch.compile(model, backend="ss1", options=options)(x)
        expected, dense = other(x), model(x)
    calls.append({
        "error": ((y - expected).norm() / expected.norm()).item(),
        "change": ((dense - expected).norm() / expected.norm()).item(),
        "y": y.flatten()[:8].tolist(),
        "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
        "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
        "aot_hit": counters["aot_autograd"]["autograd_cache_hit"],
        "aot_miss": counters["aot_autograd"]["autograd_cache_miss"],
        "bypass": counters["aot_autograd"]["autograd_cache_bypass"],
    })
print(json.dumps(calls))
"""


def run(calls, cache, **environment):
    """Compile in a fresh process; what it counted and how far each result is from ``compress``."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for result in results:
        assert result["error"] < 1e-5
        assert not result["bypass"]
    return results


CALLS = {
    "same": {"options": {}},
    "other seed": {"options": {"seed": 1}},
    "other reduction": {"options": {"reduction": 2}},
    "other hash family": {"options": {"hash_family": "affine"}},
    "other weights": {"options": {}, "weights": 1},
    "calibrated": {"options": {"projection": "calibrated"}, "calibrated": True},
    "learned": {"options": {}, "calibrated": True},
    "one layer dense": {"options": {"exclude": ["1"]}},
    "lossless": {"options": {"reduction": 1}},
}


@pytest.mark.timeout(900)
def test_warm_start_hits_and_is_never_stale(tmp_path):
    (cold,) = run([CALLS["same"]], tmp_path)
    assert (cold["aot_miss"], cold["aot_hit"]) == (1, 0)
    assert (cold["fx_miss"], cold["fx_hit"]) == (1, 0)
    warm = dict(zip(CALLS, run(list(CALLS.values()), tmp_path), strict=True))
    same = warm.pop("same")
    assert (same["aot_miss"], same["aot_hit"]) == (0, 1)
    assert (same["fx_miss"], same["fx_hit"]) == (0, 1)
    assert same["y"] == cold["y"]
    # The values of weights and sketch are inputs of the graph: other values, the same artefact.
    for name in ("other weights", "calibrated"):
        assert (warm[name]["aot_miss"], warm[name]["aot_hit"]) == (0, 1), name
    # Another graph must not find the artefact of this one.
    for name in ("learned", "other reduction", "one layer dense", "lossless"):
        assert (warm[name]["aot_miss"], warm[name]["aot_hit"]) == (1, 0), name
    # Every result is its own: run() has compared each with compress under the same options.
    values = [tuple(same["y"]), *(tuple(result["y"]) for result in warm.values())]
    assert len(set(values)) == len(CALLS)
    assert warm.pop("lossless")["change"] < 1e-5
    assert all(result["change"] > 0.05 for result in warm.values())
