"""What quantising z costs a pretrained model on top of SS1, on text it has not seen.

    python benchmarks/quantized_accuracy.py [--model minilm|smollm2] [--device cuda]
                                            [--projections calibrated learned] [--reductions 2 4]
                                            [--minutes 8]
    python benchmarks/render_quantization.py      # docs/quantization.md

Each model is compressed once (one-shot calibration, no fine-tuning), copied, and quantised by
``ss1_compile.quantize`` in every form and rounding, which sees the calibration text again, through
the compressed model. ``change`` is the relative difference of the model's output
from the unquantised SS1 model's; ``error`` that of either from the dense model's; ``added`` what
quantisation adds to the latter, ``error / error of SS1 - 1``. Also per layer, on MiniLM: what SS1,
quantisation and both cost (``ss1_compile.sensitivity``).

Finished rows are appended to ``benchmarks/results/quantized_accuracy.json``; a run leaves out those
that are there, and with ``--minutes`` begins no further one after so long. With other `--documents`
than before a model's rows are measured anew.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
import warnings
from dataclasses import asdict
from typing import Any

import harness
import torch
from quality_models import MODELS, Subject
from torch import Tensor, nn

import ss1_compile
from ss1_compile import SS1Warning

NAME = "quantized_accuracy"
METHODS = ("int8_weight_only", "int8_dynamic")
FLOAT8 = ("fp8_dynamic",)
"""On a GPU only: the CPU widens it, slowly."""
ROUNDINGS = ("nearest", "calibrated")


class Outputs:
    """Outputs on the evaluation batches, and their distances."""

    def __init__(self, subject: Subject) -> None:
        self.batches = list(subject.unpadded_evaluation())

    @torch.no_grad()
    def of(self, model: nn.Module) -> list[Tensor]:
        """Hidden states or logits, whichever the model returns first."""
        return [model(**batch)[0].float() for batch in self.batches]

    @staticmethod
    def distance(a: list[Tensor], b: list[Tensor]) -> float:
        """``‖a - b‖ / ‖b‖`` over all batches."""
        lost = sum((x - y).double().square().sum() for x, y in zip(a, b, strict=True))
        whole = sum(y.double().square().sum() for y in b)
        return float((lost / whole) ** 0.5)  # type: ignore[operator]

    @staticmethod
    def cosine(a: list[Tensor], b: list[Tensor]) -> float:
        """Mean cosine of the rows."""
        cosines = [
            torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in zip(a, b, strict=True)
        ]
        return float(torch.cat(cosines).mean())


def measure(
    subject: Subject, results: dict[str, Any], arguments: argparse.Namespace, started: float
) -> None:
    """Append the missing rows."""
    reductions = arguments.reductions or subject.reductions
    outputs = Outputs(subject)
    dense = outputs.of(subject.model)
    calibration = subject.calibration(0)
    statistics = ss1_compile.calibrate(
        subject.model, calibration, weigh_outputs="learned" in arguments.projections, progress=False
    )
    on = torch.cuda.get_device_name() if subject.device.type == "cuda" else "CPU"
    have = {
        (r["model"], r["projection"], r["c"], r["form"], r["rounding"]) for r in results["rows"]
    }
    for projection, c in itertools.product(arguments.projections, reductions):
        methods = METHODS + FLOAT8 * (subject.device.type == "cuda")
        wanted = [(None, None), *itertools.product(methods, ROUNDINGS)]
        if all((subject.name, projection, c, *form) in have for form in wanted):
            continue
        if late(started, arguments.minutes):
            return
        base = copy.deepcopy(subject.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SS1Warning)
            ss1_compile.compress(
                base,
                reduction=int(c) if c == int(c) else c,
                projection=projection,
                exclude=subject.exclude,
                calibration=statistics,
                progress=False,
            )
        plain = outputs.of(base)
        own = outputs.distance(plain, dense)
        for form, rounding in wanted:
            if (subject.name, projection, c, form, rounding) in have:
                continue
            if late(started, arguments.minutes):
                return
            model, added = base, None
            if form is not None:
                model = copy.deepcopy(base)
                report = ss1_compile.quantize(
                    model,
                    quantization=form,
                    rounding=rounding,
                    calibration=calibration,
                )
                errors = [row.quantization_error or 0.0 for row in report]
                added = sum(errors) / len(errors)
            found = outputs.of(model)
            row = {
                "model": subject.name,
                "projection": projection,
                "c": c,
                "form": form,
                "rounding": rounding,
                "layer_change": None if added is None else round(added, 5),
                "change": round(outputs.distance(found, plain), 5),
                "cosine_to_ss1": round(outputs.cosine(found, plain), 6),
                "error": round(outputs.distance(found, dense), 5),
                "added": round(outputs.distance(found, dense) / own - 1, 5),
                **{k: round(v, 5) for k, v in subject.evaluate(model).items()},
                "on": on,
            }
            results["rows"].append(row)
            harness.write(NAME, results)
            print(row, flush=True)


def late(started: float, minutes: float | None) -> bool:
    """Whether the minutes are over, which it says."""
    over = minutes is not None and time.monotonic() - started > 60 * minutes
    if over:
        print("out of time; the next run goes on here")
    return over


def sensitivities(subject: Subject, results: dict[str, Any]) -> None:
    """The rows of the first and the last block, at c = 4."""
    if results.get("layers"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SS1Warning)
        found = ss1_compile.sensitivity(
            subject.model,
            subject.calibration(0),
            inputs=list(subject.unpadded_evaluation()),
            include=("*layer.0.*", "*layer.5.*"),
            reduction=4,
            projection="calibrated",
            quantization="int8_dynamic",
        )
    results["layers"] = [
        {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(layer).items()}
        for layer in found.layers
    ]
    harness.write(NAME, results)
    print(found)


def main() -> None:
    """Measure, and write as it goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), default="minilm")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--documents", type=int, default=None, help="calibration documents")
    parser.add_argument("--projections", nargs="+", default=["calibrated", "learned"])
    parser.add_argument("--reductions", nargs="+", type=float, default=None)
    parser.add_argument("--minutes", type=float, help="begin no further row after so long")
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.manual_seed(0)
    try:
        results = harness.read(NAME)
    except FileNotFoundError:
        results = {"rows": [], "layers": []}
    subject = MODELS[arguments.model](arguments.device, arguments.documents)
    run = {"torch": torch.__version__, "calibration_tokens": subject.tokens(subject.calibration(0))}
    earlier = results.setdefault(f"{arguments.model}_run", run)
    if earlier["calibration_tokens"] != run["calibration_tokens"]:  # of other statistics
        results["rows"] = [row for row in results["rows"] if row["model"] != subject.name]
        results["layers"] = [] if arguments.model == "minilm" else results["layers"]
    results[f"{arguments.model}_run"] = run
    if arguments.model == "minilm":
        sensitivities(subject, results)
    measure(subject, results, arguments, started)


if __name__ == "__main__":
    main()
