"""``torch.ops.ss1`` for experts: one SS1 layer per group of rows, all with the same sketch.

===================  =============================================================================
``grouped_linear``   ``y [S, N]`` from ``x [S, K]``; expert e has the rows from ``offsets[e-1]`` to
                     ``offsets[e] - 1``; those from ``offsets[-1]`` on are unspecified
``batched_linear``   ``y [E, M, N]`` from ``x [E, M, K]``
===================  =============================================================================

Both take ``sketch`` (see :mod:`ss1_compile.kernels.layout`) and ``z [E, N, K_c]``; ``offsets [E]``
are integers that do not decrease. As the experts share the sketch, all rows are sketched at
once, and one grouped matrix product per column block follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ss1_compile.kernels import op  # noqa: F401 - registers ss1::sketch
from ss1_compile.kernels.layout import block_n

_LIBRARY = torch.library.Library("ss1", "FRAGMENT")
_LIBRARY.define(
    "grouped_linear(Tensor x, Tensor sketch, Tensor z, Tensor offsets) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "batched_linear(Tensor x, Tensor sketch, Tensor z) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(name: str, x: Tensor, dims: int, sketch: Tensor, z: Tensor) -> None:
    if z.dim() != 3 or x.dim() != dims:
        raise RuntimeError(
            f"ss1::{name}: x must have {dims} dimensions and z 3, got {tuple(x.shape)} and "
            f"{tuple(z.shape)}"
        )
    if x.dtype != z.dtype or not x.is_floating_point():
        raise RuntimeError(
            f"ss1::{name}: x is {x.dtype} but z is {z.dtype}; cast one, or use torch.autocast"
        )
    num_hashes, out_features = sketch.shape[0], z.shape[1]
    if not num_hashes or (num_hashes - 1) * block_n(out_features, num_hashes) >= out_features:
        raise RuntimeError(
            f"ss1::{name}: {num_hashes} column blocks leave some empty at N = {out_features}"
        )


def _columns(sketch: Tensor, z: Tensor) -> list[slice]:
    """The columns of every block."""
    width = block_n(z.shape[1], sketch.shape[0])
    return [slice(j * width, min((j + 1) * width, z.shape[1])) for j in range(sketch.shape[0])]


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """``(expert, its rows)`` of every expert that has rows. Reads ``offsets`` on the host."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


# --- grouped ------------------------------------------------------------------------------------


def _grouped(x: Tensor, sketch: Tensor, z: Tensor, offsets: Tensor) -> Tensor:
    _check("grouped_linear", x, 2, sketch, z)
    if offsets.shape != z.shape[:1]:
        raise RuntimeError(
            f"ss1::grouped_linear: offsets must be [{z.shape[0]}], got {list(offsets.shape)}"
        )
    sketched = torch.ops.ss1.sketch(x, sketch, z.shape[2])
    columns = _columns(sketch, z)
    if x.is_cuda and x.dtype == torch.bfloat16:  # the one case without a copy to the host
        ends = offsets.to(torch.int32)
        blocks = [
            torch._grouped_mm(sketched[j], z[:, block].mT, offs=ends)
            for j, block in enumerate(columns)
        ]
        return torch.cat(blocks, dim=1)
    y = x.new_zeros(x.shape[0], z.shape[1])
    for expert, rows in _groups(offsets):
        for j, block in enumerate(columns):
            torch.mm(sketched[j, rows], z[expert, block].t(), out=y[rows, block])
    return y


_LIBRARY.impl("grouped_linear", _grouped, "CompositeExplicitAutograd")


@torch.library.register_fake("ss1::grouped_linear", lib=_LIBRARY)
def _(x: Tensor, sketch: Tensor, z: Tensor, offsets: Tensor) -> Tensor:
    _check("grouped_linear", x, 2, sketch, z)
    return x.new_empty(x.shape[0], z.shape[1])


