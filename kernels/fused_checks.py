"""What the fused operators refuse, each operand by its name; see :mod:`ss1_compile.kernels.fused`.

A function per operator, of the operator's name and operands. They compare no number of rows, which
may be symbolic where a fake is checked; :func:`rows` does, where kernels run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ss1_compile.kernels import fused_portable
from ss1_compile.kernels.layout import block_n
from ss1_compile.kernels.op import check_sketch


def _check_input(op: str, x: Tensor, sketch: Tensor, reduced_features: int) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise RuntimeError(
            f"ss1::{op}: x must be a floating [M, K], got {x.dtype} {tuple(x.shape)}; "
            f"flatten the leading dimensions"
        )
    check_sketch(op, sketch, x.shape[1], reduced_features)
    _check_kind(op, "x", x, sketch)


def _check_kind(op: str, name: str, x: Tensor, sketch: Tensor) -> None:
    if sketch.is_floating_point() and sketch.dtype != x.dtype:
        raise RuntimeError(
            f"ss1::{op}: {name} is {x.dtype} but the learned sketch is {sketch.dtype}"
        )


def _check_sketched(op: str, sketched: Tensor) -> None:
    if sketched.dim() != 3 or not sketched.is_floating_point():
        raise RuntimeError(
            f"ss1::{op}: sketched must be a floating [J, M, K_c], "
            f"got {sketched.dtype} {tuple(sketched.shape)}"
        )


def _check_layer(
    op: str, sketched: Tensor, z: Tensor, bias: Tensor | None, index: str = ""
) -> None:
    """``index`` tells apart several layers' ``z`` and ``bias``."""
    hashes, _, reduced = sketched.shape
    if z.dim() != 2 or z.shape[1] != reduced or z.dtype != sketched.dtype:
        raise RuntimeError(
            f"ss1::{op}: z{index} must be {sketched.dtype} [N, {reduced}], "
            f"got {z.dtype} {tuple(z.shape)}"
        )
    out_features = z.shape[0]
    if not out_features or (hashes - 1) * block_n(out_features, hashes) >= out_features:
        raise RuntimeError(
            f"ss1::{op}: {hashes} column blocks leave some empty at N = {out_features} of z{index}"
        )
    _check_vector(op, f"bias{index}", bias, sketched.dtype, out_features)


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


def rows(op: str, name: str, tensor: Tensor | None, expected: int) -> None:
    """Where kernels run, M is a number; in a fake a comparison would be a guard."""
    if tensor is not None and tensor.shape[0] != expected:
        raise RuntimeError(f"ss1::{op}: {name} has {tensor.shape[0]} rows, the input {expected}")


def _check_activation(op: str, activation: str) -> None:
    if activation not in fused_portable.ACTIVATIONS:
        names = ", ".join(fused_portable.ACTIVATIONS)
        raise RuntimeError(f"ss1::{op}: no activation {activation!r}; choose from {names}")


def norm_sketch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sketch: Tensor,
    reduced_features: int,
) -> None:
    """Raise ``RuntimeError`` naming the operand unless they fit."""
    _check_input("norm_sketch", x, sketch, reduced_features)
    features = x.shape[1]
    _check_like("norm_sketch", "residual", residual, x, features)
    _check_vector("norm_sketch", "weight", weight, x.dtype, features)
    _check_vector("norm_sketch", "bias", bias, x.dtype, features)


def activation_sketch(
    x: Tensor, gate: Tensor | None, sketch: Tensor, reduced_features: int, activation: str
) -> None:
    """Raise ``RuntimeError`` naming the operand unless they fit."""
    _check_input("activation_sketch", x, sketch, reduced_features)
    _check_like("activation_sketch", "gate", gate, x, x.shape[1])
    _check_activation("activation_sketch", activation)


def matmul(
    sketched: Tensor,
    z: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    residual: Tensor | None,
    activation: str,
) -> int:
    """Raise ``RuntimeError`` naming the operand unless they fit; returns ΣN."""
    _check_sketched("matmul", sketched)
    if not z or len(z) != len(bias):
        raise RuntimeError(
            f"ss1::matmul: one bias or None for each z, and at least one z; "
            f"got {len(z)} z and {len(bias)} biases"
        )
    for index, (part, start) in enumerate(zip(z, bias, strict=True)):
        _check_layer("matmul", sketched, part, start, f"[{index}]")
    total = sum(part.shape[0] for part in z)
    _check_like("matmul", "residual", residual, sketched, total)
    _check_activation("matmul", activation)
    return total


def matmul_sketch(
    sketched: Tensor,
    z: Tensor,
    bias: Tensor | None,
    z_gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    sketch: Tensor,
    reduced_features: int,
) -> None:
    """Raise ``RuntimeError`` naming the operand unless they fit; the sketch reads N features."""
    _check_sketched("matmul_sketch", sketched)
    _check_layer("matmul_sketch", sketched, z, bias)
    if z_gate is not None:
        _check_layer("matmul_sketch", sketched, z_gate, None, "_gate")
        _check_vector("matmul_sketch", "gate_bias", gate_bias, z.dtype, z.shape[0])
        if z_gate.shape != z.shape:
            raise RuntimeError(
                f"ss1::matmul_sketch: z_gate must be {list(z.shape)} as z, got {list(z_gate.shape)}"
            )
    elif gate_bias is not None:
        raise RuntimeError("ss1::matmul_sketch: gate_bias is given, but no z_gate")
    _check_activation("matmul_sketch", activation)
    check_sketch("matmul_sketch", sketch, z.shape[0], reduced_features, "the product")
    _check_kind("matmul_sketch", "sketched", sketched, sketch)


def refuse_gradients(name: str, *operands: Tensor | None) -> None:
    """Raise ``RuntimeError`` where a gradient is wanted of an operand, rather than lose it."""
    if torch.is_grad_enabled() and any(o is not None and o.requires_grad for o in operands):
        raise RuntimeError(
            f"ss1::{name} has no gradient: run under torch.no_grad(), or train through "
            f"ss1::linear (SS1Linear), which has one"
        )
