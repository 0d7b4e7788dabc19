"""What an einsum says, checked by computing it."""

import math

import pytest
import torch

from ss1_compile.passes.einsum import read_einsum

SIZES = dict(zip("abcdefghijk", (2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 6), strict=True))


def computed(equation, x, weight, x_at):
    """The einsum by the indices that were read: move, flatten, multiply, unflatten, move back."""
    read = read_einsum(equation, x_at, x.dim(), weight.dim())
    sizes = dict(zip(read.x, x.shape, strict=True)) | dict(
        zip(read.weight, weight.shape, strict=True)
    )

    def shape(*groups):
        return [math.prod(sizes[i] for i in group) for group in groups]

    order = [read.x.index(i) for i in read.batch + read.rows + read.summed]
    rows = x.permute(order).reshape(shape(read.batch, read.rows, read.summed))
    order = [read.weight.index(i) for i in read.batch + read.summed + read.kept]
    matrix = weight.permute(order).reshape(shape(read.batch, read.summed, read.kept))
    names = read.batch + read.rows + read.kept
    y = torch.bmm(rows, matrix).reshape([sizes[i] for i in names])
    return y.permute([names.index(i) for i in read.out])


@pytest.mark.parametrize(
    ("equation", "x_shape", "weight_shape"),
    [
        ("abk,kj->abj", (2, 3, 6), (6, 5)),
        ("...k,kj->...j", (2, 3, 6), (6, 5)),
        ("...k,kj->...j", (6,), (6, 5)),
        ("...k, jk", (2, 3, 6), (5, 6)),
        ("a...k,kj...->ja...", (2, 3, 4, 6), (6, 5)),
        ("ak,kj", (3, 6), (6, 5)),
        ("abhk,hkd->abd", (2, 3, 4, 6), (4, 6, 5)),
        ("ebk,ekn->ebn", (2, 3, 6), (2, 6, 5)),
        ("...ek,ekn->e...n", (3, 4, 2, 6), (2, 6, 5)),
    ],
)
@pytest.mark.parametrize("x_at", [0, 1])
def test_reads(equation, x_shape, weight_shape, x_at):
    x = torch.randn(x_shape, dtype=torch.double)
    weight = torch.randn(weight_shape, dtype=torch.double)
    if x_at == 1:
        terms, arrow, out = equation.partition("->")
        equation = ",".join(reversed(terms.split(","))) + arrow + out
    operands = (x, weight) if x_at == 0 else (weight, x)
    expected = torch.einsum(equation, *operands)
    torch.testing.assert_close(computed(equation, x, weight, x_at), expected)


@pytest.mark.parametrize(
    ("equation", "x_dim", "weight_dim"),
    [
        ("ak,kj->aj", 3, 2),  # fewer indices than dimensions
        ("ak,jk->a", 2, 2),  # summed in the weight alone
        ("aak,kj->aj", 3, 2),  # a diagonal
        ("ak,aj->akj", 2, 2),  # nothing is summed
        ("abk,k->ab", 3, 1),  # no output features
        ("abk,kj->aj", 3, 2),  # summed over rows too
        ("...k,...kj->...j", 3, 3),  # a weight per row
        ("ak,kj,jl->al", 2, 2),
    ],
)
def test_refuses(equation, x_dim, weight_dim):
    assert read_einsum(equation, 0, x_dim, weight_dim) is None
