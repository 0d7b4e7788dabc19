"""``Report``: what happened to every linear layer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, RichCast
from rich.markup import escape
from rich.table import Table

from ss1_compile.errors import NothingToCompressError, SS1Warning

if TYPE_CHECKING:
    import pandas as pd

    from ss1_compile.config import SS1Config

EXACT_ERROR = 1e-6
"""Relative error under which a projection lost nothing: the weight already had the structure."""


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Attributes:
        name: qualified name of the module or weight.
        op: what it was, e.g. ``"Linear"``, ``"Conv1D"``, ``"aten.addmm"``.
        shape: ``(N, K)`` of the dense weight; ``None`` if it has none (a matmul of activations).
        bytes_before: bytes of the dense weight and bias.
        bytes_after: bytes that take their place; ``bytes_before`` if left dense.
        reduction: c, or ``None`` if left dense.
        error: relative projection error, or ``None`` if none was measured.
        error_of: what the error is relative to: ``"output"`` with input statistics, else
            ``"weight"``.
        projection: the method that made z.
        quantization: how z is quantised, as in :class:`ss1_compile.SS1Config`, or ``None``.
        bits: of a value of z; ``None`` if left dense. ``bytes_after`` counts the scales too.
        quantization_error: relative error that quantising z adds, of the output or the weight as
            ``error_of`` says, relative to the SS1 layer before; quantised activations come on top.
        reason: why the layer was left dense; ``None`` if it was compressed.
        lowering: the kernels that will run it on its GPU at the compiled number of rows; ``None``
            on the CPU, and where the rows are not known.
        speedup: what that is expected to gain over the dense layer (1 is as fast), from the table
            measured on that GPU, else from a cost model.
        fused: what the compiled graph computes in the layer's kernels: what makes its input
            (``"norm"``, ``"gated silu"``), what follows it (``"residual"``), which layers it
            shares a sketch with (``"shared with k, v"``), and which layer's sketch its product is
            computed with or the other way round (``"joined with down"``).
    """

    name: str
    op: str
    shape: tuple[int, int] | None
    bytes_before: int
    bytes_after: int
    reduction: float | None = None
    error: float | None = None
    error_of: Literal["output", "weight"] | None = None
    projection: str | None = None
    quantization: str | None = None
    bits: int | None = None
    quantization_error: float | None = None
    reason: str | None = None
    lowering: str | None = None
    speedup: float | None = None
    fused: tuple[str, ...] = ()

    @property
    def compressed(self) -> bool:
        """Whether the layer is SS1 now."""
        return self.reason is None

    @property
    def exact(self) -> bool:
        """Whether the projection lost nothing but rounding."""
        return self.error is not None and self.error <= EXACT_ERROR


