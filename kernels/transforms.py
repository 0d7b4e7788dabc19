"""Gradients of the operators, in ``backward()`` and in the transforms of ``torch.func``.

``torch.library.register_autograd`` serves ``backward()`` and AOTAutograd. Under ``torch.func`` it
fails (``grad``, ``jacrev``; pytorch/pytorch#170834) or is wrong in silence (``jvp`` returns zeros).
So while such a transform is active the operators go through an ``autograd.Function`` of the form
that ``torch.func`` asks for, with the same backward, a forward-mode rule and a batching rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tangent = Callable[[Sequence[Any], Sequence[Any]], Tensor]
"""``(inputs, their tangents or None)`` → the tangent of the output."""


def register_gradients(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., Any],
    setup: Callable[..., None],
    tangent: Tangent,
    rows: tuple[int, int] | None = None,
) -> None:
    """Register all derivatives of ``ss1::<name>``, whose first operand holds the rows.

    Args:
        library: the library that defines the operator.
        name: the operator, with a single output.
        backward: as for ``torch.library.register_autograd``.
        setup: its ``setup_context``.
        tangent: the forward-mode rule.
        rows: the axes of the rows in the first operand and in the output, along which a batch of
            first operands is laid end to end; ``None`` if the operator takes any leading axes.
    """
    torch.library.register_autograd(f"ss1::{name}", backward, setup_context=setup, lib=library)
    operator = getattr(torch.ops.ss1, name).default
    defaults = [argument.default_value for argument in operator._schema.arguments]

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Tensor:
            y: Tensor = operator(*inputs)
            return y

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            setup(ctx, inputs, output)
            is_tensor = [isinstance(value, Tensor) for value in inputs]
            ctx.save_for_forward(*(v for v, keep in zip(inputs, is_tensor, strict=True) if keep))
            ctx.is_tensor = is_tensor
            ctx.other_inputs = [None if isinstance(value, Tensor) else value for value in inputs]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return backward(ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
            tensors = iter(ctx.saved_tensors)
            pairs = zip(ctx.is_tensor, ctx.other_inputs, strict=True)
            return tangent([next(tensors) if is_tensor else v for is_tensor, v in pairs], tangents)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
            first, *others = in_dims
            if first is not None and all(dim is None for dim in others):
                return _batch_of_rows(operator, rows, first, *inputs)
            outputs = [
                operator(
                    *(
                        value if dim is None else value.select(dim, i)
                        for value, dim in zip(inputs, in_dims, strict=True)
                    )
                )
                for i in range(info.batch_size)
            ]
            return torch.stack(outputs), 0

    def under_transform(*inputs: Any) -> Tensor:
        y: Tensor = Transformed.apply(*inputs, *defaults[len(inputs) :])
        return y

    library.impl(name, under_transform, "FuncTorchDynamicLayerFrontMode")


def _batch_of_rows(
    operator: Any, rows: tuple[int, int] | None, dim: int, x: Tensor, *others: Any
) -> tuple[Tensor, int]:
    """One call for a batch of first operands that share all other ones."""
    if rows is None:
        return operator(x.movedim(dim, 0), *others), 0
    rows_in, rows_out = rows
    x = x.movedim(dim, rows_in)
    sizes = x.shape[rows_in : rows_in + 2]
    y = operator(x.flatten(rows_in, rows_in + 1), *others)
    return y.unflatten(rows_out, sizes), rows_out


def multilinear_tangent(operator: Callable[..., Tensor], inputs: int) -> Tangent:
    """The forward-mode rule of an operator that is linear in each of its first ``inputs``.

    ``dy = Σ_i operator(…, dx_i, …)``; an operand after them that is a tensor is added (a bias).
    """

    def tangent(values: Sequence[Any], tangents: Sequence[Any]) -> Tensor:
        rest = [None if v is None or isinstance(v, Tensor) else v for v in values[inputs:]]
        parts = [
            operator(*values[:i], tangents[i], *values[i + 1 : inputs], *rest)
            for i in range(inputs)
            if tangents[i] is not None and values[i].is_floating_point()
        ]
        added = [t for v, t in zip(values, tangents, strict=True) if isinstance(v, Tensor)][inputs:]
        total: Tensor = (
            sum(parts[1:], start=parts[0])
            if parts
            else torch.zeros_like(operator(*values[:inputs], *rest))
        )
        for bias in added:
            if bias is not None:
                total = total + bias
        return total

    return tangent
