"""The operators' bodies: ``FunctionProto``s of standard ONNX operators (opset 18 and later).

A runtime without a kernel for an operator runs its body. The constants in it (the sketch matrix,
the column blocks of Z) depend on initializers alone, so runtimes fold them when they load the file.

**Rotation.** Rotations are multiples of 8 (``VECTOR_WIDTH``), so with ``P = B_K / 8`` the sketch is
a 0/±1 matrix on groups of 8 features: for ``X1 [M, G, c·P, 8]``,

    ``X3 [M, G, J·P, 8] = S [G, J·P, c·P] @ X1``,
    ``S[g, (j,u), (l,t)] = s[j,g,l] · [u = (t + h[j,g,l]/8) mod P]``.

That is 1/8 of the work of the matrix on single features, but in products of 8 columns. Where
``J·B_K ≤ 64`` the matrix on single features, ``X3 [G, M, J·B_K] = X1 [G, M, c·B_K] @ S'``, is
faster all the same (ONNX Runtime, 128 tokens, J = 1, B_K = 32: 0.11 against 0.21 ms at K = 384,
0.36 against 0.77 at 1536). Gathering and adding took 1.3 … 6 times as long as the first.

**Products.** ``Y[:, block j] = X3[:, :, j] @ Z[block j]ᵀ``. If all layers of a model agree on J,
the J products are written out: ONNX Runtime packs constant matrices ahead, but not a batch of them
(int8, one row, 4096 → 4096, c = 4: 0.32 against 1.0 ms). Otherwise they are one batched product.
:mod:`.products` writes them.

**Sharing.** What comes before the products depends on X, the sketch and the attributes alone, so
runtimes that merge equal nodes (ONNX Runtime does) compute one sketch for q, k and v.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx
from onnx import parser

from ss1_compile.kernels.layout import VECTOR_WIDTH
from ss1_compile.onnx.operators import BLOCK_K, DOMAIN, IN_FEATURES, Operator
from ss1_compile.onnx.products import products

MAX_UNROLLED = 16
"""Column blocks up to which the products are written out."""

NARROW = 64
"""``J·B_K`` up to which the rotation sketch is a matrix on single features."""


@dataclass(frozen=True)
class Traits:
    """What the layers of a model that use one operator have in common: its body may rely on it.

    Attributes:
        num_hashes: J, or ``None`` if they differ.
        pads: whether some layer's K is not a multiple of the group size.
        cuts: whether some layer's N is not a multiple of J.
        wide: whether some int8 Z exceeds ±63 and its products have to be exact on CPUs that add
            pairs of 8-bit products in 16 bits. Matters where activations are quantised per token.
        narrow: whether every ``J·B_K`` is at most :data:`NARROW`.
        biased: whether every B is ``[N]``.
    """

    num_hashes: int | None = None
    pads: bool = True
    cuts: bool = True
    wide: bool = True
    narrow: bool = False
    biased: bool = False

    @property
    def unrolled(self) -> int | None:
        """J if the products are to be written out."""
        j = self.num_hashes
        return j if j is not None and j <= MAX_UNROLLED else None


def function_body(
    operator: Operator, opset: int, traits: Traits | None = None
) -> onnx.FunctionProto:
    """The body of ``operator`` for models of opset 18 or later that have ``traits``.

    Without traits the body serves every layer, at some cost in speed.
    """
    traits = traits or Traits()
    quantization = operator.quantization
    flat = traits.unrolled == 1 and quantization != "int8_per_token"
    lines = list(_SIZES)
    if operator.kind == "rotation":
        lines += [*_ROTATION, *(_SINGLE if traits.narrow else _EIGHTS)]
    else:
        lines += _LEARNED
    if traits.pads:
        lines += _PAD
    lines.append(f"x1 = Reshape ({'padded' if traits.pads else 'X'}, grouped)")
    by_features = operator.kind == "learned" or traits.narrow
    lines += _APPLY_TO_FEATURES if by_features else ["x2 = MatMul (S, x1)"]  # [M, G, J·P, 8]
    lines += ["x3 = Reshape (x2, flat)"] if flat else _BY_HASH
    if quantization == "int8_per_token":
        lines = [*_WIDEN, *(_widened(line) for line in lines)]
    if quantization == "int8_weight_only":
        lines += _DEQUANTIZE
    lines += products(quantization, traits.unrolled, traits.cuts, traits.wide, traits.biased)
    return parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{operator.name} <{', '.join(operator.attributes)}> "
        f"({', '.join(operator.operands)}) => (Y)\n"
        "{\n" + "\n".join(lines) + "\n}"
    )


_SIZES = [
    "one = Constant <value_ints = [1]> ()",
    "any = Constant <value_ints = [-1]> ()",
    f"in_features = Constant <value_int: int = @{IN_FEATURES}> ()",
    "K = Reshape (in_features, one)",
    "J = Shape <start = 0, end = 1> (sketch)",
    "G = Shape <start = 1, end = 2> (sketch)",
    "parts = Shape <start = 2, end = 3> (sketch)",  # c, or gsize
    "N = Shape <start = 0, end = 1> (Z)",
    "Kc = Shape <start = 1, end = 2> (Z)",
    "lead = Shape <start = 0, end = -1> (X)",
    "flat = Concat <axis = 0> (lead, Kc)",
]

_ROTATION = [
    f"block_k = Constant <value_int: int = @{BLOCK_K}> ()",
    "width = Reshape (block_k, one)",
    f"eight = Constant <value_ints = [{VECTOR_WIDTH}]> ()",
    "P = Div (width, eight)",
    "cP = Mul (parts, P)",
    "JP = Mul (J, P)",
    "size = Mul (cP, eight)",
    "code64 = Cast <to = 7> (sketch)",
    "code = Transpose <perm = [1, 0, 2]> (code64)",  # [G, J, c]
    "zero = Constant <value_ints = [0]> ()",
    "negative = Less (code, zero)",
    "flipped = Sub (any, code)",
    "rotation = Where (negative, flipped, code)",
    "shift = Div (rotation, eight)",
    "sign64 = Where (negative, any, one)",
    "axis3 = Constant <value_ints = [3]> ()",
    "shift4 = Unsqueeze (shift, axis3)",  # [G, J, c, 1]
    "first = Constant <value_int = 0> ()",
    "step = Constant <value_int = 1> ()",
    "axis0 = Constant <value_ints = [0]> ()",
    "last = Squeeze (P, axis0)",
    "t = Range (first, last, step)",
    "turned = Add (t, shift4)",
    "slot4 = Mod (turned, P)",  # [G, J, c, P]: where chunk part t goes
    "axis2 = Constant <value_ints = [2]> ()",
    "slot = Unsqueeze (slot4, axis2)",
    "axes12 = Constant <value_ints = [1, 2]> ()",
    "u = Unsqueeze (t, axes12)",
    "hit = Equal (slot, u)",  # [G, J, P, c, P]
    "hits = CastLike (hit, X)",
    "axes24 = Constant <value_ints = [2, 4]> ()",
    "sign5 = Unsqueeze (sign64, axes24)",
    "sign = CastLike (sign5, X)",
    "signed = Mul (hits, sign)",
    "matrix_shape = Concat <axis = 0> (G, JP, cP)",
    "turning = Reshape (signed, matrix_shape)",
]

_EIGHTS = [
    "S = Identity (turning)",
    "grouped = Concat <axis = 0> (any, G, cP, eight)",
]

_SINGLE = [
    "axes24_ = Constant <value_ints = [2, 4]> ()",
    "by_part = Transpose <perm = [0, 2, 1]> (turning)",  # [G, c·P, J·P]
    "by_part5 = Unsqueeze (by_part, axes24_)",
    "eight0 = Squeeze (eight, axis0)",
    "lanes = Range (first, eight0, step)",
    "lane_row = Unsqueeze (lanes, axis0)",
    "lane_shape = Constant <value_ints = [8, 1]> ()",
    "lane_column = Reshape (lanes, lane_shape)",
    "same_lane = Equal (lane_row, lane_column)",
    "unit_matrix = CastLike (same_lane, X)",
    "lane_axes = Constant <value_ints = [1, 8, 1, 8]> ()",
    "unit4 = Reshape (unit_matrix, lane_axes)",
    "single5 = Mul (by_part5, unit4)",  # [G, c·P, 8, J·P, 8]
    "Jr = Mul (J, width)",
    "single_shape = Concat <axis = 0> (G, size, Jr)",
    "S = Reshape (single5, single_shape)",
    "grouped = Concat <axis = 0> (any, G, size)",
]

_LEARNED = [
    "size = Identity (parts)",
    "width = Shape <start = 3, end = 4> (sketch)",
    "Jr = Mul (J, width)",
    "blocks = Transpose <perm = [1, 2, 0, 3]> (sketch)",
    "matrix_shape = Concat <axis = 0> (G, parts, Jr)",
    "S = Reshape (blocks, matrix_shape)",
    "grouped = Concat <axis = 0> (any, G, parts)",
]

_PAD = [
    "whole = Mul (G, size)",
    "missing = Sub (whole, K)",
    "row_shape = Concat <axis = 0> (any, K)",
    "rows = Reshape (X, row_shape)",
    "none = Constant <value_ints = [0, 0, 0]> ()",
    "pads = Concat <axis = 0> (none, missing)",
    "padded = Pad (rows, pads)",
]

_APPLY_TO_FEATURES = [
    "by_group = Transpose <perm = [1, 0, 2]> (x1)",
    "sketched = MatMul (by_group, S)",  # [G, M, J·r]
    "x2 = Transpose <perm = [1, 0, 2]> (sketched)",
]

_BY_HASH = [
    "sketched_shape = Concat <axis = 0> (any, G, J, width)",
    "x3 = Reshape (x2, sketched_shape)",
]

_DEQUANTIZE = [
    "scale_axis = Constant <value_ints = [2]> ()",
    "groups = Shape <start = 1, end = 2> (scale)",
    "scale3 = Unsqueeze (scale, scale_axis)",
    "z_float = Cast <to = 1> (Z)",
    "z_shape = Concat <axis = 0> (N, groups, any)",
    "z_grouped = Reshape (z_float, z_shape)",
    "z_scaled = Mul (z_grouped, scale3)",
    "z_flat_shape = Concat <axis = 0> (N, Kc)",
    "z_flat = Reshape (z_scaled, z_flat_shape)",
    "z = CastLike (z_flat, X)",
]

# Activations that are quantised per token are sketched in float32, as PyTorch's kernels do.
_WIDEN = ["x_wide = Cast <to = 1> (X)"]


def _widened(line: str) -> str:
    if line.startswith("blocks = "):
        return "sketch_wide = Cast <to = 1> (sketch)\n" + line.replace("(sketch)", "(sketch_wide)")
    return re.sub(r"\bX\b", "x_wide", line)
