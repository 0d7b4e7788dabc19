"""The operators' bodies: ``FunctionProto``s of standard ONNX operators (opset 18 and later).

A runtime without a kernel for an operator runs its body. The constants in it (the sketch matrix,
the column blocks of Z) depend on initializers alone, so runtimes fold them when they load the file.

**Rotation.** Rotations are multiples of 8 (``VECTOR_WIDTH``), so with ``P = B_K / 8`` the sketch is
a 0/±1 matrix on groups of 8 features: for ``X1 [M, G, c·P, 8]``,

    ``X3 [M, G, J·P, 8] = S [G, J·P, c·P] @ X1``,
    ``S[g, (j,u), (l,t)] = s[j,g,l] · [u = (t + h[j,g,l]/8) mod P]``.

That is 1/8 of the work of the matrix on single features, and the fastest of the forms measured:
gathering and adding took 1.3 … 6 times as long in ONNX Runtime.

**Products.** ``Y[:, block j] = X3[:, :, j] @ Z[block j]ᵀ``. If all layers of a model agree on J,
the J products are written out: ONNX Runtime packs constant matrices ahead, but not a batch of them
(int8, one row, 4096 → 4096, c = 4: 0.32 against 1.0 ms). Otherwise they are one batched product.
:mod:`.products` writes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx
from onnx import parser

from ss1_compile.kernels.layout import VECTOR_WIDTH
from ss1_compile.onnx.operators import DOMAIN, IN_FEATURES, Operator
from ss1_compile.onnx.products import products

MAX_UNROLLED = 16
"""Column blocks up to which the products are written out."""


@dataclass(frozen=True)
class Traits:
    """What the layers of a model that use one operator have in common: its body may rely on it.

    Attributes:
        num_hashes: J, or ``None`` if they differ.
        pads: whether some layer's K is not a multiple of the group size.
        cuts: whether some layer's N is not a multiple of J.
        wide: whether some int8 Z exceeds ±63 and its products have to be exact on CPUs that add
            pairs of 8-bit products in 16 bits. Matters where activations are quantised per token.
    """

    num_hashes: int | None = None
    pads: bool = True
    cuts: bool = True
    wide: bool = True

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
    lines = [*_SIZES, *(_ROTATION if operator.kind == "rotation" else _LEARNED)]
    if traits.pads:
        lines += _PAD
    lines.append(f"x1 = Reshape ({'padded' if traits.pads else 'X'}, grouped)")
    lines += _APPLY_ROTATION if operator.kind == "rotation" else _APPLY_LEARNED
    if quantization == "int8_per_token":
        lines = [*_WIDEN, *(_widened(line) for line in lines)]
    if quantization == "int8_weight_only":
        lines += _DEQUANTIZE
    lines += products(quantization, traits.unrolled, traits.cuts, traits.wide)
    rounds = quantization in ("int8_dynamic", "int8_per_token")
    if rounds:
        lines.append("typed = CastLike (product, X)")
    lines += [
        f"biased = Add ({'typed' if rounds else 'product'}, B)",
        "lead = Shape <start = 0, end = -1> (X)",
        "out_shape = Concat <axis = 0> (lead, N)",
        "Y = Reshape (biased, out_shape)",
    ]
    return parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{operator.name} <{IN_FEATURES}> ({', '.join(operator.operands)}) => (Y)\n"
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
    "width = Div (Kc, G)",  # B_K, or r
]

_ROTATION = [
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
    "S = Reshape (signed, matrix_shape)",
    "grouped = Concat <axis = 0> (any, G, cP, eight)",
]

_LEARNED = [
    "size = Identity (parts)",
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

_APPLY_ROTATION = [
    "x2 = MatMul (S, x1)",  # [M, G, J·P, 8]
    "sketched_shape = Concat <axis = 0> (any, G, J, width)",
    "x3 = Reshape (x2, sketched_shape)",
]

_APPLY_LEARNED = [
    "by_group = Transpose <perm = [1, 0, 2]> (x1)",
    "x2 = MatMul (by_group, S)",  # [G, M, J·r]
    "by_row = Transpose <perm = [1, 0, 2]> (x2)",
    "sketched_shape = Concat <axis = 0> (any, G, J, width)",
    "x3 = Reshape (by_row, sketched_shape)",
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
