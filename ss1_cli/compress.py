"""``ss1 compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ss1_cli.common import (
    BatchSize,
    Device,
    DryRun,
    Exclude,
    GroupSizeOfZ,
    Include,
    MaxTokens,
    Model,
    OptionalData,
    Quantization,
    Rounding,
    Samples,
    config_of,
    one_line_errors,
    out,
    overrides_of,
    quantization_of,
)


def compress(
    context: typer.Context,
    model: Model,
    out_dir: Annotated[Path, typer.Argument(help="Where the compressed model goes.")],
    reduction: Annotated[
        float, typer.Option("--reduction", "-c", help="c: parameters and work fall by it.")
    ] = 4,
    plan: Annotated[
        Path | None, typer.Option(help="What ss1 plan wrote: a reduction for every layer.")
    ] = None,
    projection: Annotated[
        str | None,
        typer.Option(help="average, calibrated or learned (the best for a pretrained model)."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Features per block of a learned sketch.")
    ] = None,
    calibration: OptionalData = None,
    samples: Samples = 512,
    max_tokens: MaxTokens = 128,
    batch_size: BatchSize = 16,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Calibrate layer by layer: slower, better.")
    ] = False,
    include: Include = None,
    exclude: Exclude = None,
    override: Annotated[
        list[str] | None, typer.Option(help="PATTERN=C or PATTERN=dense; repeatable.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Keep layers with a larger relative error dense.")
    ] = None,
    quantization: Quantization = None,
    quantization_group_size: GroupSizeOfZ = None,
    rounding: Rounding = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Compress a model. Without --calibration weights are averaged, as in the paper."""
    with one_line_errors(context):
        import ss1_compile
        from ss1_compile._huggingface import compress_directory

        quantized = quantization_of(quantization, quantization_group_size, rounding)
        if plan is None:
            config = config_of(
                include,
                exclude,
                projection,
                reduction=int(reduction) if reduction.is_integer() else reduction,
                group_size=group_size,
                overrides=overrides_of(override or []),
                max_error=max_error,
                **quantized,
            )
        else:
            given = (projection, group_size, include, exclude, override, max_error)
            if quantized or any(value is not None for value in given):
                raise ss1_compile.ConfigError(
                    "--plan has the whole configuration; give its options to ss1 plan"
                )
            config = ss1_compile.Plan.load(plan).config
        report, recipe = compress_directory(
            model,
            None if dry_run else out_dir,
            config,
            calibration=calibration,
            texts=samples,
            max_tokens=max_tokens,
            batch_size=batch_size,
            sequential=sequential,
            device=device,
        )
    out(report)
    if dry_run:
        out("dry run: nothing was written")
    else:
        out(f"wrote {out_dir}; load it with\n\n{recipe}")
