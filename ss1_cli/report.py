"""``ss1 report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ss1_cli.common import (
    BatchSize,
    Data,
    Device,
    Exclude,
    Include,
    MaxTokens,
    Model,
    OptionalData,
    Samples,
    config_of,
    one_line_errors,
    out,
    reductions_of,
    waiting,
)


def report(
    context: typer.Context,
    model: Model,
    calibration: Data,
    output: Annotated[Path, typer.Option(help="The page; plots as PNG go beside it.")] = Path(
        "report.html"
    ),
    held_out: OptionalData = None,
    reductions: Annotated[str, typer.Option(help="Values of c.")] = "2,4",
    methods: Annotated[
        str, typer.Option(help="Of average, calibrated, learned and plan.")
    ] = "average,calibrated,learned,plan",
    metric: Annotated[str, typer.Option(help="cosine or perplexity.")] = "cosine",
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    samples: Samples = 256,
    max_tokens: MaxTokens = 128,
    batch_size: BatchSize = 16,
    include: Include = None,
    exclude: Exclude = None,
    device: Device = "cpu",
) -> None:
    """Compress MODEL in several ways and write one HTML page of size, latency and quality.

    Without --held-out every fourth batch of the calibration data is kept for measuring.
    """
    with one_line_errors(context):
        from ss1_compile.data_files import load_batches
        from ss1_compile.errors import CalibrationError
        from ss1_compile.model_sources import load_model
        from ss1_compile.study.page import write_page
        from ss1_compile.study.study import study

        sizes = {"samples": samples, "batch_size": batch_size, "max_tokens": max_tokens}
        config = config_of(include, exclude, None)
        among = reductions_of(reductions, "--reductions")
        with waiting(f"loading {model}"):
            loaded = load_model(model, device)
            batches = load_batches(calibration, loaded, **sizes)
            unseen = batches[3::4] if held_out is None else load_batches(held_out, loaded, **sizes)
        if held_out is None:
            batches = [batch for i, batch in enumerate(batches) if i % 4 != 3]
        if not unseen:
            raise CalibrationError(
                f"{calibration} makes {len(batches)} batches of {batch_size}, and four are needed "
                f"to hold one out; use a smaller --batch-size, or --held-out"
            )
        made = study(
            loaded.model,
            batches,
            unseen,
            title=Path(model).name,
            reductions=among,
            methods=[method.strip() for method in methods.split(",")],
            metric=metric,
            config=config,
        )
        with waiting("drawing"):
            written = write_page(made, output)
        if json is not None:
            import json as encoder

            json.write_text(encoder.dumps(made.to_dict(), indent=1) + "\n", encoding="utf-8")
    for point in made.points:
        out(
            f"{point.label:<22} {point.model_bytes / 2**20:8.2f} MiB {point.latency_ms:9.1f} ms  "
            f"{made.metric} {point.quality:.4f}"
        )
    out(f"wrote {', '.join(map(str, written))}")
