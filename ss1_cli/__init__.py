"""The command ``ss1``: ``compress``, ``plan``, ``heal``, ``compare``, ``report`` and more.

A package of its own, because importing anything of :mod:`ss1_compile` imports torch, which takes
seconds: here a command imports what it needs when it runs, and ``ss1 --help`` needs nothing.

Exit codes: 0 done, 1 an unforeseen error (a traceback), 2 a :class:`SS1Error` or wrong usage, with
one line on stderr; ``--debug`` shows the traceback of those, too.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ss1_cli import (
    bench,
    compare,
    compress,
    demo,
    export,
    heal,
    inspect,
    plan,
    report,
)

app = typer.Typer(
    name="ss1",
    help="Compress the linear layers of PyTorch models to SS1 (sketch structured transforms).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _command in (
    compress.compress,
    plan.plan,
    heal.heal,
    compare.compare,
    report.report,
    bench.bench,
    export.export,
    inspect.inspect,
    demo.demo,
):
    app.command()(_command)


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
