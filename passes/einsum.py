"""Read an einsum with a weight as a linear layer, or as one linear layer per group."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EinsumLinear:
    """Indices of ``y[batch, rows, kept] = Σ x[batch, rows, summed] · W[batch, kept, summed]``.

    Attributes:
        x: the indices of the input, in its order.
        weight: those of the weight.
        out: those of the output.
        batch: those that both operands and the output have (one weight matrix for each).
        rows: those of the input and the output.
        summed: those of both operands.
        kept: those of the weight and the output.
    """

    x: str
    weight: str
    out: str
    batch: str
    rows: str
    summed: str
    kept: str


def read_einsum(equation: str, x_at: int, x_dim: int, weight_dim: int) -> EinsumLinear | None:
    """The indices of an einsum of two operands; ``None`` if it is no product of that form.

    Args:
        equation: with or without ``->`` and ``...``.
        x_at: position of the input, 0 or 1.
        x_dim: number of dimensions of the input.
        weight_dim: that of the weight.
    """
    terms, arrow, out = equation.replace(" ", "").partition("->")
    subscripts = terms.split(",")
    if len(subscripts) != 2:
        return None
    x, weight = subscripts[x_at], subscripts[1 - x_at]
    letters = (i for i in string.ascii_letters if i not in equation)
    dots = "".join(next(letters, "") for _ in range(x_dim - len(x.replace("...", ""))))
    if not arrow:
        both = (x + weight).replace(".", "")
        out = "..." * ("..." in terms) + "".join(sorted(i for i in both if both.count(i) == 1))
    x, out = x.replace("...", dots), out.replace("...", dots)
    weight = weight.replace("...", "")  # whose ellipsis must stand for nothing
    shared = [i for i in weight if i in x]
    batch = "".join(i for i in shared if i in out)
    summed = "".join(i for i in shared if i not in out)
    kept = "".join(i for i in weight if i not in x)
    rows = "".join(i for i in x if i not in weight)
    fits = (
        bool(summed and kept)
        and len(x) == len(set(x)) == x_dim
        and len(weight) == len(set(weight)) == weight_dim
        and sorted(out) == sorted(batch + rows + kept)
    )
    return EinsumLinear(x, weight, out, batch, rows, summed, kept) if fits else None


def tensordot_equation(dims: object, left_dim: int, right_dim: int) -> str | None:
    """The einsum that ``torch.tensordot(left, right, dims)`` is; ``None`` if it is none.

    Args:
        dims: how many dimensions are summed, or ``(those of left, those of right)``.
        left_dim: number of dimensions of the left operand.
        right_dim: that of the right one.
    """
    if isinstance(dims, int):
        dims = (range(left_dim - dims, left_dim), range(dims))
    if not isinstance(dims, Sequence) or len(dims) != 2 or left_dim + right_dim > 52:
        return None
    left, right = (
        [at % size for at in ([part] if isinstance(part, int) else part)]
        for part, size in zip(dims, (left_dim, right_dim), strict=True)
    )
    a, b = list(string.ascii_letters[:left_dim]), list(string.ascii_letters[left_dim:][:right_dim])
    for i, j in zip(left, right, strict=True):
        b[j] = a[i]
    out = [i for i in a if i not in b] + [i for i in b if i not in a]
    return f"{''.join(a)},{''.join(b)}->{''.join(out)}"
