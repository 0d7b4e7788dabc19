"""Fused operators: a producer in front of the sketch, the GEMM with its epilogue behind it.

======================  ==========================================================================
``norm_sketch``         ``s = x + residual``; ``X̃`` of ``LayerNorm(s)`` or ``RMSNorm(s)``
``activation_sketch``   ``X̃`` of ``act(x)``, or of ``act(gate)·x``
``matmul``              ``y [M, ΣN] = act(X̃ zᵀ + b) + residual`` for linears that share ``X̃``
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

from ss1_compile.kernels import executor, fused_cuda, fused_portable
from ss1_compile.kernels.launch import once_per_form
from ss1_compile.kernels.layout import block_n
from ss1_compile.kernels.op import check_sketch

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
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# --- checks -------------------------------------------------------------------------------------


def _check_input(op: str, x: Tensor, sketch: Tensor, reduced_features: int) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise RuntimeError(
            f"ss1::{op}: x must be a floating [M, K], got {x.dtype} {tuple(x.shape)}; "
            f"flatten the leading dimensions"
        )
    check_sketch(op, sketch, x.shape[1], reduced_features)
    if sketch.is_floating_point() and sketch.dtype != x.dtype:
        raise RuntimeError(f"ss1::{op}: x is {x.dtype} but the learned sketch is {sketch.dtype}")


def _check_like(op: str, name: str, tensor: Tensor | None, x: Tensor, columns: int) -> None:
    """Refuse ``tensor`` unless it is ``[M, columns]`` of x's dtype; M may be symbolic."""
    if tensor is None:
        return
    if tensor.dim() != 2 or tensor.shape[1] != columns or tensor.dtype != x.dtype:
        raise RuntimeError(
            f"ss1::{op}: {name} must be {x.dtype} [M, {columns}], "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )


def _check_vector(op: str, name: str, vector: Tensor | None, dtype: torch.dtype, size: int) -> None:
    if vector is not None and (vector.dtype != dtype or tuple(vector.shape) != (size,)):
        raise RuntimeError(
            f"ss1::{op}: {name} must be {dtype} [{size}], got {vector.dtype} {tuple(vector.shape)}"
        )


def _check_rows(op: str, name: str, tensor: Tensor | None, rows: int) -> None:
    """Where kernels run, M is a number; in a fake a comparison would be a guard."""
    if tensor is not None and tensor.shape[0] != rows:
        raise RuntimeError(f"ss1::{op}: {name} has {tensor.shape[0]} rows, the input {rows}")


def _check_activation(op: str, activation: str) -> None:
    if activation not in fused_portable.ACTIVATIONS:
        names = ", ".join(fused_portable.ACTIVATIONS)
        raise RuntimeError(f"ss1::{op}: no activation {activation!r}; choose from {names}")


def _check_norm_sketch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sketch: Tensor,
    reduced_features: int,
) -> None:
    _check_input("norm_sketch", x, sketch, reduced_features)
    features = x.shape[1]
    _check_like("norm_sketch", "residual", residual, x, features)
    _check_vector("norm_sketch", "weight", weight, x.dtype, features)
    _check_vector("norm_sketch", "bias", bias, x.dtype, features)


def _check_activation_sketch(
    x: Tensor, gate: Tensor | None, sketch: Tensor, reduced_features: int, activation: str
) -> None:
    _check_input("activation_sketch", x, sketch, reduced_features)
    _check_like("activation_sketch", "gate", gate, x, x.shape[1])
    _check_activation("activation_sketch", activation)


