"""``ss1 heal``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ss1_cli.common import (
    BatchSize,
    Compressed,
    Device,
    DryRun,
    GroupSizeOfZ,
    MaxTokens,
    Model,
    OptionalData,
    Quantization,
    Rounding,
    Samples,
    one_line_errors,
    out,
    quantization_of,
    waiting,
)


def heal(
    context: typer.Context,
    model: Model,
    compressed: Compressed,
    out_dir: Annotated[Path, typer.Argument(help="Where the healed model goes.")],
    data: OptionalData = None,
    sampled: Annotated[
        int,
        typer.Option(min=0, help="Texts that the dense language model samples, beside --data."),
    ] = 0,
    held_out: OptionalData = None,
    metric: Annotated[str, typer.Option(help="cosine or perplexity, of --held-out.")] = "cosine",
    evaluate_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between evaluations of --held-out: of --steps an eighth."),
    ] = None,
    keep_best: Annotated[
        bool, typer.Option("--keep-best", help="End with the parameters of the best evaluation.")
    ] = False,
    steps: Annotated[int, typer.Option(min=0, help="End-to-end steps.")] = 400,
    seconds: Annotated[
        float | None, typer.Option(help="Train for so long in place of --steps.")
    ] = None,
    block_steps: Annotated[int, typer.Option(min=0, help="Steps block by block, first.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, the greatest.")] = 1e-3,
    label_weight: Annotated[
        float, typer.Option(help="Of the text's own next tokens, for language models.")
    ] = 0.0,
    state: Annotated[
        Path | None, typer.Option(help="Directory for the state of the run, to resume from.")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations: less memory.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile; pays on CUDA.")
    ] = False,
    materialize: Annotated[
        bool,
        typer.Option("--materialize", help="Train with dense weights, made once a step."),
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Record the steps; pays for small models on CUDA.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the batches.")] = 0,
    samples: Samples = 8192,
    max_tokens: MaxTokens = 128,
    batch_size: BatchSize = 16,
    quantization: Quantization = None,
    quantization_group_size: GroupSizeOfZ = None,
    rounding: Rounding = None,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Distil the dense MODEL into the COMPRESSED one; --quantization quantises it afterwards."""
    with one_line_errors(context):
        from dataclasses import replace

        import ss1_compile
        from ss1_compile.data_files import load_batches
        from ss1_compile.errors import ConfigError
        from ss1_compile.healing.prepare import check_trainable
        from ss1_compile.model_sources import check_target, load_compressed, load_model
        from ss1_compile.serialization.checkpoint import read_config

        if data is None and not sampled:
            raise ConfigError("there is nothing to heal with; give --data or --sampled, or both")
        sizes = {"samples": samples, "batch_size": batch_size, "max_tokens": max_tokens}
        eighth = 0 if seconds else max(1, (steps + block_steps) // 8)
        config = ss1_compile.HealConfig(
            steps=steps,
            seconds=seconds,
            block_steps=block_steps,
            learning_rate=learning_rate,
            label_weight=label_weight,
            gradient_checkpointing=checkpointing,
            compile=compile,
            materialize=materialize,
            cuda_graphs=cuda_graphs,
            keep_best=keep_best,
            seed=seed,
            evaluate_every=0 if held_out is None else evaluate_every or eighth,
        )
        quantized = quantization_of(quantization, quantization_group_size, rounding)
        saved = read_config(compressed).config
        if quantized:
            saved = replace(saved or ss1_compile.SS1Config(), **quantized)
        if not dry_run:
            check_target(out_dir)
        with waiting(f"loading {model} and {compressed}"):
            loaded = load_model(model, device)
            dense = loaded.model
            student = load_compressed(compressed, loaded)
            check_trainable(student)
            batches = [] if data is None else load_batches(data, loaded, **sizes)
            unseen = None if held_out is None else load_batches(held_out, loaded, **sizes)
        if dry_run:
            length = f"{steps + block_steps} steps"
            if seconds is not None:
                length = f"{block_steps} steps and {seconds:g} s"
            texts = f" and {sampled} texts that it samples" if sampled else ""
            out(
                f"dry run: would train {length} of {batch_size} on "
                f"{len(batches)} batches{texts}; nothing was written"
            )
            return
        if sampled:
            with waiting(f"sampling {sampled} texts of {max_tokens} tokens"):
                own = ss1_compile.sample_texts(
                    dense, sampled, max_tokens, batch=batch_size, seed=seed
                )
            batches = [*batches, *own]
        result = ss1_compile.heal(
            student, dense, batches, config, held_out=unseen, metric=metric, directory=state
        )
        report = None
        if quantized:
            report = ss1_compile.quantize(student, saved, batches)
        loaded.model = student
        loaded.save_compressed(out_dir, saved)
    out(result)
    if report is not None:
        out(report)
    out(f"wrote {out_dir}; load it with\n\n{loaded.recipe(out_dir)}")
