"""``ss1 demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ss1_cli.common import one_line_errors


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
    from ss1_compile.demo.main import DemoOptions, run_demo

    make = DemoOptions.quick if quick else DemoOptions
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    with one_line_errors(context):
        run_demo(make(output=output, threads=threads, sequential=sequential), console)
