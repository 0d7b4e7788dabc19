"""``ss1 bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ss1_cli.common import (
    BatchSize,
    Compressed,
    Data,
    Device,
    MaxTokens,
    Model,
    Samples,
    one_line_errors,
    out,
    waiting,
)


def bench(
    context: typer.Context,
    model: Model,
    compressed: Compressed,
    data: Data,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each model.")] = 10,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="torch.compile both: minutes for large models.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    samples: Samples = 16,
    max_tokens: MaxTokens = 128,
    batch_size: BatchSize = 16,
    device: Device = "cpu",
) -> None:
    """Time the dense and the compressed model on the same batches, in turns."""
    with one_line_errors(context):
        import json as encoder

        from rich.table import Table

        from ss1_compile.data_files import load_batches
        from ss1_compile.model_sources import load_compressed, load_model
        from ss1_compile.study.study import time_models

        with waiting(f"loading {model} and {compressed}"):
            loaded = load_model(model, device)
            models = {"dense": loaded.model, "ss1": load_compressed(compressed, loaded)}
            batches = load_batches(
                data, loaded, samples=samples, batch_size=batch_size, max_tokens=max_tokens
            )
        figures = time_models(models, batches, rounds=rounds, compiled=compiled)
        if json is not None:
            json.write_text(encoder.dumps(figures, indent=1) + "\n", encoding="utf-8")
    table = Table("model", "median ms", "least ms", "against dense")
    dense = figures["dense"]["median_ms"]
    for name, row in figures.items():
        cells = [f"{row[key]:.2f}" for key in ("median_ms", "least_ms")]
        table.add_row(name, *cells, f"{dense / row['median_ms']:.2f}×")
    out(table)
