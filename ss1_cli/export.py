"""``ss1 export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ss1_cli.common import one_line_errors, out, waiting


def export(
    context: typer.Context,
    program: Annotated[
        Path,
        typer.Argument(
            help="A compressed program that torch.export.save wrote (.pt2), or a directory that "
            "ss1 compress made of a Hugging Face model."
        ),
    ],
    onnx: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    form: Annotated[str, typer.Option(help="function, standard or custom.")] = "function",
    opset: Annotated[int, typer.Option(help="18 … 25.")] = 20,
    quantization: Annotated[
        str | None, typer.Option(help="int8_dynamic or int8_weight_only; default: none.")
    ] = None,
) -> None:
    """Export a compressed program or model to ONNX and check the file against PyTorch."""
    with one_line_errors(context):
        from ss1_compile.onnx.directory import export_path

        with waiting(f"exporting {program}"):
            report = export_path(program, onnx, form=form, opset=opset, quantization=quantization)
    out(str(report))
