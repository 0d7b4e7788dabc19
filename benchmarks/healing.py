"""Heal a pretrained model after compression, and watch it on unseen text.

    python benchmarks/healing.py --device cuda                        MiniLM, c = 4
    python benchmarks/healing.py --model smollm2 --device cuda        SmolLM2, c = 2, blocks 2-27
    python benchmarks/healing.py --device cuda --seconds 300          as many steps as fit
    python benchmarks/healing.py --steps 48 --batch 32 --texts 1536   a few minutes' proof on a CPU
    python benchmarks/render_healing.py                               docs/healing.md

At every evaluation the run's row in results/healing.json is renewed. With ``--minutes`` a run ends
at the first evaluation after so long. The compressed model and the state of the training are kept
under ``--directory``: the same command goes on where the last one was. Not so with ``--seconds``,
which is evaluated every ``--every`` steps and keeps the compressed model only.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import time
import warnings
from pathlib import Path
from typing import Any

import harness
import torch
from healing_subjects import SUBJECTS, Options, Subject, read_texts
from safetensors import safe_open
from torch import nn

import ss1_compile
from ss1_compile.healing.state import STATE_FILE

NAME = "healing"
DEFAULTS: dict[str, dict[str, Any]] = {
    "minilm": {"reduction": 4.0, "batch": 128, "steps": 4000},
    "smollm2": {"reduction": 2.0, "batch": 32, "steps": 1500},
}
COMPRESSION = ("projection", "reduction", "plan", "sequential", "alike", "seed")
TRAINING = (
    *("train", "texts", "cuts", "sampled", "batch", "steps", "block_steps", "learning_rate"),
    *("hidden_weight", "label_weight", "compile", "materialize", "cuda_graphs", "evaluations"),
    "budget",
)
SETTINGS = (*COMPRESSION, *TRAINING)
MOST_STEPS = 1_000_000


class OutOfTime(Exception):
    """The minutes are over; the state is on disk."""


class Run:
    """One row, from its first step or from where it was.

    Args:
        subject: what is healed.
        arguments: of the command line.
    """

    def __init__(self, subject: Subject, arguments: argparse.Namespace) -> None:
        self.subject, self.arguments = subject, arguments
        self.started = time.monotonic()
        on_gpu = arguments.device.type == "cuda"
        self.row: dict[str, Any] = {
            "model": subject.name,
            **{name: getattr(arguments, name) for name in SETTINGS},
            "texts": subject.texts,
            "unit": subject.unit,
            "more": sorted({re.sub(r"-\d+$", "", path.stem) for path in arguments.more}),
            "on": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "torch": torch.__version__,
        }
        self.base = arguments.directory / self._slug("model", *COMPRESSION)
        self.directory = self.base / self._slug(*TRAINING)
        self.total = arguments.steps + arguments.block_steps
        self.every = max(1, self.total // arguments.evaluations)
        due = {*range(0, self.total, self.every), arguments.block_steps, self.total}
        done = self._resumed()
        if arguments.budget:
            self.every, done = arguments.every, 0
            due = {*range(0, MOST_STEPS, self.every)}
        self.due = [step for step in sorted(due) if step > done or done == 0]
        self.row["points"] = [p for p in self._earlier() if p["step"] not in self.due]

    def _slug(self, *names: str) -> str:
        return "-".join(re.sub(r"[^\w.]+", "_", str(self.row[name])) for name in names)

    def _resumed(self) -> int:
        """The step of the state on disk; 0 without one."""
        path = self.directory / STATE_FILE
        if not path.is_file():
            return 0
        with safe_open(path, framework="pt") as file:
            return int(json.loads(file.metadata()["state"])["result"]["steps"])

    def _earlier(self) -> list[dict[str, Any]]:
        row = next((row for row in read_rows() if same(row, self.row)), {"points": []})
        found: list[dict[str, Any]] = row["points"]
        return found

    def compressed(self) -> nn.Module:
        """The dense model's copy, compressed as the arguments say (by an earlier run maybe)."""
        subject, arguments = self.subject, self.arguments
        config = ss1_compile.SS1Config(
            projection=arguments.projection,
            reduction=int(whole) if (whole := arguments.reduction).is_integer() else whole,
            exclude=subject.exclude,
            warn_error=10.0,
            weigh_outputs=not arguments.alike,
        )
        model = copy.deepcopy(subject.dense)
        kept = self.base / "compressed"
        if (kept / "ss1_config.json").is_file():
            return ss1_compile.load(model, kept)
        if arguments.plan:
            config = self._planned(config)
        start = time.monotonic()
        ss1_compile.compress(model, config, subject.calibration, sequential=arguments.sequential)
        print(f"compressed in {time.monotonic() - start:.0f} s", flush=True)
        ss1_compile.save(model, kept)
        return model

    def _planned(self, config: ss1_compile.SS1Config) -> ss1_compile.SS1Config:
        path = self.base / "plan.json"
        if not path.is_file():
            target = 1 / self.arguments.reduction
            plan = ss1_compile.plan(
                self.subject.dense,
                self.subject.calibration,
                target,
                config=config,
                output=self.subject.output,
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            plan.save(path)
        return ss1_compile.Plan.load(path).config

    def evaluate(self, model: nn.Module) -> float:
        """The figure that counts; the row is renewed.

        Raises:
            OutOfTime: the minutes are over.
        """
        found = {name: round(value, 4) for name, value in self.subject.figures(model).items()}
        minutes = (time.monotonic() - self.started) / 60
        point = {"step": self.due.pop(0), **found, "at_minute": round(minutes, 2)}
        self.row["points"].append(point)
        self.write(finished=False)
        print(point, flush=True)
        limit = self.arguments.minutes
        if limit is not None and minutes > limit and self.due:
            raise OutOfTime
        return next(iter(found.values()))

    def write(self, *, finished: bool) -> None:
        """Put the row in the place of an earlier one."""
        rows = [row for row in read_rows() if not same(row, self.row)]
        harness.write(NAME, {"rows": [*rows, {**self.row, "finished": finished}]})

    def heal(self) -> None:
        """The whole run."""
        arguments, subject = self.arguments, self.subject
        dense = {name: round(v, 4) for name, v in subject.figures(subject.dense).items()}
        self.row["dense"] = dense
        print({"dense": dense, "batches": len(subject.training)}, flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ss1_compile.SS1Warning)
            model = self.compressed()
        result = ss1_compile.heal(
            model,
            subject.dense,
            subject.training,
            steps=arguments.steps,
            block_steps=arguments.block_steps,
            seconds=arguments.budget,
            learning_rate=arguments.learning_rate,
            hidden_weight=arguments.hidden_weight,
            label_weight=arguments.label_weight,
            train=arguments.train,
            compile=arguments.compile,
            materialize=arguments.materialize,
            cuda_graphs=arguments.cuda_graphs,
            evaluate_every=self.every,
            save_every=max(1, self.every // 2),
            seed=arguments.seed,
            output=subject.output,
            metric=self.evaluate,
            directory=None if arguments.budget else self.directory,
            progress=False,
        )
        self.row["points"][-1]["step"] = result.steps
        self.row |= {"seconds": round(result.seconds, 1), "trained": result.trained}
        self.row["losses"] = [
            [entry["step"], round(entry["loss"], 4)]
            for entry in result.curve
            if entry["loss"] is not None
        ][:: max(1, len(result.curve) // 50)]
        self.write(finished=True)
        print({name: value for name, value in self.row.items() if name != "losses"})


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of the same run."""
    old = {
        "cuts": 1,
        "sampled": 0,
        "compile": False,
        "cuda_graphs": False,
        "materialize": False,
        "label_weight": 0.0,
        "alike": False,
        "budget": None,
    }  # of rows from before there were these
    return all({**old, **one}.get(name) == other[name] for name in ("model", *SETTINGS, "on"))


def read_rows() -> list[dict[str, Any]]:
    """The rows so far."""
    try:
        rows: list[dict[str, Any]] = harness.read(NAME)["rows"]
    except FileNotFoundError:
        return []
    return rows


def parse() -> argparse.Namespace:
    """The command line, with the defaults of the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SUBJECTS, default="minilm")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--reduction", type=float)
    parser.add_argument("--projection", choices=("learned", "calibrated"), default="learned")
    parser.add_argument("--plan", action="store_true", help="planned c's of equal cost")
    parser.add_argument("--alike", action="store_true", help="all outputs of a layer weigh alike")
    parser.add_argument("--one-shot", dest="sequential", action="store_false")
    parser.add_argument("--train", choices=("ss1", "all"), default="ss1")
    parser.add_argument("--texts", type=int, help="train on so many at most")
    parser.add_argument(
        "--more", type=Path, nargs="+", default=[], help="text or HTML to train on, too"
    )
    parser.add_argument("--cuts", type=int, default=1, help="cut the articles so often")
    parser.add_argument("--sampled", type=int, default=0, help="windows of text to sample, too")
    parser.add_argument("--compile", action="store_true", help="torch.compile the steps")
    parser.add_argument("--materialize", action="store_true", help="train with dense weights")
    parser.add_argument("--cuda-graphs", action="store_true", help="record the steps")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--block-steps", type=int, default=0)
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden-weight", type=float, default=1.0)
    parser.add_argument("--label-weight", type=float, default=0.0)
    parser.add_argument("--seconds", dest="budget", type=float, help="of training; sets the steps")
    parser.add_argument("--every", type=int, default=1000, help="steps between evaluations, then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="end at the first evaluation after so long")
    parser.add_argument("--directory", type=Path, default=Path("out/healing"))
    arguments = parser.parse_args()
    for name, value in DEFAULTS[arguments.model].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main() -> None:
    """Measure one row."""
    arguments = parse()
    torch.manual_seed(arguments.seed)
    options = Options(
        texts=arguments.texts,
        batch=arguments.batch,
        seed=arguments.seed,
        more=read_texts(arguments.more),
        cuts=arguments.cuts,
        sampled=arguments.sampled,
        directory=arguments.directory,
    )
    subject = SUBJECTS[arguments.model](arguments.device, options)
    try:
        Run(subject, arguments).heal()
    except OutOfTime:
        print("out of time; the same command goes on here")


if __name__ == "__main__":
    main()