def _check_matmul(
    sketched: Tensor,
    z: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    residual: Tensor | None,
    activation: str,
) -> int:
    """Raise ``RuntimeError`` naming the operand unless they fit; returns ΣN."""
    if sketched.dim() != 3 or not sketched.is_floating_point():
        raise RuntimeError(
            f"ss1::matmul: sketched must be a floating [J, M, K_c], "
            f"got {sketched.dtype} {tuple(sketched.shape)}"
        )
    if not z or len(z) != len(bias):
        raise RuntimeError(
            f"ss1::matmul: one bias or None for each z, and at least one z; "
            f"got {len(z)} z and {len(bias)} biases"
        )
    hashes, _, reduced = sketched.shape
    for index, part in enumerate(z):
        if part.dim() != 2 or part.shape[1] != reduced or part.dtype != sketched.dtype:
            raise RuntimeError(
                f"ss1::matmul: z[{index}] must be {sketched.dtype} [N, {reduced}], "
                f"got {part.dtype} {tuple(part.shape)}"
            )
        out_features = part.shape[0]
        if not out_features or (hashes - 1) * block_n(out_features, hashes) >= out_features:
            raise RuntimeError(
                f"ss1::matmul: {hashes} column blocks leave some empty at N = {out_features} "
                f"of z[{index}]"
            )
        _check_vector("matmul", f"bias[{index}]", bias[index], sketched.dtype, out_features)
    total = sum(part.shape[0] for part in z)
    _check_like("matmul", "residual", residual, sketched, total)
    _check_activation("matmul", activation)
    return total


def _refuse_gradients(name: str, *operands: Tensor | None) -> None:
    """Raise ``RuntimeError`` where a gradient is wanted of an operand, rather than lose it."""
    if torch.is_grad_enabled() and any(o is not None and o.requires_grad for o in operands):
        raise RuntimeError(
            f"ss1::{name} has no gradient: run under torch.no_grad(), or train through "
            f"ss1::linear (SS1Linear), which has one"
        )


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
    _refuse_gradients("norm_sketch", x, residual, weight, bias, sketch)
    _check_norm_sketch(x, residual, weight, bias, sketch, reduced_features)
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
    _refuse_gradients("activation_sketch", x, gate, sketch)
    _check_activation_sketch(x, gate, sketch, reduced_features, activation)
    return x.new_empty(sketch.shape[0], x.shape[0], reduced_features)


@torch.library.register_fake("ss1::matmul", lib=_LIBRARY)
def _(
    sketched: Tensor,
    z: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    _refuse_gradients("matmul", sketched, *z, *bias, residual)
    total = _check_matmul(sketched, z, bias, residual, activation)
    return sketched.new_empty(sketched.shape[1], total)


# --- dispatch -----------------------------------------------------------------------------------


def _register_device(key: str, kernels: Any) -> None:
    """Register ``kernels.norm_sketch``, ``.activation_sketch`` and ``.matmul`` behind checks."""

    @once_per_form
    def check_norm_sketch(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, *others: Any
    ) -> None:
        _check_norm_sketch(x, residual, weight, *others)
        _check_rows("norm_sketch", "residual", residual, x.shape[0])

    @once_per_form
    def check_activation_sketch(x: Tensor, gate: Tensor | None, *others: Any) -> None:
        _check_activation_sketch(x, gate, *others)
        _check_rows("activation_sketch", "gate", gate, x.shape[0])

    @once_per_form
    def check_matmul(
        sketched: Tensor,
        z: Sequence[Tensor],
        bias: Sequence[Tensor | None],
        residual: Tensor | None,
        activation: str,
    ) -> None:
        _check_matmul(sketched, z, bias, residual, activation)
        _check_rows("matmul", "residual", residual, sketched.shape[1])

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
        _refuse_gradients("norm_sketch", x, residual, weight, bias, sketch)
        check_norm_sketch(x, residual, weight, bias, sketch, reduced_features)
        results: tuple[Tensor, Tensor, Tensor] = kernels.norm_sketch(
            x, residual, weight, bias, sketch, reduced_features, eps, rms, keep_norm
        )
        return results

    def activation_sketch(
        x: Tensor, gate: Tensor | None, sketch: Tensor, reduced_features: int, activation: str
    ) -> Tensor:
        _refuse_gradients("activation_sketch", x, gate, sketch)
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
        _refuse_gradients("matmul", sketched, *z, *bias, residual)
        check_matmul(sketched, z, bias, residual, activation)
        y: Tensor = kernels.matmul(sketched, z, bias, residual, activation)
        return y

    for function in (norm_sketch, activation_sketch, matmul):
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
