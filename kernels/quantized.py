"""``torch.ops.ss1.linear_quantized`` and ``sketch_quantized``: schemas, shapes, dispatch, autograd.

====================  ============================================================================
``linear_quantized``  ``y [..., N]`` from ``x [..., K]``, ``sketch``, quantised ``z [N, K_c]``, its
                      ``scale`` float32 ``[N, groups]``, ``bias [N]``
``sketch_quantized``  ``(q [J, M, K_c], scale float32 [J, M])`` from ``x [M, K]``: the sketch of x,
                      every row ``X̃[j, m]`` quantised on its own
====================  ============================================================================

z is int8 or float8_e4m3fn (:mod:`.quantize` has the arithmetic and its edges). x is float16,
bfloat16 or float32; a learned sketch and the bias share its dtype, and so does y.

* ``dynamic=False``, weight-only: ``y = X̃[j] (scale·z_j)ᵀ + b`` in floating point.
* ``dynamic=True``: activations are quantised per token *after* the sketch, to z's dtype, inside the
  sketch kernel; ``y[m, n] = s_x[j, m] · s_z[n] · Σ_k q[j, m, k] z[n, k] + b[n]``. int8 sums are
  exact (int32), float8 sums are float32. Needs groups = 1. A row of x with a NaN or an infinity
  gives a row of NaN.

Sketches are summed in float32 and quantised from there, whatever x's dtype. Only x, a learned
sketch and the bias have gradients; they are those of the layer with dequantised z, and rounding
counts as the identity (straight-through).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ss1_compile.kernels import quantized_cuda, quantized_native
from ss1_compile.kernels.launch import once_per_form
from ss1_compile.kernels.layout import block_n, is_rotation
from ss1_compile.kernels.op import _learned_sketch_grad, check_sketch
from ss1_compile.kernels.quantize import Q_MAX, dequantize

_LIBRARY = torch.library.Library("ss1", "FRAGMENT")
_SCHEMAS = {
    "linear_quantized": "(Tensor x, Tensor sketch, Tensor z, Tensor scale, Tensor? bias=None, "
    "bool dynamic=False) -> Tensor",
    "sketch_quantized": "(Tensor x, Tensor sketch, SymInt reduced_features, bool fp8=False) -> "
    "(Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

_X_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# --- shapes -------------------------------------------------------------------------------------


def _check_x(op: str, x: Tensor, sketch: Tensor) -> None:
    if x.dtype not in _X_DTYPES:
        raise RuntimeError(
            f"ss1::{op}: x must be float16, bfloat16 or float32, got {x.dtype}; cast it"
        )
    if not is_rotation(sketch) and sketch.dtype != x.dtype:
        raise RuntimeError(f"ss1::{op}: a learned sketch must be {x.dtype}, got {sketch.dtype}")


def _check_linear(
    x: Tensor, sketch: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None, dynamic: bool
) -> None:
    op = "linear_quantized"
    if z.dtype not in Q_MAX:
        raise RuntimeError(f"ss1::{op}: z must be int8 or float8_e4m3fn, got {z.dtype}")
    if z.dim() != 2 or x.dim() < 1:
        raise RuntimeError(
            f"ss1::{op}: x must be [..., K] and z [N, K_c], "
            f"got {tuple(x.shape)} and {tuple(z.shape)}"
        )
    _check_x(op, x, sketch)
    check_sketch(op, sketch, x.shape[-1], z.shape[1])
    hashes, out_features = sketch.shape[0], z.shape[0]
    if not hashes or (hashes - 1) * block_n(out_features, hashes) >= out_features:
        raise RuntimeError(
            f"ss1::{op}: {hashes} column blocks leave some empty at N = {out_features}"
        )
    if bias is not None and (bias.dtype != x.dtype or bias.shape != z.shape[:1]):
        raise RuntimeError(
            f"ss1::{op}: bias must be {x.dtype} [{out_features}], "
            f"got {bias.dtype} {tuple(bias.shape)}"
        )
    if scale.dtype != torch.float32 or scale.dim() != 2 or scale.shape[0] != z.shape[0]:
        raise RuntimeError(
            f"ss1::{op}: scale must be float32 [{z.shape[0]}, groups], "
            f"got {scale.dtype} {tuple(scale.shape)}"
        )
    groups = scale.shape[1]
    if not groups or z.shape[1] % groups:
        raise RuntimeError(f"ss1::{op}: {groups} groups do not divide K_c = {z.shape[1]}")
    if dynamic and groups != 1:
        raise RuntimeError(
            f"ss1::{op}: dynamic=True takes one scale per row of z, got {groups} groups; "
            f"quantise z with groups = 1"
        )


def _check_sketch(x: Tensor, sketch: Tensor, reduced_features: int) -> None:
    _check_x("sketch_quantized", x, sketch)
    if x.dim() != 2:
        raise RuntimeError(f"ss1::sketch_quantized: x must be [M, K], got {tuple(x.shape)}")
    check_sketch("sketch_quantized", sketch, x.shape[1], reduced_features)


def _quantized_dtype(fp8: bool) -> torch.dtype:
    return torch.float8_e4m3fn if fp8 else torch.int8


@torch.library.register_fake("ss1::linear_quantized", lib=_LIBRARY)
def _(
    x: Tensor,
    sketch: Tensor,
    z: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    dynamic: bool = False,
) -> Tensor:
    _check_linear(x, sketch, z, scale, bias, dynamic)
    return x.new_empty((*x.shape[:-1], z.shape[0]))


@torch.library.register_fake("ss1::sketch_quantized", lib=_LIBRARY)
def _(x: Tensor, sketch: Tensor, reduced_features: int, fp8: bool = False) -> tuple[Tensor, Tensor]:
    _check_sketch(x, sketch, reduced_features)
    shape = (sketch.shape[0], x.shape[0])
    q = x.new_empty((*shape, reduced_features), dtype=_quantized_dtype(fp8))
    return q, x.new_empty(shape, dtype=torch.float32)


# --- dispatch -----------------------------------------------------------------------------------


def _register_device(key: str, kernels: ModuleType) -> None:
    """Register ``kernels.linear`` and ``kernels.sketch`` behind the checks."""
    check_linear = once_per_form(_check_linear)
    check_rows = once_per_form(_check_sketch)

    def linear_quantized(
        x: Tensor,
        sketch: Tensor,
        z: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        dynamic: bool = False,
    ) -> Tensor:
        check_linear(x, sketch, z, scale, bias, dynamic)
        y: Tensor = kernels.linear(x, sketch, z, scale, bias, dynamic)
        return y

    def sketch_quantized(
        x: Tensor, sketch: Tensor, reduced_features: int, fp8: bool = False
    ) -> tuple[Tensor, Tensor]:
        check_rows(x, sketch, reduced_features)
        rows: tuple[Tensor, Tensor] = kernels.sketch(
            x, sketch, reduced_features, _quantized_dtype(fp8)
        )
        return rows

    _LIBRARY.impl("linear_quantized", linear_quantized, key)
    _LIBRARY.impl("sketch_quantized", sketch_quantized, key)


_register_device("CPU", quantized_native)
_register_device("CUDA", quantized_cuda)


# --- autograd -----------------------------------------------------------------------------------


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, sketch, z, scale, bias, _ = inputs
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        raise RuntimeError(
            "ss1::linear_quantized: a quantised z and its scale are frozen and have no gradient; "
            "train the layer before it is quantised, or its bias and other layers only"
        )
    ctx.save_for_backward(x, sketch, z, scale)
    ctx.has_bias = bias is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, sketch, z, scale = ctx.saved_tensors
    need_sketch = ctx.needs_input_grad[1] and not is_rotation(sketch)
    flat_grad = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_sketch = grad_bias = None
    if ctx.needs_input_grad[0] or need_sketch:
        width = block_n(z.shape[0], sketch.shape[0])
        blocks = zip(flat_grad.split(width, dim=1), z.split(width), scale.split(width), strict=True)
        grad_sketched = torch.stack([g @ dequantize(q, s, x.dtype) for g, q, s in blocks])
        if ctx.needs_input_grad[0]:
            unsketched = torch.ops.ss1.unsketch(grad_sketched, sketch, x.shape[-1])
            grad_x = unsketched.reshape(x.shape)
        if need_sketch:
            flat = x.reshape(-1, x.shape[-1])
            grad_sketch = _learned_sketch_grad(flat, grad_sketched, sketch)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = flat_grad.sum(0)
    return grad_x, grad_sketch, None, None, grad_bias, None


torch.library.register_autograd(
    "ss1::linear_quantized", _linear_backward, setup_context=_linear_setup, lib=_LIBRARY
)


# --- autocast -----------------------------------------------------------------------------------


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    """Cast x, a learned sketch and the bias to the region's dtype; z and its scale stay."""
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def linear_quantized(
        x: Tensor,
        sketch: Tensor,
        z: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        dynamic: bool = False,
    ) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            y: Tensor = torch.ops.ss1.linear_quantized(
                cast(x), cast(sketch), z, scale, cast(bias), dynamic
            )
            return y

    _LIBRARY.impl("linear_quantized", linear_quantized, dispatch_key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
