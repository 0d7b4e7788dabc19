"""Send the zoo of tests/zoo through every door; write the results and the page that shows them.

    python benchmarks/zoo.py               # all architectures: some minutes
    python benchmarks/zoo.py bert gpt2     # these alone; the results of the others are kept
    python benchmarks/zoo.py --render      # only write docs/zoo.md again

Results: benchmarks/results/zoo.json. The exit code is 1 if any check failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "zoo.md"
DOORS = {"compress": "`compress`", "backend": '`backend="ss1"`', "export": "`compress_exported`"}


def measure(names: list[str]) -> None:
    import torch

    sys.path.insert(0, str(ROOT / "tests" / "zoo"))
    from architectures import ARCHITECTURES
    from checks import examine

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = json.loads(RESULT.read_text())["models"] if RESULT.exists() else {}
    commit = _commit()
    for name in names or list(ARCHITECTURES):
        result = examine(ARCHITECTURES[name])
        known[name] = {**result.to_dict(), "commit": commit}
        for failure in result.failures:
            print(f"{name}: {failure}", file=sys.stderr)
        print(f"{name}: {len(result.failures)} failures, {result.seconds} s", flush=True)
        ordered = {name: known[name] for name in ARCHITECTURES if name in known}
        versions = {"torch": torch.__version__, "transformers": _version("transformers")}
        document = {"versions": versions, "models": ordered}
        RESULT.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout[:-1]


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def share(results: list[Mapping[str, Any]], door: str) -> str:
    """The part of the FLOPs that a door rewrote, of the models that go through it."""
    through = [r for r in results if door in r["doors"] and not r["doors"][door]["skipped"]]
    total = sum(r["flops"] for r in through)
    rewritten = sum(r["doors"][door]["rewritten"] for r in through)
    return f"{100 * rewritten / total:.1f} %" if total else "–"


def page(document: Mapping[str, Any]) -> str:
    """docs/zoo.md."""
    results = list(document["models"].values())
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    shared = [r for r in results if r["kind"] != "plain torch"]
    errors = [
        door["error"] for r in results for door in r["doors"].values() if door["error"] is not None
    ]
    failures = [(r["name"], text) for r in results for text in r["failures"]]
    commits = {r["commit"] for r in results}
    measured = f"Measured at {'commit' if len(commits) == 1 else 'the commits'} "
    measured += ", ".join(f"`{commit}`" for commit in sorted(commits)) + "."
    lines = [
        "# The zoo",
        "",
        "<!-- written by benchmarks/zoo.py; do not edit -->",
        "",
        f"{len(results)} tiny, randomly initialised models, {len(shared)} of `transformers`,",
        f"each sent through every door ({versions}, CPU, float32). Checked of each:",
        "",
        "- at c = 1 the outputs equal those of the dense model (relative difference below 1e-5;",
        f"  the largest seen is {max(errors):.0e});",
        "- at c = 4 the outputs are finite, and the doors agree where they handle the same layers;",
        "- every product of an activation with a parameter is in the report, as SS1 or with a",
        "  reason. The products are counted by a `TorchDispatchMode` while the dense model runs,",
        "  and not by the library;",
        "- the parameters of the handled layers fall by c, but for padding;",
        "- `generate()` gives the same tokens at c = 1, and runs at c = 4.",
        "",
        "The percentages are the part of the linear FLOPs (products of activations with",
        "parameters, 1×1 convolutions included, larger convolutions not) that became SS1. The",
        "models are tiny: a head of 97 tokens weighs more, and a router less, than in a real one.",
        f"`timm` is not in it (it needs `torchvision`). {measured}",
        "",
        "| models | number | " + " | ".join(DOORS.values()) + " |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    kinds = list(dict.fromkeys(r["kind"] for r in results))
    groups = [(kind, [r for r in results if r["kind"] == kind]) for kind in kinds]
    groups += [("`transformers`, all", shared), ("all", results)]
    for kind, members in groups:
        cells = [share(members, door) for door in DOORS]
        lines.append(f"| {kind} | {len(members)} | " + " | ".join(cells) + " |")
    lines += ["", "## Each model", ""]
    lines += ["| model | linear MFLOPs | " + " | ".join(DOORS.values()) + " | `generate()` |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
    for r in results:
        cells = [share([r], door) for door in DOORS]
        generates = {True: "same", False: "**differs**", None: ""}[r["generates"]]
        row = [r["name"], f"{r['flops'] / 1e6:.2f}", *cells, generates]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "## What stays dense, and why", ""]
    lines += ["| door | reason | part of its linear FLOPs | models |", "| --- | --- | ---: | --- |"]
    for door, title in DOORS.items():
        through = [r for r in results if door in r["doors"] and not r["doors"][door]["skipped"]]
        total = sum(r["flops"] for r in through)
        reasons: dict[str, tuple[int, list[str]]] = {}
        for r in through:
            for reason, flops in r["doors"][door]["reasons"].items():
                text = reason.split(" is tied to ")[0].replace("|", "\\|")
                text = text if text == reason else f"{text} is tied to another parameter"
                before, names = reasons.get(text, (0, []))
                reasons[text] = (before + flops, list(dict.fromkeys([*names, r["name"]])))
        for text, (flops, names) in sorted(reasons.items(), key=lambda item: -item[1][0]):
            listed = ", ".join(names) if len(names) <= 4 else f"{len(names)} models"
            lines.append(f"| {title} | {text} | {100 * flops / total:.1f} % | {listed} |")
    skipped = [(r["name"], d["skipped"]) for r in results for d in r["doors"].values()]
    skipped = [(name, text) for name, text in skipped if text]
    if skipped:
        lines += ["", "## Where a door does not apply", ""]
        lines += [f"- {name}: {text}" for name, text in skipped]
    lines += ["", "## Failures", ""]
    lines += [f"- {name}: {text}" for name, text in failures] or ["None."]
    return "\n".join(lines) + "\n"


def main() -> int:
    arguments = sys.argv[1:]
    if arguments != ["--render"]:
        measure(arguments)
    document = json.loads(RESULT.read_text())
    PAGE.write_text(page(document))
    return int(any(r["failures"] for r in document["models"].values()))


if __name__ == "__main__":
    sys.exit(main())