@dataclass
class Report:
    """A row per linear layer, in model order. ``print(report)`` shows the table.

    Attributes:
        layers: the rows.
        notes: what concerns all of them, shown under the table.
    """

    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        """The row of the layer called ``name``.

        Raises:
            KeyError: there is no such row.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def record(self, layer: LayerReport) -> None:
        """Add a row; one of the same name, operation and shape (a recompilation) is replaced.

        After a graph break names are relative to the module whose call was compiled, so that layers
        of different stages may have the same one. A layer that the backend leaves dense keeps the
        row that :func:`ss1_compile.compress` gave it.
        """
        for i, known in enumerate(self.layers):
            if not layer.compressed and (known.name, known.shape) == (layer.name, layer.shape):
                if known.op == layer.op:
                    self.layers[i] = layer
                return
            if (known.name, known.op, known.shape) == (layer.name, layer.op, layer.shape):
                self.layers[i] = layer
                return
        self.layers.append(layer)

    def note_fused(self, layers: Mapping[str, tuple[str, ...]]) -> None:
        """Note what was fused around the layers of these names; unknown names are left out."""
        for i, row in enumerate(self.layers):
            if row.compressed and row.name in layers:
                self.layers[i] = replace(row, fused=layers[row.name])

    @property
    def compressed(self) -> list[LayerReport]:
        """The layers that are SS1 now."""
        return [layer for layer in self.layers if layer.compressed]

    @property
    def left(self) -> list[LayerReport]:
        """The layers that stayed dense, each with its reason."""
        return [layer for layer in self.layers if not layer.compressed]

    @property
    def bytes_before(self) -> int:
        """Bytes of all listed linear layers before."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all listed linear layers after."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def mean_error(self) -> float | None:
        """Mean relative error of the compressed layers, ``None`` if none was measured."""
        errors = [layer.error for layer in self.compressed if layer.error is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def mean_quantization_error(self) -> float | None:
        """Mean relative error that quantising z adds, ``None`` if no layer is quantised."""
        found = (layer.quantization_error for layer in self.compressed)
        errors = [error for error in found if error is not None]
        return sum(errors) / len(errors) if errors else None

    def to_dict(self) -> dict[str, Any]:
        """Totals and rows as plain JSON values."""
        return {
            "compressed": len(self.compressed),
            "left": len(self.left),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "mean_error": self.mean_error,
            "mean_quantization_error": self.mean_quantization_error,
            "layers": [asdict(layer) for layer in self.layers],
            "notes": list(self.notes),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer.

        Raises:
            ImportError: pandas is not installed (extra ``report``).
        """
        import pandas as pd

        return pd.DataFrame([asdict(layer) for layer in self.layers])

    def __rich__(self) -> Table:
        table = Table(title=self.summary(), title_justify="left")
        for name in ("layer", "op", "weight", "c", "KiB", "error", "note"):
            right = name in ("weight", "c", "KiB", "error")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for layer in self.layers:
            shape = "×".join(map(str, layer.shape)) if layer.shape else ""
            size = f"{layer.bytes_before / 1024:.0f}"
            if layer.compressed:
                size += f" → {layer.bytes_after / 1024:.0f}"
            added = layer.quantization_error
            error = "" if layer.error is None else f"{layer.error:.3f}"
            error += "" if added is None else f" + {added:.3f}"
            error += f" ({layer.error_of})" if error else ""
            note = layer.reason or ("exact" if layer.exact else layer.projection or "")
            note += f", {layer.quantization}" if layer.quantization and layer.compressed else ""
            if layer.speedup is not None:
                note += f", {layer.lowering} {layer.speedup:.1f}×"
                note += " (slower than dense here)" if layer.speedup < 1 else ""
            c = f"{layer.reduction:.3g}" if layer.reduction else ""
            note += f"; fused: {', '.join(layer.fused)}" if layer.fused else ""
            # Patterns such as "layer.[0-3].*" in a reason would read as markup.
            cells = (layer.name, layer.op, shape, c, size, error, note)
            table.add_row(*(escape(cell) for cell in cells))
        if self.notes:
            table.caption, table.caption_justify = escape("\n".join(self.notes)), "left"
        return table

    def __str__(self) -> str:
        return render(self)

    def summary(self) -> str:
        """One line of totals."""
        after, before = self.bytes_after / 2**20, self.bytes_before / 2**20
        text = f"{len(self.compressed)} of {len(self.layers)} linear layers are SS1"
        if self.layers:
            text += f", {before:.2f} → {after:.2f} MiB"
        if self.mean_error is not None:
            text += f", mean relative error {self.mean_error:.3f}"
        if self.mean_quantization_error is not None:
            text += f", quantisation adds {self.mean_quantization_error:.3f}"
        return text

    def warn_if_ruined(self, threshold: float) -> None:
        """Warn once, naming the worst layers, if any projection error is above ``threshold``."""
        bad = [x for x in self.compressed if x.error is not None and x.error > threshold]
        if not bad:
            return
        bad.sort(key=lambda layer: -(layer.error or 0.0))
        worst = ", ".join(f"{x.name} {x.error:.2f} ({x.error_of})" for x in bad[:3])
        if any(layer.error_of == "weight" for layer in bad):
            mend = "calibrate (ss1_compile.calibrate, or calibration=...), use a smaller reduction"
        else:
            mend = "use a smaller reduction for them (overrides)"
        warnings.warn(
            f"{len(bad)} of {len(self.compressed)} projected layers lose more than {threshold:.0%} "
            f"(relative error; worst: {worst}). A pretrained model will not work like this: {mend},"
            f" fine-tune after compressing, or keep such layers dense with max_error=...",
            SS1Warning,
            stacklevel=3,
        )

    def require_some(self, config: SS1Config) -> None:
        """Raise :class:`NothingToCompressError` with the reasons if no layer was compressed."""
        if self.compressed or config.allow_empty:
            return
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in self.layers[:5])
        raise NothingToCompressError(
            "no linear layer was compressed "
            + (f"({reasons})" if reasons else "(the model has none)")
            + "; pass allow_empty=True if that is meant"
        )


def render(table: RichCast) -> str:
    """A rich table as plain text, 140 columns wide."""
    console = Console(width=140, no_color=True, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes held by the tensors, ``None`` entries skipped."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
