"""What the commands share: options, the console, errors on one line, waiting with a spinner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ss1_compile.config import SS1Config

Model = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face directory, a .safetensors file with a config.json beside it, or "
        "module:factory."
    ),
]
Compressed = Annotated[Path, typer.Argument(help="What ss1 compress wrote.")]
Data = Annotated[
    Path,
    typer.Option(
        help="Text (one per line), JSONL with a field 'text', tensors (.npz, .safetensors), or a "
        "folder of images."
    ),
]
OptionalData = Annotated[
    Path | None,
    typer.Option(
        help="Text (one per line), JSONL with a field 'text', tensors (.npz, .safetensors), or a "
        "folder of images."
    ),
]
Samples = Annotated[
    int, typer.Option("--samples", "--texts", min=1, help="Samples of the data to use.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens per text.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per batch.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Include = Annotated[list[str] | None, typer.Option(help="Pattern of layers; repeatable.")]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Pattern of layers to keep dense; repeatable.")
]
Quantization = Annotated[
    str | None,
    typer.Option(help="int8_weight_only, int8_dynamic or fp8_dynamic; default: none."),
]
GroupSizeOfZ = Annotated[
    int | None,
    typer.Option(
        "--quantization-group-size",
        help="Slots of a row that share a scale (int8_weight_only); default: the whole row.",
    ),
]
Rounding = Annotated[
    str | None,
    typer.Option(
        help="Of the quantised weights: nearest, or calibrated (moves the layers' outputs least)."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, write nothing.")]


@contextlib.contextmanager
def one_line_errors(context: typer.Context) -> Iterator[None]:
    """Turn every ``SS1Error`` into one line on stderr and exit code 2, unless ``--debug`` is on."""
    from ss1_compile.errors import SS1Error

    try:
        yield
    except SS1Error as error:
        if context.obj:
            raise
        Console(stderr=True, soft_wrap=True).print(
            f"ss1: {type(error).__name__}: {error}", style="red", markup=False, highlight=False
        )
        raise typer.Exit(2) from error


def waiting(what: str) -> contextlib.AbstractContextManager[Any]:
    """A spinner on stderr for what has no measurable progress; nothing off a terminal."""
    return Console(stderr=True).status(what)


def out(text: object) -> None:
    """Print a table, or text as it is."""
    plain = isinstance(text, str)
    Console().print(text, highlight=not plain, markup=not plain, soft_wrap=plain)


def overrides_of(entries: list[str]) -> dict[str, float | None]:
    """``PATTERN=C`` or ``PATTERN=dense`` as the mapping of ``SS1Config``."""
    from ss1_compile.errors import ConfigError

    overrides: dict[str, float | None] = {}
    for entry in entries:
        pattern, equals, value = entry.rpartition("=")
        number = None if value == "dense" else positive(value)
        if not equals or not pattern or not (value == "dense" or number):
            raise ConfigError(f"--override must be PATTERN=C or PATTERN=dense, got {entry!r}")
        overrides[pattern] = number
    return overrides


def positive(text: str) -> float | None:
    """A whole number as an integer, another as it is; ``None`` for what is no positive number."""
    try:
        value = float(text)
    except ValueError:
        return None
    if not value > 0:
        return None
    return int(value) if value.is_integer() else value


def reductions_of(text: str, option: str) -> list[float]:
    """Reductions as ``1,2,4``."""
    from ss1_compile.errors import ConfigError

    found = [positive(part.strip()) for part in text.split(",")]
    if not found or None in found:
        raise ConfigError(f"{option} must be numbers such as 1,2,4; got {text!r}")
    return [value for value in found if value is not None]


def config_of(
    include: list[str] | None, exclude: list[str] | None, projection: str | None, **options: Any
) -> SS1Config:
    """The configuration of the options that several commands have."""
    from ss1_compile.config import SS1Config

    values = {"include": tuple(include or ("*",)), "exclude": tuple(exclude or ()), **options}
    return SS1Config.from_dict({**values, "projection": projection})


def quantization_of(
    quantization: str | None, group_size: int | None, rounding: str | None
) -> dict[str, Any]:
    """The fields of ``SS1Config`` for the three options.

    Raises:
        ConfigError: one of the others without ``--quantization``.
    """
    from ss1_compile.errors import ConfigError

    if quantization is None:
        given = {"--quantization-group-size": group_size, "--rounding": rounding}
        for option, value in given.items():
            if value is not None:
                raise ConfigError(f"{option} {value} needs --quantization, int8_weight_only say")
        return {}
    return {
        "quantization": quantization,
        "quantization_group_size": group_size,
        "rounding": rounding or "nearest",
    }
