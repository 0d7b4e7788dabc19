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
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import parser

from ss1_compile.kernels.layout import VECTOR_WIDTH
from ss1_compile.onnx.operators import DOMAIN, IN_FEATURES, Operator

MAX_UNROLLED = 16
"""Column blocks up to which the products are written out."""


@dataclass(frozen=True)
class Traits:
    """What the layers of a model that use one operator have in common: its body may rely on it.

    Attributes:
        num_hashes: J, or ``None`` if they differ.
        pads: whether some layer's K is not a multiple of the group size.
        cuts: whether some layer's N is not a multiple of J.
    """

    num_hashes: int | None = None
    pads: bool = True
    cuts: bool = True

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
    dynamic = operator.quantization == "int8_dynamic"
    lines = list(_SIZES)
    lines += _ROTATION if operator.kind == "rotation" else _LEARNED
    if traits.pads:
        lines += _PAD
    lines.append(f"x1 = Reshape ({'padded' if traits.pads else 'X'}, grouped)")
    lines += _APPLY_ROTATION if operator.kind == "rotation" else _APPLY_LEARNED
    weight = "Z"
    if operator.quantization == "int8_weight_only":
        lines += _DEQUANTIZE
        weight = "z"
    if dynamic:
        lines += _QUANTIZE
    if traits.unrolled is not None:
        lines += _unrolled(traits.unrolled, weight, dynamic)
    else:
        lines += _batched(weight, dynamic, traits.cuts)
    if dynamic:
        lines.append("typed = CastLike (product, X)")
    lines += [
        f"biased = Add ({'typed' if dynamic else 'product'}, B)",
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

_QUANTIZE = [
    "x3_float = Cast <to = 1> (x3)",
    "x4, x_scale, x_zero = DynamicQuantizeLinear (x3_float)",
    "scales = Reshape (scale, any)",
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


def _product(x: str, w: str, scale: str, out: str, dynamic: bool) -> list[str]:
    """``out = x @ w``; the order that ONNX Runtime fuses if x is quantised."""
    if not dynamic:
        return [f"{out} = MatMul ({x}, {w})"]
    return [
        f"{out}_int = MatMulInteger ({x}, {w}, x_zero)",
        f"{out}_float = Cast <to = 1> ({out}_int)",
        f"{out}_scale = Mul (x_scale, {scale})",
        f"{out} = Mul ({out}_float, {out}_scale)",
    ]


def _unrolled(num_hashes: int, weight: str, dynamic: bool) -> list[str]:
    """A product per column block. ``Split`` cuts N as ``block_n`` does: the last may be smaller."""
    sources = [("x4" if dynamic else "x3", "x", 2), (weight, "w", 0)]
    if dynamic:
        sources.append(("scales", "s", 0))
    names = {short: [f"{short}_{j}" for j in range(num_hashes)] for _, short, _ in sources}
    lines = ["flat = Concat <axis = 0> (any, Kc)"]
    for source, short, axis in sources:
        if num_hashes == 1:
            names[short] = [source]
        else:
            lines.append(
                f"{', '.join(names[short])} = "
                f"Split <axis = {axis}, num_outputs = {num_hashes}> ({source})"
            )
    products = [f"y_{j}" for j in range(num_hashes)]
    for j, product in enumerate(products):
        lines += [
            f"rows_{j} = Reshape ({names['x'][j]}, flat)",
            f"right_{j} = Transpose <perm = [1, 0]> ({names['w'][j]})",
        ]
        scale = names["s"][j] if dynamic else ""
        lines += _product(f"rows_{j}", f"right_{j}", scale, product, dynamic)
    if num_hashes == 1:
        return [*lines, "product = Identity (y_0)"]
    return [*lines, f"product = Concat <axis = 1> ({', '.join(products)})"]


def _batched(weight: str, dynamic: bool, cuts: bool) -> list[str]:
    """One batched product over the column blocks, zero rows of z filling the last one."""
    lines = [
        "by_hash = Transpose <perm = [2, 0, 1, 3]> (" + ("x4" if dynamic else "x3") + ")",
        "by_hash_shape = Concat <axis = 0> (J, any, Kc)",
        "left = Reshape (by_hash, by_hash_shape)",
        "rounding = Sub (J, one)",
        "rounded = Add (N, rounding)",
        "block_n = Div (rounded, J)",
        "filled = Mul (block_n, J)",
        "lacking = Sub (filled, N)",
        "no_rows = Constant <value_ints = [0]> ()",
        "fill = Concat <axis = 0> (no_rows, no_rows, lacking, no_rows)",
        f"z_filled = Pad ({weight}, fill)",
        "blocks_shape = Concat <axis = 0> (J, block_n, Kc)",
        "z_blocks = Reshape (z_filled, blocks_shape)",
        "right = Transpose <perm = [0, 2, 1]> (z_blocks)",
    ]
    if dynamic:
        lines += [
            "fill_scale = Concat <axis = 0> (no_rows, lacking)",
            "scale_filled = Pad (scales, fill_scale)",
            "scale_shape = Concat <axis = 0> (J, one, block_n)",
            "block_scale = Reshape (scale_filled, scale_shape)",
        ]
    lines += _product("left", "right", "block_scale", "by_block", dynamic)
    lines += [
        "blocks_of_row = Transpose <perm = [1, 0, 2]> (by_block)",
        "filled_shape = Concat <axis = 0> (any, filled)",
        f"{'whole_rows' if cuts else 'product'} = Reshape (blocks_of_row, filled_shape)",
    ]
    if cuts:
        lines.append("product = Slice (whole_rows, no_rows, N, one)")
    return lines
