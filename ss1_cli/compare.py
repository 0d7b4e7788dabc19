"""``ss1 compare``."""

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


def compare(
    context: typer.Context,
    model: Model,
    compressed: Compressed,
    data: Data,
    metric: Annotated[str, typer.Option(help="cosine or perplexity.")] = "cosine",
    json: Annotated[Path | None, typer.Option(help="Also write the layers' rows here.")] = None,
    samples: Samples = 64,
    max_tokens: MaxTokens = 128,
    batch_size: BatchSize = 16,
    device: Device = "cpu",
) -> None:
    """Show where the accuracy went, layer by layer, against the dense model."""
    with one_line_errors(context):
        import ss1_compile
        from ss1_compile.data_files import load_batches
        from ss1_compile.evaluation import Evaluation
        from ss1_compile.model_sources import load_compressed, load_model

        with waiting(f"loading {model} and {compressed}"):
            loaded = load_model(model, device)
            made = load_compressed(compressed, loaded)
            batches = load_batches(
                data, loaded, samples=samples, batch_size=batch_size, max_tokens=max_tokens
            )
        figure = Evaluation(metric, loaded.model, batches)
        with waiting("comparing"):
            comparison = ss1_compile.compare(loaded.model, made, batches)
            before, after = figure(loaded.model), figure(made)
        if json is not None:
            json.write_text(comparison.to_json() + "\n", encoding="utf-8")
    out(comparison)
    out(f"{metric}: dense {before:.4f}, compressed {after:.4f}")
