"""CUDA implementation of the fused operators; see :mod:`ss1_compile.kernels.fused`.

Importing this module needs neither a GPU nor Triton. Where no kernel applies (float64, rotations
of no power of two, no Triton) the operators are composed of PyTorch functions. ``matmul`` is in
:mod:`.products_cuda`.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

from torch import Tensor

from ss1_compile.kernels import cuda, fused_portable, lowering
from ss1_compile.kernels.launch import device_of
from ss1_compile.kernels.layout import is_rotation
from ss1_compile.kernels.products_cuda import library_activates, matmul


@cache
def _producers() -> tuple[ModuleType, ModuleType]:
    """The Triton launchers ``(norm, activation)``; at every call an import statement adds up."""
    from ss1_compile.kernels import triton_activation, triton_norm

    return triton_norm, triton_activation


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
    """``(X̃ of the norm, x + residual, the norm)``; see :mod:`.triton_norm`."""
    operands = (x, residual, weight, bias, sketch, reduced_features, eps, rms, keep_norm)
    if not x.shape[0] or not cuda._usable(x, sketch, reduced_features):
        return fused_portable.norm_sketch(*operands)
    triton_norm, _ = _producers()
    if x.shape[1] > triton_norm.MAX_FEATURES:
        return fused_portable.norm_sketch(*operands)
    with device_of(x):
        results: tuple[Tensor, Tensor, Tensor] = triton_norm.norm_sketch(*operands)
    return results


def activation_suits_sketch(learned: bool, activation: str, gated: bool) -> bool:
    """Whether the fused kernel beats one kernel for the activation and one for the sketch.

    On one NVIDIA H200 (bf16, c = 4, 16384 x 4096 and 8192 x 14336), fused against apart in µs.
    Rotation: gelu 109 and 184 against 159 and 274, others alike. Learned: gelu 137 and 231 against
    141 and 239; tanh-gelu 145 and 247 against 129 and 217; silu 138 and 234 against 122 and 205;
    gated silu 161 and 271 against 140 and 241.
    """
    return not learned or (activation == "gelu" and not gated)


def activation_sketch(
    x: Tensor, gate: Tensor | None, sketch: Tensor, reduced_features: int, activation: str
) -> Tensor:
    """``X̃`` of ``act(x)``, or of ``act(gate)·x``; see :mod:`.triton_activation`."""
    if not cuda._usable(x, sketch, reduced_features):
        return fused_portable.activation_sketch(x, gate, sketch, reduced_features, activation)
    _, triton_activation = _producers()
    with device_of(x):
        sketched: Tensor = triton_activation.activation_sketch(
            x, gate, sketch, reduced_features, activation
        )
    return sketched


@cache
def _joined_kernel() -> ModuleType:
    """The Triton launcher of product, activation and sketch in one."""
    from ss1_compile.kernels import triton_gemm_sketch

    return triton_gemm_sketch


def _joined_wins(rows: int, reduced: int, gated: bool) -> bool:
    """Whether one kernel is expected to beat the product and then the sketch.

    On one NVIDIA H200 (bf16, c = 4) in µs, with gelu: 1 x 256 → 4096 4.4 for 4.8, 64 x 1024 →
    14336 7.9 for 15, 16384 x 256 → 4096 106 for 162; but 16 x 1024 → 14336 10.8 for 9.8. Gated by
    silu, K_c = 992 → 14336: 16 rows 19 for 24, 1024 rows 99 for 128, 8192 rows 712 for 804.

    Args:
        rows: M.
        reduced: ``K_c``.
        gated: whether a second product is the first one's gate.
    """
    if gated:
        return rows >= 16
    return rows >= 64 or reduced <= 256


def _joins(sketched: Tensor, z: Tensor, z_gate: Tensor | None, sketch: Tensor) -> ModuleType | None:
    """The one kernel's launcher where it can run this call and is expected to win."""
    if sketched.shape[0] > 1 or is_rotation(sketch) or sketch.shape[0] > 1:
        return None
    if lowering.forced() not in (None, "triton"):
        return None
    if not cuda.has_tma(z.device) or sketched.data_ptr() % 16:
        return None
    kernel = _joined_kernel()
    if not all(
        kernel.supported(sketched, each, sketch) for each in (z, z_gate) if each is not None
    ):
        return None
    _, rows, reduced = sketched.shape
    return kernel if _joined_wins(rows, reduced, z_gate is not None) else None


def _activates_in_sketch(
    sketched: Tensor, bias: Tensor | None, activation: str, sketch: Tensor
) -> bool:
    """Whether the activation is better done by the sketch's kernel than by the product's."""
    if activation == "none" or library_activates(sketched, bias, activation):
        return False
    return activation_suits_sketch(not is_rotation(sketch), activation, gated=False)


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
    """The next layer's ``X̃`` of the product: in one kernel where that wins, else in two."""
    if not sketched.shape[1] or not cuda.has_kernels(sketched.dtype):
        return fused_portable.matmul_sketch(
            sketched, z, bias, z_gate, gate_bias, activation, sketch, reduced_features
        )
    sketched = sketched.contiguous()
    joined = _joins(sketched, z, z_gate, sketch)
    if joined is not None:
        gate = None if z_gate is None else (z_gate, gate_bias)
        with device_of(sketched):
            further: Tensor = joined.matmul_sketch(sketched, z, bias, sketch, activation, gate=gate)
            return further
    if z_gate is not None:
        pair = [z_gate, z], [gate_bias, bias]
        up_first = z.data_ptr() + z.nbytes == z_gate.data_ptr()
        if up_first:  # halves of one weight, which in their order are one product
            pair = [z, z_gate], [bias, gate_bias]
        values, x = matmul(sketched, *pair, None, "none").split(z.shape[0], dim=1)
        if up_first:
            values, x = x, values
        return activation_sketch(x, values, sketch, reduced_features, activation)
    if _activates_in_sketch(sketched, bias, activation, sketch):
        y = matmul(sketched, [z], [bias], None, "none")
        return activation_sketch(y, None, sketch, reduced_features, activation)
    y = matmul(sketched, [z], [bias], None, activation)
    return cuda.sketch(y, sketch, reduced_features)
