"""``torch.ops.ss1``: schemas, shapes, dispatch, autograd and autocast.

==============  ==================================================================================
``linear``      ``y [..., N]`` from ``x [..., K]``, ``sketch``, ``z [N, K_c]``, ``bias [N]``
``sketch``      ``X̃ [J, M, K_c]`` from ``x [M, K]``
``unsketch``    its adjoint: ``[M, K]`` from ``g [J, M, K_c]``
==============  ==================================================================================

``sketch`` (the operand) is one tensor whose dtype tells the kind of sketch; see
:mod:`ss1_compile.kernels.layout`. All floating operands share one dtype.

The operators are opaque to the compiler on purpose: left to Inductor as aten gathers, a sketch runs
several times slower than the dense layer it replaces.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ss1_compile.kernels import cuda, executor, native
from ss1_compile.kernels.launch import once_per_form
from ss1_compile.kernels.layout import block_n, group_size, is_rotation
from ss1_compile.kernels.transforms import multilinear_tangent, register_gradients

_LIBRARY = torch.library.Library("ss1", "FRAGMENT")
_SCHEMAS = {
    "linear": "(Tensor x, Tensor sketch, Tensor z, Tensor? bias=None) -> Tensor",
    "sketch": "(Tensor x, Tensor sketch, SymInt reduced_features) -> Tensor",
    "unsketch": "(Tensor g, Tensor sketch, SymInt in_features) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# --- shapes -------------------------------------------------------------------------------------


# Plain comparisons: torch._check costs more than a small layer at every call, and none of the sizes
# compared here is one that may stay symbolic (M is not compared).


def check_sketch(
    op: str, sketch: Tensor, in_features: int, reduced_features: int, reads: str = "x"
) -> None:
    """Raise ``RuntimeError`` in the name of ``ss1::<op>`` unless the sketch fits the sizes.

    ``reads`` names what is sketched.
    """
    shape = sketch.shape
    rotation = sketch.dtype == torch.int32
    if len(shape) != (3 if rotation else 4) or not (rotation or sketch.is_floating_point()):
        raise RuntimeError(
            f"ss1::{op}: sketch must be int32 [J, G, c] or floating [J, G, gsize, r], "
            f"got {sketch.dtype} {tuple(shape)}"
        )
    groups = shape[1]
    if (
        not groups
        or reduced_features % groups
        or (not rotation and reduced_features // groups != shape[3])
    ):
        raise RuntimeError(
            f"ss1::{op}: {reduced_features} reduced features do not fit a sketch of shape "
            f"{tuple(shape)}"
        )
    size = group_size(sketch, reduced_features)
    most, least = groups * size, (groups - 1) * size + 1
    if not least <= in_features <= most:
        raise RuntimeError(
            f"ss1::{op}: a sketch of {groups} groups of {size} features takes {least} to {most} "
            f"input features, {reads} has {in_features}"
        )


def check_operands(x: Tensor, sketch: Tensor, z: Tensor, bias: Tensor | None) -> None:
    """Raise ``RuntimeError`` naming the operand unless shapes and dtypes fit ``ss1::linear``."""
    if z.dim() != 2:
        raise RuntimeError(f"ss1::linear: z must be [N, K_c], got {tuple(z.shape)}")
    if x.dim() < 1:
        raise RuntimeError("ss1::linear: x must have at least one dimension")
    if x.dtype != z.dtype or not x.is_floating_point():
        raise RuntimeError(
            f"ss1::linear: x is {x.dtype} but z is {z.dtype}; cast one, or use torch.autocast"
        )
    out_features, reduced_features = z.shape
    check_sketch("linear", sketch, x.shape[-1], reduced_features)
    num_hashes = sketch.shape[0]
    if not num_hashes or (num_hashes - 1) * block_n(out_features, num_hashes) >= out_features:
        raise RuntimeError(
            f"ss1::linear: {num_hashes} column blocks leave some empty at N = {out_features}"
        )
    if bias is not None and (bias.dtype != z.dtype or bias.shape != z.shape[:1]):
        raise RuntimeError(
            f"ss1::linear: bias must be {z.dtype} [{out_features}], "
            f"got {bias.dtype} {tuple(bias.shape)}"
        )


@torch.library.register_fake("ss1::linear", lib=_LIBRARY)
def _(x: Tensor, sketch: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
    check_operands(x, sketch, z, bias)
    return x.new_empty((*x.shape[:-1], z.shape[0]))


@torch.library.register_fake("ss1::sketch", lib=_LIBRARY)
def _(x: Tensor, sketch: Tensor, reduced_features: int) -> Tensor:
    check_sketch("sketch", sketch, x.shape[1], reduced_features)
    return x.new_empty((sketch.shape[0], x.shape[0], reduced_features))


@torch.library.register_fake("ss1::unsketch", lib=_LIBRARY)
def _(g: Tensor, sketch: Tensor, in_features: int) -> Tensor:
    check_sketch("unsketch", sketch, in_features, g.shape[2])
    return g.new_empty((g.shape[1], in_features))


# --- dispatch -----------------------------------------------------------------------------------


def _register_device(key: str, kernels: ModuleType) -> None:
    """Register ``kernels.linear``, ``.sketch`` and ``.unsketch`` behind the checks."""
    check_linear = once_per_form(check_operands)

    def linear(x: Tensor, sketch: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
        check_linear(x, sketch, z, bias)
        y: Tensor = kernels.linear(x, sketch, z, bias)
        return y

    def sketch(x: Tensor, sketch: Tensor, reduced_features: int) -> Tensor:
        check_sketch("sketch", sketch, x.shape[1], reduced_features)
        sketched: Tensor = kernels.sketch(x, sketch, reduced_features)
        return sketched

    def unsketch(g: Tensor, sketch: Tensor, in_features: int) -> Tensor:
        check_sketch("unsketch", sketch, in_features, g.shape[2])
        unsketched: Tensor = kernels.unsketch(g, sketch, in_features)
        return unsketched

    for name, function in (("linear", linear), ("sketch", sketch), ("unsketch", unsketch)):
        if key == "CUDA":
            executor.on_cuda.implement(
                _LIBRARY, name, _SCHEMAS[name], function, differentiable=True
            )
        else:
            _LIBRARY.impl(name, function, key)


_register_device("CPU", native)
_register_device("CUDA", cuda)


# --- autograd -----------------------------------------------------------------------------------


def _learned_sketch_grad(x: Tensor, g: Tensor, sketch: Tensor) -> Tensor:
    """``dS[j, g] = x_gᵀ · dX̃[j, :, g]`` for ``x [M, K]`` and ``g [J, M, K_c]``."""
    num_hashes, groups, size, rank = sketch.shape
    x = torch.nn.functional.pad(x, (0, groups * size - x.shape[1]))
    return torch.einsum(
        "mgk,jmgr->jgkr",
        x.reshape(-1, groups, size),
        g.reshape(num_hashes, -1, groups, rank),
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, sketch, z, bias = inputs
    ctx.save_for_backward(x, sketch, z)
    ctx.has_bias = bias is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``y[:, j] = X̃[j] z_jᵀ + b``; X̃ is recomputed rather than kept."""
    x, sketch, z = ctx.saved_tensors
    flat, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    need_x, need_sketch, need_z = ctx.needs_input_grad[:3]
    need_sketch = need_sketch and not is_rotation(sketch)
    width = block_n(z.shape[0], sketch.shape[0])
    grad_blocks = flat_grad.split(width, dim=1)
    grad_x = grad_sketch = grad_z = grad_bias = None
    if need_x or need_sketch:
        pairs = zip(grad_blocks, z.split(width), strict=True)
        grad_sketched = torch.stack([block @ rows for block, rows in pairs])
        if need_x:
            unsketched = torch.ops.ss1.unsketch(grad_sketched, sketch, x.shape[-1])
            grad_x = unsketched.reshape(x.shape)
        if need_sketch:
            grad_sketch = _learned_sketch_grad(flat, grad_sketched, sketch)
    if need_z:
        sketched = torch.ops.ss1.sketch(flat, sketch, z.shape[1])
        pairs = zip(grad_blocks, sketched.unbind(), strict=True)
        grad_z = torch.cat([block.t() @ rows for block, rows in pairs])
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = flat_grad.sum(0)
    return grad_x, grad_sketch, grad_z, grad_bias


