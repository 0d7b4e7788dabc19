"""``ss1 inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ss1_cli.common import one_line_errors

if TYPE_CHECKING:
    from ss1_compile.serialization.layer import SavedLayer


def inspect(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="What ss1_compile.save or ss1 compress wrote.")],
) -> None:
    """Show the layers of a saved model, without loading its tensors."""
    from ss1_compile.serialization.checkpoint import TENSORS_FILE, read_config

    with one_line_errors(context):
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
            _reduction(layer),
            str(layer.num_hashes),
            f"{layer.features_per_group} → {layer.slots_per_group}",
            layer.dtype + f", {layer.quantization}" * bool(layer.quantization),
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


def _reduction(layer: SavedLayer) -> str:
    """c; of a learned sketch, the numbers of the dense weight over those stored in its place."""
    if layer.reduction is not None:
        return str(layer.reduction)
    slots = -(-layer.in_features // layer.features_per_group) * layer.slots_per_group
    z = (layer.experts or 1) * layer.out_features
    blocks = layer.num_hashes * layer.features_per_group
    return f"{z * layer.in_features / (slots * (z + blocks)):.3g}"


def _layer_bytes(layer: SavedLayer) -> tuple[int, int]:
    """Bytes of the dense weight and bias, and of z, its scales, bias and sketch."""
    supergroups = -(-layer.in_features // layer.features_per_group)
    experts = layer.experts or 1
    element = {"float64": 8, "float32": 4}.get(layer.dtype, 2)
    bias = layer.out_features if layer.bias else 0
    dense = element * (experts * layer.out_features * layer.in_features + bias)
    slots = supergroups * layer.slots_per_group
    stored = layer.z_dtype.itemsize * experts * layer.out_features * slots + element * bias
    stored += 4 * layer.out_features * (layer.quantization_groups or 0)
    if layer.reduction is None:
        sketch = element * layer.num_hashes * slots * layer.features_per_group
    else:
        sketch = 4 * layer.num_hashes * supergroups * layer.reduction
    return dense, stored + sketch
