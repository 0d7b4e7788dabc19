"""The command ``ss1``: ``demo``, ``inspect``, ``compress`` and ``export``.

Every :class:`SS1Error` becomes one line on stderr and exit code 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ss1_compile.errors import SS1Error

if TYPE_CHECKING:
    from ss1_compile.checkpoint import SavedLayer
    from ss1_compile.config import SS1Config

app = typer.Typer(
    name="ss1",
    help="Compress the linear layers of PyTorch models to SS1 (sketch structured transforms).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"ss1-compile {metadata.version('ss1-compile')}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options before the command."""
    context.obj = debug


@contextlib.contextmanager
def _one_line_errors(context: typer.Context) -> Iterator[None]:
    try:
        yield
    except SS1Error as error:
        if context.obj:
            raise
        Console(stderr=True, soft_wrap=True).print(
            f"ss1: {type(error).__name__}: {error}", style="red", markup=False, highlight=False
        )
        raise typer.Exit(2) from error


@app.command()
def demo(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(help="Directory for the figures, the plot and the saved model.")
    ] = Path("out"),
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer documents, c = 2 only.")] = False,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="Also calibrate sequentially; takes some minutes more."),
    ] = False,
) -> None:
    """Compress, check and time a pretrained sentence-embedding model, offline."""
    from ss1_compile.demo import DemoOptions, run_demo

    make = DemoOptions.quick if quick else DemoOptions
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    with _one_line_errors(context):
        run_demo(make(output=output, threads=threads, sequential=sequential), console)


@app.command()
def inspect(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="What ss1_compile.save or ss1 compress wrote.")],
) -> None:
    """Show the layers of a saved model, without loading its tensors."""
    from ss1_compile.checkpoint import TENSORS_FILE, read_config

    with _one_line_errors(context):
        saved = read_config(directory)
    table = Table(title=str(directory), title_justify="left")
    for column in ("layer", "weight", "sketch", "c", "J", "groups", "dtype", "bias", "KiB"):
        right = column in ("weight", "c", "J", "groups", "KiB")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    before = after = 0
    for name, layer in saved.layers.items():
        dense, compressed = _layer_bytes(layer)
        before, after = before + dense, after + compressed
        table.add_row(
            name,
            f"{layer.experts}×" * bool(layer.experts) + f"{layer.out_features}×{layer.in_features}",
            layer.kind,
            f"{dense / compressed:.3g}" if layer.reduction is None else str(layer.reduction),
            str(layer.num_hashes),
            f"{layer.features_per_group} → {layer.slots_per_group}",
            layer.dtype,
            "yes" if layer.bias else "no",
            f"{dense / 1024:.0f} → {compressed / 1024:.0f}",
        )
    console = Console()
    console.print(table)
    tensors = directory / TENSORS_FILE
    size = f"{tensors.stat().st_size / 2**20:.2f} MiB" if tensors.is_file() else "missing"
    console.print(
        f"{len(saved.layers)} SS1 layers, {before / 2**20:.2f} → {after / 2**20:.2f} MiB; "
        f"{TENSORS_FILE}: {size}; saved by ss1-compile {saved.package_version}",
        highlight=False,
    )
    if saved.config is not None:
        console.print(f"config: {saved.config.to_dict()}", highlight=False, markup=False)


@app.command()
def compress(
    context: typer.Context,
    model_dir: Annotated[Path, typer.Argument(help="A Hugging Face model directory.")],
    out_dir: Annotated[Path, typer.Argument(help="Where the compressed model goes.")],
    reduction: Annotated[
        float, typer.Option("--reduction", "-c", help="c: parameters and work fall by it.")
    ] = 4,
    projection: Annotated[
        str | None,
        typer.Option(help="average, calibrated or learned (the best for a pretrained model)."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Features per block of a learned sketch.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text: one per line, or JSONL with a field 'text'. Without it: average."),
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="Calibration texts to use.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per calibration text.")] = 128,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Calibrate layer by layer: slower, better.")
    ] = False,
    include: Annotated[
        list[str] | None, typer.Option(help="Pattern of layers to compress; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of layers to keep dense; repeatable.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="PATTERN=C or PATTERN=dense; repeatable.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Keep layers with a larger relative error dense.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the report and write nothing.")
    ] = False,
) -> None:
    """Compress a Hugging Face model directory."""
    from ss1_compile._huggingface import compress_directory
    from ss1_compile.config import SS1Config

    console = Console()
    with _one_line_errors(context):
        options: dict[str, Any] = {
            "reduction": int(reduction) if reduction.is_integer() else reduction,
            "projection": projection,
            "group_size": group_size,
            "include": tuple(include or ("*",)),
            "exclude": tuple(exclude or ()),
            "overrides": _overrides(override or []),
            "max_error": max_error,
        }
        config: SS1Config = SS1Config.from_dict(options)
        report, recipe = compress_directory(
            model_dir,
            None if dry_run else out_dir,
            config,
            calibration=calibration,
            texts=texts,
            max_tokens=max_tokens,
            sequential=sequential,
        )
    console.print(report)
    if dry_run:
        console.print("dry run: nothing was written")
    else:
        console.print(
            f"wrote {out_dir}; load it with\n\n{recipe}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


@app.command()
def export(
    context: typer.Context,
    program: Annotated[
        Path, typer.Argument(help="A compressed program that torch.export.save wrote (.pt2).")
    ],
    onnx: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    form: Annotated[str, typer.Option(help="function, standard or custom.")] = "function",
    opset: Annotated[int, typer.Option(help="18 … 25.")] = 20,
    quantization: Annotated[
        str | None, typer.Option(help="int8_dynamic or int8_weight_only; default: none.")
    ] = None,
) -> None:
    """Export a compressed program to ONNX and check the file against PyTorch."""
    with _one_line_errors(context):
        from ss1_compile.onnx.export import export_file

        report = export_file(program, onnx, form=form, opset=opset, quantization=quantization)
    Console().print(str(report), highlight=False, markup=False, soft_wrap=True)


def _layer_bytes(layer: SavedLayer) -> tuple[int, int]:
    """Bytes of the dense weight and bias, and of z, bias and sketch."""
    supergroups = -(-layer.in_features // layer.features_per_group)
    experts = layer.experts or 1
    element = {"float64": 8, "float32": 4}.get(layer.dtype, 2)
    bias = layer.out_features if layer.bias else 0
    dense = element * (experts * layer.out_features * layer.in_features + bias)
    slots = supergroups * layer.slots_per_group
    stored = element * (experts * layer.out_features * slots + bias)
    if layer.reduction is None:
        sketch = element * layer.num_hashes * slots * layer.features_per_group
    else:
        sketch = 4 * layer.num_hashes * supergroups * layer.reduction
    return dense, stored + sketch


def _overrides(entries: list[str]) -> dict[str, float | None]:
    """``PATTERN=C`` or ``PATTERN=dense`` as the mapping of :class:`SS1Config`."""
    from ss1_compile.errors import ConfigError

    overrides: dict[str, float | None] = {}
    for entry in entries:
        pattern, equals, value = entry.rpartition("=")
        number = None if value == "dense" else _number(value)
        if not equals or not pattern or not (value == "dense" or number):
            raise ConfigError(f"--override must be PATTERN=C or PATTERN=dense, got {entry!r}")
        overrides[pattern] = number
    return overrides


def _number(text: str) -> float | None:
    """A whole number as an integer, another as it is; ``None`` for what is no positive number."""
    try:
        value = float(text)
    except ValueError:
        return None
    if not value > 0:
        return None
    return int(value) if value.is_integer() else value
