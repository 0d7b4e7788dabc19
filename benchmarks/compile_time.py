"""What the passes add to compiling: BERT of 6, 12 and 24 layers, every variant in a fresh process.

    python benchmarks/compile_time.py                 # results/compile_time.json
    python benchmarks/compile_time.py --device cuda

The whole encoder is one graph; Inductor's caches are off. *Passes* is the time of this project's
graph passes, by their own trace; projecting the weights, which ``backend="ss1"`` does at the first
call over a dense model, stands apart. The compressed model compiles
different code, fused operators in place of Inductor's kernels, so its whole time can be shorter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
from rich.console import Console
from rich.table import Table

LAYERS = (6, 12, 24)
VARIANTS = ("dense", "compressed", "backend")


def measure(variant: str, layers: int, device: str) -> dict[str, Any]:
    """Seconds of the first call and milliseconds of the passes of one variant, in this process."""
    import torch
    from transformers import BertConfig, BertModel

    import ss1_compile

    config = BertConfig(
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=1024,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False).to(device)
    ids = torch.randint(config.vocab_size, (2, 64), device=device)
    options: dict[str, Any] = {"reduction": 2}
    if variant == "compressed":
        ss1_compile.compress(model, ss1_compile.SS1Config(reduction=2, projection="average"))
        options = {}
    sketch = ss1_compile.SS1Linear(ss1_compile.SS1Structure.create(256, 256, 2), False)
    sketch.to(device)(torch.zeros(1, 256, device=device))  # builds or loads the operator
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if variant == "dense":
            compiled = torch.compile(model, dynamic=False)
        else:
            options |= {"fuse": True, "debug_dir": folder}
            compiled = torch.compile(model, backend="ss1", dynamic=False, options=options)
        began = time.perf_counter()
        compiled(ids)
        if device == "cuda":
            torch.cuda.synchronize()
        row = {"layers": layers, "variant": variant, "first_call_s": time.perf_counter() - began}
        records = [json.loads(path.read_text()) for path in Path(folder).glob("*/passes.json")]
    took = dict.fromkeys(("passes", "project", "inductor"), 0.0)
    for record in itertools.chain.from_iterable(records):
        name = record["name"] if record["name"] in took else "passes"
        took[name] += record["milliseconds"]
    return {**row, "passes_ms": took["passes"], "projection_ms": took["project"]}


def environment(device: str) -> dict[str, Any]:
    """Versions, and the GPU or the number of threads."""
    if device == "cuda":
        return harness.environment()
    import torch

    return {"device": "cpu", "torch": torch.__version__, "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, nargs="*", default=LAYERS)
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "LAYERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.device)))
        return
    rows = []
    table = Table("layers", "variant", "first call, s", "projection, ms", "passes, ms", "of dense")
    for layers in options.layers:
        for variant in VARIANTS:
            with tempfile.TemporaryDirectory() as cache:
                off = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
                command = [sys.executable, __file__, "--device", options.device]
                run = subprocess.run(
                    [*command, "--one", variant, str(layers)],
                    capture_output=True,
                    text=True,
                    env={**os.environ, **off},
                    check=False,
                )
            if run.returncode:
                sys.exit(f"{variant}, {layers} layers failed:\n{run.stderr[-3000:]}")
            row = json.loads(run.stdout.splitlines()[-1])
            if variant == "dense":
                dense = row["first_call_s"]
            row["of_dense"] = row["passes_ms"] / 1e3 / dense
            rows.append(row)
            table.add_row(
                str(layers),
                variant,
                f"{row['first_call_s']:.1f}",
                f"{row['projection_ms']:.0f}",
                f"{row['passes_ms']:.0f}",
                f"{row['of_dense']:.1%}",
            )
    Console().print(table)
    harness.write("compile_time", {"environment": environment(options.device), "rows": rows})


if __name__ == "__main__":
    main()
