"""Activation fused into the sketch: ``X̃`` of ``act(x)``, or of ``act(gate)·x``, in one pass.

A prologue of the sketch kernels (:mod:`.triton_sketch`, :mod:`.triton_blocks`): the input is read
once and the activation is never written. Values stay in float32 until the sketch rounds them to
x's dtype.

On one NVIDIA H200, 16384 x 4096, bf16, c = 4, in µs: rotation with gelu 78 (without 71); learned
with gelu 96 (44).
"""

# Kernel parameters are Triton values; an annotation would be a cast.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ss1_compile.kernels import triton_blocks, triton_sketch
from ss1_compile.kernels.layout import is_rotation
from ss1_compile.kernels.triton_elementwise import gelu, gelu_tanh, relu, silu


@triton.jit
def _relu_of(v, rows, columns, mask, aux, ready):
    return relu(v.to(tl.float32), v.dtype)


@triton.jit
def _gelu_of(v, rows, columns, mask, aux, ready):
    return gelu(v.to(tl.float32), v.dtype)


@triton.jit
def _gelu_tanh_of(v, rows, columns, mask, aux, ready):
    return gelu_tanh(v.to(tl.float32), v.dtype)


@triton.jit
def _silu_of(v, rows, columns, mask, aux, ready):
    return silu(v.to(tl.float32), v.dtype)


@triton.jit
def _gate(rows, columns, mask, aux):
    """The gate's values for these elements, in float32; ``aux`` is ``(gate, its row stride)``."""
    return tl.load(aux[0] + rows * aux[1] + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _times(v, rows, columns, mask, aux, ready):
    return v.to(tl.float32) * _gate(rows, columns, mask, aux)


@triton.jit
def _times_relu(v, rows, columns, mask, aux, ready):
    return v.to(tl.float32) * relu(_gate(rows, columns, mask, aux), v.dtype)


@triton.jit
def _times_gelu(v, rows, columns, mask, aux, ready):
    return v.to(tl.float32) * gelu(_gate(rows, columns, mask, aux), v.dtype)


@triton.jit
def _times_gelu_tanh(v, rows, columns, mask, aux, ready):
    return v.to(tl.float32) * gelu_tanh(_gate(rows, columns, mask, aux), v.dtype)


@triton.jit
def _times_silu(v, rows, columns, mask, aux, ready):
    return v.to(tl.float32) * silu(_gate(rows, columns, mask, aux), v.dtype)


_PLAIN: dict[str, Any] = {
    "none": None,
    "relu": _relu_of,
    "gelu": _gelu_of,
    "gelu_tanh": _gelu_tanh_of,
    "silu": _silu_of,
}
_GATED: dict[str, Any] = {
    "none": _times,
    "relu": _times_relu,
    "gelu": _times_gelu,
    "gelu_tanh": _times_gelu_tanh,
    "silu": _times_silu,
}


def activation_sketch(
    x: Tensor, gate: Tensor | None, code: Tensor, reduced_features: int, activation: str
) -> Tensor:
    """``X̃ [J, M, K_c]`` of ``act(x)``, or of ``act(gate)·x``, for ``x`` and ``gate`` ``[M, K]``.

    Args:
        x: float16, bfloat16 or float32, any row stride; other column strides are copied.
        gate: like x, or None.
        code: rotation code int32 ``[J, G, c]`` with B_K a power of two from 8, or learned blocks
            ``[J, G, gsize, r]`` of x's dtype.
        reduced_features: ``K_c``.
        activation: a key of :data:`.triton_elementwise.ACTIVATIONS`.
    """
    prologue, aux = _PLAIN[activation], None
    if gate is not None:
        if gate.stride(1) != 1:
            gate = gate.contiguous()
        prologue, aux = _GATED[activation], (gate, gate.stride(0))
    sketched: Tensor
    if is_rotation(code):
        sketched = triton_sketch.sketch(
            x, code.contiguous(), reduced_features, prologue=prologue, aux=aux
        )
    else:
        sketched = triton_blocks.sketch(x, code, prologue=prologue, aux=aux)
    return sketched
