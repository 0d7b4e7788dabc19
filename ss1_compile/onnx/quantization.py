"""Int8 z in ONNX: how it is rounded, and the arithmetic of the quantised operators in PyTorch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ss1_compile.config import Quantization
from ss1_compile.errors import ConfigError, QuantizationError
from ss1_compile.kernels import portable
from ss1_compile.kernels.layout import block_n
from ss1_compile.onnx.layers import (
    EIGHT_BITS,
    SEVEN_BITS,
    add_initializer,
    constant,
    copy_output,
    drop_unused,
    layer_name,
    ss1_nodes,
)
from ss1_compile.onnx.operators import DOMAIN, VERSION

__all__ = [
    "EIGHT_BITS",
    "SEVEN_BITS",
    "check_quantization",
    "emulate",
    "quantize",
    "round_rows",
]

_QUANTIZATIONS = (None, "int8_weight_only", "int8_dynamic")


def check_quantization(quantization: object) -> None:
    """Raise :class:`ConfigError` unless it is ``None`` or one of the int8 variants."""
    if quantization not in _QUANTIZATIONS:
        raise ConfigError(
            f"quantization must be one of {list(_QUANTIZATIONS)}, got {quantization!r}"
        )


def round_rows(
    z: np.ndarray[tuple[int, ...], np.dtype[np.float32]], levels: int
) -> tuple[
    np.ndarray[tuple[int, ...], np.dtype[np.int8]],
    np.ndarray[tuple[int, ...], np.dtype[np.float32]],
]:
    """``(q int8 [N, K_c], scale float32 [N, 1])`` with ``z ≈ q · scale``, ``|q| ≤ levels``.

    Round to nearest even. An all-zero row has scale 1.
    """
    peak = np.abs(z).max(axis=1, keepdims=True)
    scale = np.where(peak > 0, peak / np.float32(levels), 1).astype(np.float32)
    return np.clip(np.rint(z / scale), -levels, levels).astype(np.int8), scale


def quantize(model: ir.Model, quantization: Quantization, levels: int) -> None:
    """Replace floating Z by int8 in ``[-levels, levels]`` with a float32 scale per row, in place.

    Layers that are int8 already stay as they are.

    Raises:
        QuantizationError: a Z is not finite.
    """
    for node, operator in list(ss1_nodes(model)):
        if operator.quantization is not None:
            continue
        name = layer_name(node, operator)
        z = constant(node, operator, "Z").numpy().astype(np.float32)
        if not np.isfinite(z).all():
            raise QuantizationError(
                f"{name}: z is not finite and cannot be quantised; repair the weights"
            )
        rounded, scale = round_rows(z, levels)
        x, sketch, old, bias = node.inputs
        stem = (old.name if old is not None else None) or name
        graph = node.graph
        assert graph is not None
        new = ir.Node(
            DOMAIN,
            replace(operator, quantization=quantization).name,
            [
                x,
                sketch,
                add_initializer(model, f"{stem}", rounded, replacing=old),
                add_initializer(model, f"{stem}_scale", scale),
                bias,
            ],
            list(node.attributes.values()),
            version=VERSION,
            name=node.name,
        )
        copy_output(node.outputs[0], new.outputs[0])
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [new], [node.outputs[0]], [new.outputs[0]]
        )
        drop_unused(model, old)


# --- the same arithmetic in PyTorch -------------------------------------------------------------


def emulate(
    x: Tensor, sketch: Tensor, z: Tensor, bias: Tensor | None, levels: int, dynamic: bool
) -> Tensor:
    """What the int8 operators compute for floating ``z``: ``Y [..., N]`` in x's dtype.

    The definition that exported files are checked against. Dynamic: ``X̃`` is quantised over the
    whole tensor as ONNX ``DynamicQuantizeLinear`` does, and the integer products are exact.
    """
    q, scale = (torch.from_numpy(a) for a in round_rows(z.detach().float().numpy(), levels))
    rows = x.reshape(-1, x.shape[-1])
    if not dynamic:
        dequantized = (q.float() * scale).to(x.dtype)
        return portable.linear(x, sketch, dequantized, bias)
    sketched = portable.sketch(rows, sketch, z.shape[1]).float()
    unsigned, x_scale, zero = _quantize_dynamically(sketched)
    width = block_n(z.shape[0], sketch.shape[0])
    blocks = [
        ((unsigned[j] - zero) @ part.double().t()).float() for j, part in enumerate(q.split(width))
    ]
    y = (torch.cat(blocks, dim=1) * (x_scale * scale.flatten())).to(x.dtype)
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], z.shape[0])


def _quantize_dynamically(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``DynamicQuantizeLinear``: ``(x_q, scale, zero)``, integers as float64."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    zero = torch.round((-low / scale).clamp(0, 255))
    unsigned = (torch.round(x / scale) + zero).clamp(0, 255)
    return unsigned.double(), scale, zero.double()
