"""Experts: the grouped and batched operators against the definition, one expert at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ss1_compile.kernels.experts  # noqa: F401 - registers the operators
from ss1_compile import SS1Structure
from ss1_compile.kernels import reference


def made(seed, experts, in_features, out_features, reduction, dtype=torch.float64, hashes=None):
    generator = torch.Generator().manual_seed(seed)
    structure = SS1Structure.create(
        in_features, out_features, reduction, block_k=8, num_hashes=hashes, seed=seed
    )
    shape = (experts, out_features, structure.reduced_features)
    z = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    return structure.code, z, generator


def expected(x, sketch, z, offsets):
    out, start = [], 0
    for matrix, end in zip(z, offsets.tolist(), strict=True):
        out.append(reference.linear(x[start:end], sketch, matrix))
        start = end
    return torch.cat(out)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    in_features=st.integers(8, 60),
    out_features=st.integers(8, 40),
    reduction=st.integers(1, 4),
)
def test_grouped(seed, counts, in_features, out_features, reduction):
    sketch, z, generator = made(seed, len(counts), in_features, out_features, reduction)
    x = torch.randn(sum(counts), in_features, dtype=torch.float64, generator=generator)
    offsets = torch.tensor(counts).cumsum(0)
    y = torch.ops.ss1.grouped_linear(x, sketch, z, offsets.to(torch.int32))
    torch.testing.assert_close(y, expected(x, sketch, z, offsets), atol=1e-10, rtol=1e-10)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 4),
    rows=st.integers(0, 5),
    reduction=st.integers(1, 4),
)
def test_batched(seed, experts, rows, reduction):
    sketch, z, generator = made(seed, experts, 40, 24, reduction)
    x = torch.randn(experts, rows, 40, dtype=torch.float64, generator=generator)
    y = torch.ops.ss1.batched_linear(x, sketch, z)
    for one, sample, matrix in zip(y, x, z, strict=True):
        torch.testing.assert_close(
            one, reference.linear(sample, sketch, matrix), atol=1e-10, rtol=1e-10
        )


@pytest.mark.parametrize("hashes", [1, 3])
def test_gradients(hashes):
    sketch, z, generator = made(5, 3, 16, 9, 2, hashes=hashes)
    x = torch.randn(6, 16, dtype=torch.float64, generator=generator).requires_grad_()
    z.requires_grad_()
    offsets = torch.tensor([2, 2, 6])

    def grouped(x, z):
        return torch.ops.ss1.grouped_linear(x, sketch, z, offsets)

    def batched(x, z):
        return torch.ops.ss1.batched_linear(x.view(3, 2, 16), sketch, z)

    assert torch.autograd.gradcheck(grouped, (x, z))
    assert torch.autograd.gradcheck(batched, (x, z))


def test_opcheck():
    sketch, z, generator = made(1, 3, 32, 16, 2, torch.float32)
    x = torch.randn(6, 32, generator=generator).requires_grad_()
    z.requires_grad_()
    offsets = torch.tensor([1, 4, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.ss1.grouped_linear.default, (x, sketch, z, offsets))
    grad = torch.randn(6, 16, generator=generator)
    tests = ("test_schema", "test_faketensor")
    x, z = x.detach(), z.detach()
    for name, args in (
        ("grouped_linear_grad_x", (grad, sketch, z, offsets, 32)),
        ("grouped_linear_grad_z", (grad, x, sketch, offsets, z.shape[2])),
    ):
        torch.library.opcheck(getattr(torch.ops.ss1, name).default, args, test_utils=tests)


def test_rows_of_no_expert_are_zero_on_the_cpu():
    sketch, z, generator = made(2, 2, 32, 16, 2)
    x = torch.randn(5, 32, dtype=torch.float64, generator=generator)
    y = torch.ops.ss1.grouped_linear(x, sketch, z, torch.tensor([1, 3]))
    assert not bool(y[3:].any())
    assert bool(y[:3].any())


def test_autocast():
    sketch, z, generator = made(3, 2, 32, 16, 2, torch.float32)
    x = torch.randn(4, 32, generator=generator)
    offsets = torch.tensor([1, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.ops.ss1.grouped_linear(x, sketch, z, offsets).dtype == torch.bfloat16
        assert torch.ops.ss1.batched_linear(x.view(2, 2, 32), sketch, z).dtype == torch.bfloat16


def test_compiles():
    sketch, z, generator = made(4, 3, 32, 16, 2, torch.float32)

    def function(x, index):
        order = index.argsort()
        ends = torch.searchsorted(index[order], torch.arange(3), right=True)
        return torch.ops.ss1.grouped_linear(x[order], sketch, z, ends).sum(0)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x = torch.randn(rows, 32, generator=generator)
        index = torch.randint(3, (rows,), generator=generator)
        torch.testing.assert_close(compiled(x, index), function(x, index))


def test_refuses_what_does_not_fit():
    sketch, z, _ = made(4, 3, 32, 16, 2)
    x = torch.randn(6, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"offsets must be \[3\]"):
        torch.ops.ss1.grouped_linear(x, sketch, z, torch.tensor([6]))
    with pytest.raises(RuntimeError, match="x has 2 matrices and z 3"):
        torch.ops.ss1.batched_linear(x.view(2, 3, 32), sketch, z)
    with pytest.raises(RuntimeError, match="x is torch.float32"):
        torch.ops.ss1.grouped_linear(x.float(), sketch, z, torch.tensor([1, 2, 6]))
    with pytest.raises(RuntimeError, match="x must have 2 dimensions"):
        torch.ops.ss1.grouped_linear(x[0], sketch, z, torch.tensor([1, 2, 6]))
