"""Fused operators: a producer in front of the sketch, the GEMM with its epilogue behind it.

======================  ==========================================================================
``norm_sketch``         ``s = x + residual``; ``X̃`` of ``LayerNorm(s)`` or ``RMSNorm(s)``
``activation_sketch``   ``X̃`` of ``act(x)``, or of ``act(gate)·x``
``matmul``              ``y [M, ΣN] = act(X̃ zᵀ + b) + residual`` for linears that share ``X̃``
``matmul_sketch``       the next layer's ``X̃`` of ``act(X̃ zᵀ + b)``, or of
                        ``act(X̃ z_gateᵀ + b_gate)·(X̃ zᵀ + b)``, which need not be written
======================  ==========================================================================

They are what the fusion passes rewrite to, for inference only: there is no gradient, and an operand
that requires one is refused. All floating operands share one dtype, ``x`` and ``residual`` are
two-dimensional ``[M, K]`` with any row stride. Activations are named as in
:data:`ss1_compile.kernels.fused_portable.ACTIVATIONS`.

Rounding: ``s`` is rounded to x's dtype, the norm's statistics are taken of that in float32 and the
norm is rounded to x's dtype before it is sketched, as without fusion. A CUDA kernel may keep what
lies between (an activation's result, its product with the gate) in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ss1_compile.kernels import executor, fused_checks, fused_cuda, fused_portable
from ss1_compile.kernels.fused_checks import refuse_gradients
from ss1_compile.kernels.launch import once_per_form

_LIBRARY = torch.library.Library("ss1", "FRAGMENT")
_SCHEMAS = {
    "norm_sketch": (
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor sketch, "
        "SymInt reduced_features, float eps, bool rms, bool keep_norm) "
        "-> (Tensor sketched, Tensor summed, Tensor normed)"
    ),
    "activation_sketch": (
        "(Tensor x, Tensor? gate, Tensor sketch, SymInt reduced_features, str activation) -> Tensor"
    ),
    "matmul": (
        "(Tensor sketched, Tensor[] z, Tensor?[] bias, Tensor? residual, str activation) -> Tensor"
    ),
    "matmul_sketch": (
        "(Tensor sketched, Tensor z, Tensor? bias, Tensor? z_gate, Tensor? gate_bias, "
        "str activation, Tensor sketch, SymInt reduced_features) -> Tensor"
    ),
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# --- fakes --------------------------------------------------------------------------------------


@torch.library.register_fake("ss1::norm_sketch", lib=_LIBRARY)
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sketch: Tensor,
    reduced_features: int,
    eps: float,
    rms: bool,
    keep_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    refuse_gradients("norm_sketch", x, residual, weight, bias, sketch)
    fused_checks.norm_sketch(x, residual, weight, bias, sketch, reduced_features)
    rows, features = x.shape
    return (
        x.new_empty(sketch.shape[0], rows, reduced_features),
        x.new_empty(0) if residual is None else x.new_empty(rows, features),
        x.new_empty(rows, features) if keep_norm else x.new_empty(0),
    )


@torch.library.register_fake("ss1::activation_sketch", lib=_LIBRARY)
def _(
    x: Tensor, gate: Tensor | None, sketch: Tensor, reduced_features: int, activation: str
) -> Tensor:
    refuse_gradients("activation_sketch", x, gate, sketch)
    fused_checks.activation_sketch(x, gate, sketch, reduced_features, activation)
    return x.new_empty(sketch.shape[0], x.shape[0], reduced_features)


@torch.library.register_fake("ss1::matmul", lib=_LIBRARY)
def _(
    sketched: Tensor,
    z: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    refuse_gradients("matmul", sketched, *z, *bias, residual)
    total = fused_checks.matmul(sketched, z, bias, residual, activation)
    return sketched.new_empty(sketched.shape[1], total)


@torch.library.register_fake("ss1::matmul_sketch", lib=_LIBRARY)
def _(
    sketched: Tensor,
    z: Tensor,
    bias: Tensor | None,
    z_gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    sketch: Tensor,
    reduced_features: int,
) -> Tensor:
    refuse_gradients("matmul_sketch", sketched, z, bias, z_gate, gate_bias, sketch)
    fused_checks.matmul_sketch(
        sketched, z, bias, z_gate, gate_bias, activation, sketch, reduced_features
    )
    return sketched.new_empty(sketch.shape[0], sketched.shape[1], reduced_features)


# --- dispatch -----------------------------------------------------------------------------------


def _register_device(key: str, kernels: Any) -> None:
    """Register the functions of ``kernels`` that the operators are named after, behind checks."""

    @once_per_form
    def check_norm_sketch(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, *others: Any
    ) -> None:
        fused_checks.norm_sketch(x, residual, weight, *others)
        fused_checks.rows("norm_sketch", "residual", residual, x.shape[0])

    @once_per_form
    def check_activation_sketch(x: Tensor, gate: Tensor | None, *others: Any) -> None:
        fused_checks.activation_sketch(x, gate, *others)
        fused_checks.rows("activation_sketch", "gate", gate, x.shape[0])

    @once_per_form
    def check_matmul(
        sketched: Tensor,
        z: Sequence[Tensor],
        bias: Sequence[Tensor | None],
        residual: Tensor | None,
        activation: str,
    ) -> None:
        fused_checks.matmul(sketched, z, bias, residual, activation)
        fused_checks.rows("matmul", "residual", residual, sketched.shape[1])

    check_matmul_sketch = once_per_form(fused_checks.matmul_sketch)

    def norm_sketch(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        sketch: Tensor,
        reduced_features: int,
        eps: float,
        rms: bool,
        keep_norm: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        refuse_gradients("norm_sketch", x, residual, weight, bias, sketch)
        check_norm_sketch(x, residual, weight, bias, sketch, reduced_features)
        results: tuple[Tensor, Tensor, Tensor] = kernels.norm_sketch(
            x, residual, weight, bias, sketch, reduced_features, eps, rms, keep_norm
        )
        return results

    def activation_sketch(
        x: Tensor, gate: Tensor | None, sketch: Tensor, reduced_features: int, activation: str
    ) -> Tensor:
        refuse_gradients("activation_sketch", x, gate, sketch)
        check_activation_sketch(x, gate, sketch, reduced_features, activation)
        sketched: Tensor = kernels.activation_sketch(x, gate, sketch, reduced_features, activation)
        return sketched

    def matmul(
        sketched: Tensor,
        z: Sequence[Tensor],
        bias: Sequence[Tensor | None],
        residual: Tensor | None,
        activation: str,
    ) -> Tensor:
        refuse_gradients("matmul", sketched, *z, *bias, residual)
        check_matmul(sketched, z, bias, residual, activation)
        y: Tensor = kernels.matmul(sketched, z, bias, residual, activation)
        return y

    def matmul_sketch(
        sketched: Tensor,
        z: Tensor,
        bias: Tensor | None,
        z_gate: Tensor | None,
        gate_bias: Tensor | None,
        activation: str,
        sketch: Tensor,
        reduced_features: int,
    ) -> Tensor:
        operands = (sketched, z, bias, z_gate, gate_bias)
        refuse_gradients("matmul_sketch", *operands, sketch)
        check_matmul_sketch(*operands, activation, sketch, reduced_features)
        further: Tensor = kernels.matmul_sketch(*operands, activation, sketch, reduced_features)
        return further

    for function in (norm_sketch, activation_sketch, matmul, matmul_sketch):
        name = function.__name__
        if key == "CUDA":
            executor.on_cuda.implement(_LIBRARY, name, _SCHEMAS[name], function)
        else:
            _LIBRARY.impl(name, function, key)


_register_device("CPU", fused_portable)
_register_device("CUDA", fused_cuda)


# --- autograd -----------------------------------------------------------------------------------

# No gradient: kernels and fakes refuse by themselves, and dispatch passes over autograd. A Python
# kernel there would cost a second dispatch at every call, some 10 µs of the host's time.
for _name in _SCHEMAS:
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
