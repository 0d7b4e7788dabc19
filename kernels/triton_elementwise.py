"""Activations as Triton functions of float32 values.

All are ``v·σ(u(v))`` with ``σ(u) = 1 / (1 + 2^-u)``, taken as ``rsqrt((1 + 2^-u)²)``: two
operations of the special function unit and no division, which is five instructions more.
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _times_sigmoid(v, u):
    """``v / (1 + 2^-u)``; where ``2^-u`` or its square overflows, the limit 0."""
    d = 1.0 + tl.exp2(-u)
    return v * tl.rsqrt(d * d)


@triton.jit
def relu(v):
    """``max(v, 0)``."""
    return tl.maximum(v, 0.0)


@triton.jit
def gelu(v):
    """``v·Φ(v)`` by Abramowitz & Stegun 26.2.19: within 1e-6 of the exact value.

    ``tl.erf`` branches on every element, which tripled the time of a sketch with gelu in front.
    """
    a = tl.abs(v)
    p = 0.0000380036 + a * (0.0000488906 + a * 0.0000053830)
    p = 1.0 + a * (0.0498673470 + a * (0.0211410061 + a * (0.0032776263 + a * p)))
    p = p * p
    p = p * p
    p = p * p
    tail = 0.5 / (p * p)
    return v * tl.where(v < 0.0, tail, 1.0 - tail)


@triton.jit
def gelu_16(v):
    """``v·Φ(v)`` within 2.6e-5, for results that are rounded to 16 bits.

    ``log2(Φ(v) / Φ(-v)) / v`` as a polynomial in v², fitted to the least maximal error of
    ``v·Φ(v)``. A sketch of 16384 x 4096 takes 71 µs, with :func:`gelu` in front 98, with this 78
    (one NVIDIA H200, rotation, c = 4).
    """
    t = tl.minimum(v * v, 30.0)
    return _times_sigmoid(v, v * (2.30112126 + t * (0.106775791 - t * 0.00101427309)))


@triton.jit
def gelu_tanh(v):
    """``v·(1 + tanh(w)) / 2``, ``w = √(2/π)·(v + 0.044715·v³)``."""
    # 0.5·(1 + tanh(w)) = 1 / (1 + e^-2w), and 2·√(2/π)·log2(e) = 2.3022082
    return _times_sigmoid(v, v * (2.302208198 + 0.1029432397 * v * v))


@triton.jit
def silu(v):
    """``v / (1 + e^-v)``."""
    return _times_sigmoid(v, v * 1.4426950408889634)


ACTIVATIONS: dict[str, Any] = {
    "none": None,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
}
"""By the names of :data:`ss1_compile.kernels.fused_portable.ACTIVATIONS`."""


def activation_for(name: str, dtype: torch.dtype) -> Any:
    """The function of that name, accurate enough for results of ``dtype``; None for ``"none"``."""
    if name == "gelu" and dtype.itemsize == 2:
        return gelu_16
    return ACTIVATIONS[name]
