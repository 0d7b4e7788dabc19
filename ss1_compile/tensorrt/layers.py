"""The SS1 operators as TensorRT layers; imported by :func:`ss1_compile.tensorrt.register` only.

==========================  ====================================================================
rotation sketch             ``Gather(x, columns [J, c, K_c]) · signs``, summed over c in float32
learned sketch              ``Einsum(x [..., G, gsize], S [J, G, gsize, r])``
product                     ``Einsum(X̃ [..., J, K_c], z [J, B_N, K_c])``, then ``+ bias``
==========================  ====================================================================

A rotation is a gather because that is what TensorRT stores smallest: the columns are ``J·K`` int32
and layers of one structure share them, where the 0/±1 matrix holds ``J·K·B_K`` values and a slice
per chunk and column block makes hundreds of layers (figures: docs/tensorrt.md). ``Einsum`` keeps
the leading dimensions of x as they are, so a dynamic batch needs no arithmetic on shapes.

Every operand may be a constant of the graph (``torch.Tensor``) or a tensor of the network
(``ITensor``: ``torch.compile`` passes parameters as inputs).
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import tensorrt as trt
import torch
from torch import Tensor
from torch_tensorrt.dynamo.conversion import ConversionContext
from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

from ss1_compile.kernels import layout

ITensor = Any  # trt.ITensor, which has no type stubs
Operand = Tensor | ITensor

_HALF = (trt.float16, trt.bfloat16)
_PROD, _SUM, _SUB, _LESS = (
    trt.ElementWiseOperation.PROD,
    trt.ElementWiseOperation.SUM,
    trt.ElementWiseOperation.SUB,
    trt.ElementWiseOperation.LESS,
)


class Layers:
    """Adds the layers of one node to its network, under the node's name."""

    def __init__(self, ctx: ConversionContext, name: str) -> None:
        self.ctx, self.net, self.name = ctx, ctx.net, name
        self._count = 0

    def linear(self, x: Operand, sketch: Operand, z: Operand, bias: Operand | None) -> ITensor:
        """``y [..., N]`` of ``x [..., K]``: sketch once, one product per column block."""
        x = self.tensor(x)
        sketched = self.sketch(x, sketch, z.shape[1])
        return self.product(sketched, self.rows(z, sketch.shape[0]), z.shape[0], bias)

    # --- sketch -------------------------------------------------------------------------------

    def sketch(self, x: ITensor, sketch: Operand, reduced_features: int) -> ITensor:
        """``X̃ [..., J, K_c]`` of ``x [..., K]``."""
        if len(sketch.shape) == 4:
            return self._learned_sketch(x, sketch)
        axis = len(x.shape)  # of the parts; the column blocks stand before it
        columns, signs = self._shared(
            ("rotation", sketch, x.shape[-1], reduced_features),
            lambda: self._rotation(sketch, x.shape[-1], reduced_features),
        )
        parts = self._out(self.net.add_gather(x, columns, axis - 1), "gather")
        parts = self.cast(parts, trt.float32)
        if signs is not None:
            parts = self.elementwise(parts, self.lead(signs, axis + 2), _PROD, "signs")
        reduce = self.net.add_reduce(parts, trt.ReduceOperation.SUM, 1 << axis, False)
        return self.cast(self._out(reduce, "sketch"), x.dtype)

    def _rotation(
        self, code: Operand, in_features: int, reduced_features: int
    ) -> tuple[ITensor, ITensor | None]:
        """``(columns int32, signs float32)``, both ``[J, c, K_c]``; no signs if all are +1.

        Padding (columns from ``in_features`` on) becomes column 0 with sign 0.
        """
        if not isinstance(code, Tensor):
            return self._rotation_at_run_time(code, in_features, reduced_features)
        columns, signs = layout.source_columns(code, reduced_features)
        padding = columns >= in_features
        signs = signs.float().masked_fill(padding, 0.0)
        columns = columns.masked_fill(padding, 0).to(torch.int32)
        plain = bool((signs == 1).all())
        return (
            self.constant(columns, "columns"),
            None if plain else self.constant(signs, "signs"),
        )

    def _rotation_at_run_time(
        self, code: ITensor, in_features: int, reduced_features: int
    ) -> tuple[ITensor, ITensor]:
        """:meth:`_rotation` of a code ``[J, G, c]`` that is known only when the engine runs."""
        hashes, groups, reduction = code.shape
        block_k = reduced_features // groups
        zero = self.constant(torch.zeros(1, 1, 1, 1, dtype=torch.int32), "zero")
        swap = self.net.add_shuffle(code)
        swap.first_transpose = (0, 2, 1)
        swap.reshape_dims = (hashes, reduction, groups, 1)
        code = self._out(swap, "code")
        negative = self.elementwise(code, zero, _LESS, "negative")
        minus_one = self.constant(-torch.ones(1, 1, 1, 1, dtype=torch.int32), "minus_one")
        flipped = self.elementwise(minus_one, code, _SUB, "flipped")
        rotations = self.select(negative, flipped, code, "rotations")
        slot = torch.arange(block_k, dtype=torch.int32).view(1, 1, 1, -1)
        within = self.elementwise(self.constant(slot, "slot"), rotations, _SUB, "within")
        width = self.constant(torch.full((1, 1, 1, 1), block_k, dtype=torch.int32), "block_k")
        wrapped = self.elementwise(within, width, _SUM, "wrapped")
        before = self.elementwise(within, zero, _LESS, "before")
        within = self.select(before, wrapped, within, "rotated")
        chunk = torch.arange(groups * reduction, dtype=torch.int32).view(1, groups, reduction, 1)
        first = self.constant(chunk.transpose(1, 2).contiguous() * block_k, "first")
        columns = self.elementwise(within, first, _SUM, "columns")
        one, minus = (self.constant(torch.full((1, 1, 1, block_k), s), "sign") for s in (1.0, -1.0))
        signs = self.select(negative, minus, one, "signs")
        if in_features < groups * reduction * block_k:
            end = torch.full((1, 1, 1, 1), in_features, dtype=torch.int32)
            inside = self.elementwise(columns, self.constant(end, "end"), _LESS, "inside")
            columns = self.select(inside, columns, zero, "columns")
            nothing = self.constant(torch.zeros(1, 1, 1, 1), "nothing")
            signs = self.select(inside, signs, nothing, "signs")
        shape = (hashes, reduction, reduced_features)
        return self.reshape(columns, shape, "columns"), self.reshape(signs, shape, "signs")

    def _learned_sketch(self, x: ITensor, blocks: Operand) -> ITensor:
        """``X̃[..., j, g·r : (g+1)·r] = x[..., g·gsize : (g+1)·gsize] @ S[j, g]``."""
        hashes, groups, size, rank = blocks.shape
        lead = string.ascii_lowercase[: len(x.shape) - 1]
        keep = (0,) * len(lead)
        blocks = self.tensor(blocks, x.dtype)
        if x.shape[-1] == groups * size:
            grouped = self.reshape(x, (*keep, groups, size), "groups")
        else:  # the padding reads feature 0 and is multiplied by 0
            column = torch.arange(groups * size, dtype=torch.int32).view(groups, size)
            inside = column < x.shape[-1]
            columns = self.constant(column.masked_fill(~inside, 0), "columns")
            grouped = self._out(self.net.add_gather(x, columns, len(lead)), "groups")
            mask = self.constant(inside.view(1, groups, size, 1).float(), "inside")
            blocks = self.elementwise(blocks, self.cast(mask, x.dtype), _PROD, "blocks")
        sketched = self.einsum(grouped, blocks, f"{lead}xy,wxyz->{lead}wxz", "sketch")
        return self.reshape(sketched, (*keep, hashes, groups * rank), "sketch")

    # --- product ------------------------------------------------------------------------------

    def rows(self, z: Operand, hashes: int) -> ITensor:
        """``z [N, K_c]`` as ``[J, B_N, K_c]``, the last block filled with zeros."""
        out_features, reduced_features = z.shape
        width = layout.block_n(out_features, hashes)
        shape = (hashes, width, reduced_features)
        missing = hashes * width - out_features
        if isinstance(z, Tensor):
            padded = torch.nn.functional.pad(z, (0, 0, 0, missing)) if missing else z
            return self.constant(padded.reshape(shape), "z")
        if missing:
            empty = self.constant(torch.zeros(missing, reduced_features), "empty")
            z = self._out(self.net.add_concatenation([z, self.cast(empty, z.dtype)]), "z")
        return self.reshape(z, shape, "z")

    def product(
        self, sketched: ITensor, rows: ITensor, out_features: int, bias: Operand | None
    ) -> ITensor:
        """``y[..., block j] = X̃[..., j] @ z_jᵀ + b`` of ``X̃ [..., J, K_c]``, ``z [J, B_N, K_c]``.

        Products of float16 run in float32 where the setting ``use_fp32_acc`` asks for it, as
        Torch-TensorRT's own matrix products do.
        """
        dtype = sketched.dtype
        rank = len(sketched.shape) - 1
        lead = string.ascii_lowercase[: rank - 1]
        rows = self.cast(rows, dtype)
        if dtype == trt.float16 and self.ctx.compilation_settings.use_fp32_acc:
            sketched, rows = self.cast(sketched, trt.float32), self.cast(rows, trt.float32)
        y = self.einsum(sketched, rows, f"{lead}wy,wxy->{lead}wx", "product")
        y = self.cast(y, dtype)
        y = self.reshape(y, (*(0,) * len(lead), rows.shape[0] * rows.shape[1]), "blocks")
        if y.shape[-1] != out_features:
            columns = torch.arange(out_features, dtype=torch.int32)
            kept = self.constant(columns, "kept")
            y = self._out(self.net.add_gather(y, kept, rank - 1), "kept")
        if bias is not None:
            y = self.elementwise(y, self.lead(self.tensor(bias, dtype), rank), _SUM, "bias")
        return y

    def dequantized(self, z: Operand, scale: Operand, dtype: Any) -> ITensor:
        """``scale · z`` in ``dtype``, ``[N, K_c]`` of int8 z and ``scale [N, groups]``.

        int8 constants stay int8 in the engine. TensorRT has no groups along a row for them, so
        every group is a row of its own while it is dequantised.
        """
        (out_features, reduced_features), groups = z.shape, scale.shape[1]
        shape = (out_features * groups, reduced_features // groups)
        if isinstance(z, Tensor):
            quantized = self.constant(z.reshape(shape), "z")
        else:
            quantized = self.reshape(z, shape, "z")
        scales = self.reshape(self.tensor(scale, trt.float32), shape[:1], "scale")
        dequantize = self.net.add_dequantize(quantized, scales, dtype)
        dequantize.axis = 0
        return self.reshape(
            self._out(dequantize, "dequantized"), (out_features, reduced_features), "z"
        )

    # --- layers -------------------------------------------------------------------------------

    def tensor(self, value: Operand, dtype: Any = None) -> ITensor:
        """A network tensor: ``value`` itself, or a constant; cast to ``dtype`` if it is given."""
        if isinstance(value, Tensor):
            value = self.constant(value.detach(), "constant")
        return value if dtype is None else self.cast(value, dtype)

    def constant(self, value: Tensor, role: str) -> ITensor:
        """A constant layer, with a name of its own: TensorRT refits weights by name."""
        self._count += 1
        return get_trt_tensor(self.ctx, value, f"{self.name}/ss1.{role}.{self._count}")

    def cast(self, value: ITensor, dtype: Any) -> ITensor:
        """``value`` in ``dtype``."""
        return value if value.dtype == dtype else self._out(self.net.add_cast(value, dtype), "cast")

    def reshape(self, value: ITensor, shape: tuple[int, ...], role: str) -> ITensor:
        """``value`` in another shape; a 0 copies the dimension at its place."""
        shuffle = self.net.add_shuffle(value)
        shuffle.reshape_dims = shape
        return self._out(shuffle, role)

    def lead(self, value: ITensor, rank: int) -> ITensor:
        """``value`` with dimensions of 1 in front, for broadcasting."""
        missing = rank - len(value.shape)
        if not missing:
            return value
        return self.reshape(value, (*(1,) * missing, *value.shape), "broadcast")

    def elementwise(self, a: ITensor, b: ITensor, operation: Any, role: str) -> ITensor:
        """``a`` and ``b`` of one rank, broadcast, under ``operation``."""
        return self._out(self.net.add_elementwise(a, b, operation), role)

    def select(self, condition: ITensor, then: ITensor, other: ITensor, role: str) -> ITensor:
        """``then`` where ``condition`` holds, else ``other``; broadcast."""
        return self._out(self.net.add_select(condition, then, other), role)

    def einsum(self, a: ITensor, b: ITensor, equation: str, role: str) -> ITensor:
        """``equation`` of two tensors of one dtype."""
        return self._out(self.net.add_einsum([a, b], equation), role)

    def _out(self, layer: Any, role: str) -> ITensor:
        self._count += 1
        layer.name = f"{self.name}/ss1.{role}.{self._count}"
        return layer.get_output(0)

    def _shared(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """``make()``, once per network for equal keys; a tensor counts by its values."""
        made = vars(self.ctx).setdefault("_ss1_shared", {})
        key = tuple(
            (*part.shape, part.cpu().numpy().tobytes()) if isinstance(part, Tensor) else part
            for part in key
        )
        if key not in made:
            made[key] = make()
        return made[key]