def _grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, sketch, z, offsets = ctx.saved_tensors
    grad_x = grad_z = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.ss1.grouped_linear_grad_x(grad, sketch, z, offsets, x.shape[1])
    if ctx.needs_input_grad[2]:
        grad_z = torch.ops.ss1.grouped_linear_grad_z(grad, x, sketch, offsets, z.shape[2])
    return grad_x, None, grad_z, None


torch.library.register_autograd(
    "ss1::grouped_linear", _grouped_backward, setup_context=_grouped_setup, lib=_LIBRARY
)

# Operators of their own, so that a compiled backward need not trace a loop over the offsets.
_LIBRARY.define(
    "grouped_linear_grad_x(Tensor grad, Tensor sketch, Tensor z, Tensor offsets, "
    "SymInt in_features) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "grouped_linear_grad_z(Tensor grad, Tensor x, Tensor sketch, Tensor offsets, "
    "SymInt reduced_features) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _grad_x(grad: Tensor, sketch: Tensor, z: Tensor, offsets: Tensor, in_features: int) -> Tensor:
    sketched = grad.new_zeros(sketch.shape[0], grad.shape[0], z.shape[2])
    for expert, rows in _groups(offsets):
        for j, block in enumerate(_columns(sketch, z)):
            torch.mm(grad[rows, block], z[expert, block], out=sketched[j, rows])
    unsketched: Tensor = torch.ops.ss1.unsketch(sketched, sketch, in_features)
    return unsketched


def _grad_z(
    grad: Tensor, x: Tensor, sketch: Tensor, offsets: Tensor, reduced_features: int
) -> Tensor:
    sketched = torch.ops.ss1.sketch(x, sketch, reduced_features)
    z = grad.new_zeros(offsets.shape[0], grad.shape[1], reduced_features)
    for expert, rows in _groups(offsets):
        for j, block in enumerate(_columns(sketch, z)):
            torch.mm(grad[rows, block].t(), sketched[j, rows], out=z[expert, block])
    return z


_LIBRARY.impl("grouped_linear_grad_x", _grad_x, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_linear_grad_z", _grad_z, "CompositeExplicitAutograd")


@torch.library.register_fake("ss1::grouped_linear_grad_x", lib=_LIBRARY)
def _(grad: Tensor, sketch: Tensor, z: Tensor, offsets: Tensor, in_features: int) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


@torch.library.register_fake("ss1::grouped_linear_grad_z", lib=_LIBRARY)
def _(grad: Tensor, x: Tensor, sketch: Tensor, offsets: Tensor, reduced_features: int) -> Tensor:
    return grad.new_empty(offsets.shape[0], grad.shape[1], reduced_features)


# --- batched ------------------------------------------------------------------------------------


def _batched(x: Tensor, sketch: Tensor, z: Tensor) -> Tensor:
    _check("batched_linear", x, 3, sketch, z)
    if x.shape[0] != z.shape[0]:
        raise RuntimeError(
            f"ss1::batched_linear: x has {x.shape[0]} matrices and z {z.shape[0]}; they must agree"
        )
    sketched = torch.ops.ss1.sketch(x.flatten(0, 1), sketch, z.shape[2])
    sketched = sketched.unflatten(1, x.shape[:2])
    blocks = [torch.bmm(sketched[j], z[:, block].mT) for j, block in enumerate(_columns(sketch, z))]
    return torch.cat(blocks, dim=2)


_LIBRARY.impl("batched_linear", _batched, "CompositeImplicitAutograd")


# --- autocast -----------------------------------------------------------------------------------


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def cast(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def grouped(x: Tensor, sketch: Tensor, z: Tensor, offsets: Tensor) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            y: Tensor = torch.ops.ss1.grouped_linear(cast(x), cast(sketch), cast(z), offsets)
            return y

    def batched(x: Tensor, sketch: Tensor, z: Tensor) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            y: Tensor = torch.ops.ss1.batched_linear(cast(x), cast(sketch), cast(z))
            return y

    _LIBRARY.impl("grouped_linear", grouped, dispatch_key)
    _LIBRARY.impl("batched_linear", batched, dispatch_key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
