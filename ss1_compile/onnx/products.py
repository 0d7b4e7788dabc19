"""The matrix products of the operators' bodies: from the sketch ``x3 [M, G, J, B_K]`` to ``Y``.

Products that are written out have the leading dimensions of X, so that the last operator gives Y
and nothing has to be reshaped (a copy, if Y is an output of the model). With J = 1, and unless
activations are quantised per token, ``x3`` is ``[..., K_c]`` already: ONNX Runtime then fuses the
quantisation into the product, where one layer alone reads it.

Activations are quantised per tensor (``int8_dynamic``, the pattern that ONNX Runtime fuses) or per
row and column block (``int8_per_token``: ``s_x = max|x| / 127``, the arithmetic of
:mod:`ss1_compile.kernels.quantize`).

**Two parts.** x86 CPUs without VNNI add pairs of 8-bit products in 16 bits, which overflows from
``|z| = 64`` on. Per token, such z is multiplied as ``z = 2·high + low`` with ``|high| ≤ 63`` and
``|low| ≤ 1``: two integer products, exact everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from ss1_compile.onnx.operators import Arithmetic


def products(
    quantization: Arithmetic | None,
    unrolled: int | None,
    cuts: bool,
    wide: bool,
    biased: bool,
) -> list[str]:
    """The lines that compute ``Y [..., N]`` from ``x3``, Z and B.

    Args:
        quantization: of the operator.
        unrolled: J if a product per column block is to be written out.
        cuts: whether N may not be a multiple of J.
        wide: whether int8 z may exceed ±63.
        biased: whether B is ``[N]`` for certain.
    """
    if quantization == "int8_dynamic":
        plan = _Plan("x4", ("Z",), per_tensor=True)
        lines = _PER_TENSOR
    elif quantization == "int8_per_token":
        plan = _Plan("x4", ("high", "low") if wide else ("Z",), per_token=True)
        lines = [*_PER_TOKEN, *(_PARTS if wide else [])]
    else:
        plan = _Plan("x3", ("z" if quantization else "Z",))
        lines = []
    return [
        *lines,
        *(_batched(plan, cuts) if unrolled is None else _unrolled(plan, unrolled, biased)),
    ]


@dataclass(frozen=True)
class _Plan:
    """The sketched input, the parts of Z that it is multiplied with, and how it was quantised."""

    x: str
    weights: tuple[str, ...]
    per_tensor: bool = False
    per_token: bool = False

    @property
    def integer(self) -> bool:
        return self.per_tensor or self.per_token


_PER_TENSOR = [
    "x3_float = Cast <to = 1> (x3)",
    "x4, x_scale, x_zero = DynamicQuantizeLinear (x3_float)",
    "scales = Reshape (scale, any)",
]

_PER_TOKEN = [
    "magnitude = Abs (x3)",
    "axes13 = Constant <value_ints = [1, 3]> ()",
    "peak = ReduceMax <keepdims = 1> (magnitude, axes13)",  # [M, 1, J, 1]
    "limit = Constant <value_float = 127.0> ()",
    "low_limit = Constant <value_float = -127.0> ()",
    "unit = Constant <value_float = 1.0> ()",
    "tiny = Constant <value_float = 1.17549435e-38> ()",
    "peak_scale = Div (peak, limit)",
    "idle = Less (peak_scale, tiny)",
    "x_scale = Where (idle, unit, peak_scale)",
    "steps = Div (x3, x_scale)",
    "whole_steps = Round (steps)",
    "clipped = Clip (whole_steps, low_limit, limit)",
    "x4 = Cast <to = 3> (clipped)",
    "scales = Reshape (scale, any)",
]

_PARTS = [
    "two = Constant <value_ints = [2]> ()",
    "Z64 = Cast <to = 7> (Z)",
    "high64 = Div (Z64, two)",
    "twice64 = Mul (high64, two)",
    "low64 = Sub (Z64, twice64)",
    "high = Cast <to = 3> (high64)",
    "low = Cast <to = 3> (low64)",
]


def _product(
    plan: _Plan, x: str, weights: list[str], x_scale: str, scale: str, out: str
) -> list[str]:
    """``out = x @ w``; per tensor in the order that ONNX Runtime fuses."""
    if not plan.integer:
        return [f"{out} = MatMul ({x}, {weights[0]})"]
    if plan.per_tensor:
        return [
            f"{out}_int = MatMulInteger ({x}, {weights[0]}, x_zero)",
            f"{out}_float = Cast <to = 1> ({out}_int)",
            f"{out}_scale = Mul (x_scale, {scale})",
            f"{out} = Mul ({out}_float, {out}_scale)",
        ]
    lines = [f"{out}_int = MatMulInteger ({x}, {weights[0]})"]
    total = f"{out}_int"
    if len(weights) == 2:
        total = f"{out}_total"
        lines += [
            f"{out}_twice = Add ({out}_int, {out}_int)",
            f"{out}_low = MatMulInteger ({x}, {weights[1]})",
            f"{total} = Add ({out}_twice, {out}_low)",
        ]
    return [
        *lines,
        f"{out}_float = Cast <to = 1> ({total})",
        f"{out}_by_row = Mul ({out}_float, {x_scale})",
        f"{out} = Mul ({out}_by_row, {scale})",
    ]


def _add_bias(plan: _Plan, product: str, bias: str, out: str) -> list[str]:
    """``out = product + bias`` in the dtype of X, which integer products do not have yet."""
    if not plan.integer:
        return [f"{out} = Add ({product}, {bias})"]
    return [f"{out}_typed = CastLike ({product}, X)", f"{out} = Add ({out}_typed, {bias})"]


def _unrolled(plan: _Plan, num_hashes: int, biased: bool) -> list[str]:
    """A product per column block. ``Split`` cuts N as ``block_n`` does: the last may be smaller.

    B is added block by block where it can be cut, since runtimes fuse it into each product.
    """
    lines: list[str] = []

    def split(source: str, axis: int) -> list[str]:
        if num_hashes == 1:
            return [source]
        parts = [f"{source}_{j}" for j in range(num_hashes)]
        lines.append(
            f"{', '.join(parts)} = Split <axis = {axis}, num_outputs = {num_hashes}> ({source})"
        )
        return parts

    inputs = split(plan.x, 2)
    weights = [split(weight, 0) for weight in plan.weights]
    scales = split("scales", 0) if plan.integer else [""] * num_hashes
    x_scales = split("x_scale", 2) if plan.per_token else [""] * num_hashes
    biases = split("B", 0) if biased else []
    if plan.per_token:
        lines.append("column = Concat <axis = 0> (lead, one)")
    for j in range(num_hashes):
        rows = inputs[j]
        if num_hashes > 1 or plan.per_token:
            rows = f"rows_{j}"
            lines.append(f"{rows} = Reshape ({inputs[j]}, flat)")
        rights = [f"right_{j}_{part}" for part in range(len(weights))]
        for right, weight in zip(rights, weights, strict=True):
            lines.append(f"{right} = Transpose <perm = [1, 0]> ({weight[j]})")
        if plan.per_token:
            lines.append(f"row_scale_{j} = Reshape ({x_scales[j]}, column)")
        lines += _product(plan, rows, rights, f"row_scale_{j}", scales[j], f"y_{j}")
    if num_hashes == 1:
        return [*lines, *_add_bias(plan, "y_0", "B", "Y")]
    for j, bias in enumerate(biases):
        lines += _add_bias(plan, f"y_{j}", bias, f"biased_{j}")
    parts = ", ".join(f"{'biased' if biased else 'y'}_{j}" for j in range(num_hashes))
    if biased:
        return [*lines, f"Y = Concat <axis = -1> ({parts})"]
    lines.append(f"product = Concat <axis = -1> ({parts})")
    return [*lines, *_add_bias(plan, "product", "B", "Y")]


def _batched(plan: _Plan, cuts: bool) -> list[str]:
    """One batched product over the column blocks, zero rows of z filling the last one."""
    lines = [
        f"by_hash = Transpose <perm = [2, 0, 1, 3]> ({plan.x})",
        "by_hash_shape = Concat <axis = 0> (J, any, Kc)",
        "left = Reshape (by_hash, by_hash_shape)",
        "rounding = Sub (J, one)",
        "rounded = Add (N, rounding)",
        "block_n = Div (rounded, J)",
        "filled = Mul (block_n, J)",
        "lacking = Sub (filled, N)",
        "no_rows = Constant <value_ints = [0]> ()",
        "fill = Concat <axis = 0> (no_rows, no_rows, lacking, no_rows)",
        "blocks_shape = Concat <axis = 0> (J, block_n, Kc)",
    ]
    rights = [f"right_{part}" for part in range(len(plan.weights))]
    for right, weight in zip(rights, plan.weights, strict=True):
        lines += [
            f"{right}_filled = Pad ({weight}, fill)",
            f"{right}_blocks = Reshape ({right}_filled, blocks_shape)",
            f"{right} = Transpose <perm = [0, 2, 1]> ({right}_blocks)",
        ]
    if plan.integer:
        lines += [
            "fill_scale = Concat <axis = 0> (no_rows, lacking)",
            "scale_filled = Pad (scales, fill_scale)",
            "scale_shape = Concat <axis = 0> (J, one, block_n)",
            "block_scale = Reshape (scale_filled, scale_shape)",
        ]
    if plan.per_token:
        lines += [
            "scale_by_hash = Transpose <perm = [2, 0, 1, 3]> (x_scale)",
            "row_scale_shape = Concat <axis = 0> (J, any, one)",
            "row_scale = Reshape (scale_by_hash, row_scale_shape)",
        ]
    lines += _product(plan, "left", rights, "row_scale", "block_scale", "by_block")
    lines += [
        "blocks_of_row = Transpose <perm = [1, 0, 2]> (by_block)",
        "filled_shape = Concat <axis = 0> (any, filled)",
        f"{'whole_rows' if cuts else 'product'} = Reshape (blocks_of_row, filled_shape)",
    ]
    if cuts:
        lines.append("product = Slice (whole_rows, no_rows, N, one)")
    return [
        *lines,
        *_add_bias(plan, "product", "B", "biased"),
        "out_shape = Concat <axis = 0> (lead, N)",
        "Y = Reshape (biased, out_shape)",
    ]
