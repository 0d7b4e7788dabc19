"""``ss1 plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ss1_cli.common import (
    BatchSize,
    Data,
    Device,
    DryRun,
    Exclude,
    GroupSizeOfZ,
    Include,
    MaxTokens,
    Model,
    Quantization,
    Rounding,
    Samples,
    config_of,
    one_line_errors,
    out,
    quantization_of,
    reductions_of,
    waiting,
)


def plan(
    context: typer.Context,
    model: Model,
    calibration: Data,
    output: Annotated[Path, typer.Option(help="The plan to write, JSON.")] = Path("plan.json"),
    target: Annotated[
        str,
        typer.Option(
            help="'50%' of the linear parameters, 'latency <= 60%', 'latency <= 3 ms', "
            "'cosine >= 0.98', 'perplexity <= +3%'."
        ),
    ] = "50%",
    choices: Annotated[
        str | None, typer.Option(help="Reductions to choose among, such as 1,2,4.")
    ] = None,
    projection: Annotated[str, typer.Option(help="average, calibrated or learned.")] = "learned",
    cost: Annotated[str | None, typer.Option(help="parameters or latency.")] = None,
    samples: Samples = 512,
    max_tokens: MaxTokens = 128,
    batch_size: BatchSize = 16,
    include: Include = None,
    exclude: Exclude = None,
    quantization: Quantization = None,
    quantization_group_size: GroupSizeOfZ = None,
    rounding: Rounding = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Choose a reduction for every layer, for a budget or a quality."""
    with one_line_errors(context):
        import ss1_compile
        from ss1_compile.data_files import load_batches
        from ss1_compile.model_sources import load_model
        from ss1_compile.planning.planner import CHOICES
        from ss1_compile.planning.target import Target

        Target.parse(target)
        quantized = quantization_of(quantization, quantization_group_size, rounding)
        config = config_of(include, exclude, projection, **quantized)
        among = CHOICES if choices is None else reductions_of(choices, "--choices")
        with waiting(f"loading {model}"):
            loaded = load_model(model, device)
            batches = load_batches(
                calibration, loaded, samples=samples, batch_size=batch_size, max_tokens=max_tokens
            )
        made = ss1_compile.plan(
            loaded.model,
            batches,
            target,
            cost=cost,  # type: ignore[arg-type]
            choices=among,
            config=config,
        )
        if not dry_run:
            made.save(output)
    out(made)
    if dry_run:
        out("dry run: nothing was written")
    else:
        out(f"wrote {output}; use it with: ss1 compress {model} OUT_DIR --plan {output} ...")