def _sketch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, sketch, _ = inputs
    ctx.save_for_backward(x, sketch)


def _sketch_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, sketch = ctx.saved_tensors
    grad_sketch = None
    if ctx.needs_input_grad[1] and not is_rotation(sketch):
        grad_sketch = _learned_sketch_grad(x, grad, sketch)
    return torch.ops.ss1.unsketch(grad.contiguous(), sketch, x.shape[1]), grad_sketch, None


def _unsketch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, sketch, _ = inputs
    ctx.save_for_backward(g, sketch)


def _unsketch_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g, sketch = ctx.saved_tensors
    grad_sketch = None
    if ctx.needs_input_grad[1] and not is_rotation(sketch):
        grad_sketch = _learned_sketch_grad(grad, g, sketch)
    return torch.ops.ss1.sketch(grad.contiguous(), sketch, g.shape[2]), grad_sketch, None


def _register_gradients() -> None:
    ops = torch.ops.ss1
    linear = multilinear_tangent(ops.linear, inputs=3)
    register_gradients(_LIBRARY, "linear", _linear_backward, _linear_setup, linear)
    sketch = multilinear_tangent(ops.sketch, inputs=2)
    register_gradients(_LIBRARY, "sketch", _sketch_backward, _sketch_setup, sketch, rows=(0, 1))
    unsketch = multilinear_tangent(ops.unsketch, inputs=2)
    register_gradients(
        _LIBRARY, "unsketch", _unsketch_backward, _unsketch_setup, unsketch, rows=(1, 0)
    )


_register_gradients()


# --- autocast -----------------------------------------------------------------------------------


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    """Cast like a linear layer: to the region's dtype, which ``register_autocast`` would fix."""
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def linear(x: Tensor, sketch: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            y: Tensor = torch.ops.ss1.linear(cast(x), cast(sketch), cast(z), cast(bias))
            return y

    _LIBRARY.impl("linear", linear, dispatch_key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
