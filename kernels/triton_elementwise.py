"""Activations as Triton functions of float32 values, exact enough for the dtype of the result.

``f(v, dtype)``. What they cost is what they ask of the special function unit: a tile of a product
waits for it. So there is no ``tl.erf``, which branches on every element, and no division, and
bfloat16 results take one operation of it per value (``tanh.approx``, within 2^-11) in place of two.
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter knows no assembly."""


@triton.jit
def _times_sigmoid(v, u, dtype: tl.constexpr):
    """``v / (1 + e^-2u)``."""
    if dtype == tl.bfloat16 and not _INTERPRETED:
        half = 0.5 * v
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
        return half + half * tanh
    # 1 / d as rsqrt(d²), for a division is five instructions more; where d overflows, the limit 0
    d = 1.0 + tl.exp2(-2.8853900817779268 * u)
    return v * tl.rsqrt(d * d)


@triton.jit
def relu(v, dtype: tl.constexpr):
    """``max(v, 0)``."""
    return tl.maximum(v, 0.0)


@triton.jit
def gelu(v, dtype: tl.constexpr):
    """``v·Φ(v)``: within 1e-6 for float32 results, within 3e-5 (and ``tanh``'s error) for others.

    Abramowitz & Stegun 26.2.19; for 16 bits ``artanh(2Φ(v) - 1) / v`` as a polynomial in v² that
    was fitted to the least maximal error of ``v·Φ(v)``, its last coefficient such that it is
    positive everywhere.
    """
    if dtype == tl.float32:
        a = tl.abs(v)
        p = 0.0000380036 + a * (0.0000488906 + a * 0.0000053830)
        p = 1.0 + a * (0.0498673470 + a * (0.0211410061 + a * (0.0032776263 + a * p)))
        p = p * p
        p = p * p
        p = p * p
        tail = 0.5 / (p * p)
        return v * tl.where(v < 0.0, tail, 1.0 - tail)
    t = v * v
    q = 0.797483013 + t * (0.0370415054 + t * (-0.000363445949 + t * 1e-6))
    return _times_sigmoid(v, v * q, dtype)


@triton.jit
def gelu_tanh(v, dtype: tl.constexpr):
    """``v·(1 + tanh(√(2/π)·(v + 0.044715·v³))) / 2``."""
    return _times_sigmoid(v, v * (0.7978845608 + 0.0356774081 * v * v), dtype)


@triton.jit
def silu(v, dtype: tl.constexpr):
    """``v / (1 + e^-v)``."""
    return _times_sigmoid(v, 0.5 * v, dtype)


ACTIVATIONS: dict[str, Any] = {
    "none": None,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
}
"""By the names of :data:`ss1_compile.kernels.fused_portable.ACTIVATIONS`."""
