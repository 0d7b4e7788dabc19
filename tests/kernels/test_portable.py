import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ss1_compile.kernels import portable, reference
from ss1_compile.structure import SS1Structure


@st.composite
def sketches(draw):
    """``(sketch, in_features, reduced_features)`` of either kind, ragged or not, in float64."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    hashes, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        reduction, block_k = draw(st.integers(1, 9)), draw(st.sampled_from([8, 16]))
        code = torch.randint(-block_k, block_k, (hashes, groups, reduction), dtype=torch.int32)
        size, reduced = reduction * block_k, groups * block_k
    else:
        size, rank = draw(st.integers(1, 12)), draw(st.integers(1, 6))
        code = torch.randn(hashes, groups, size, rank, dtype=torch.float64)
        reduced = groups * rank
    return code, draw(st.integers((groups - 1) * size + 1, groups * size)), reduced


def sketch_matrix(code, in_features, reduced):
    identity = torch.eye(reduced, dtype=torch.float64)
    hashes = (code[j : j + 1] for j in range(code.shape[0]))
    return torch.stack([reference.materialize(one, identity, in_features).T for one in hashes])


@settings(deadline=None, max_examples=50)
@given(sketches(), st.integers(0, 5))
def test_sketch_and_adjoint(case, rows):
    code, in_features, reduced = case
    matrix = sketch_matrix(code, in_features, reduced)
    x = torch.randn(rows, in_features, dtype=torch.float64)
    torch.testing.assert_close(portable.sketch(x, code, reduced), x @ matrix)
    g = torch.randn(code.shape[0], rows, reduced, dtype=torch.float64)
    back = portable.unsketch(g, code, in_features)
    torch.testing.assert_close(back, (g @ matrix.mT).sum(0))


@settings(deadline=None, max_examples=50)
@given(sketches(), st.integers(0, 5), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_linear(case, rows, width, missing, bias):
    code, in_features, reduced = case
    hashes = code.shape[0]
    out_features = max(hashes * width - missing, (hashes - 1) * width + 1)
    assume((hashes - 1) * -(-out_features // hashes) < out_features)
    x = torch.randn(2, rows, in_features, dtype=torch.float64)
    z = torch.randn(out_features, reduced, dtype=torch.float64)
    b = torch.randn(out_features, dtype=torch.float64) if bias else None
    expected = reference.linear(x, code, z, b)
    torch.testing.assert_close(portable.linear(x, code, z, b), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_run_in_float32(dtype):
    """1 + eight times half a unit in the last place is lost if every sum is rounded."""
    reduction = 9
    structure = SS1Structure.create(8 * reduction, 1, reduction, block_k=8, signed=False)
    half_ulp = torch.finfo(dtype).eps / 2
    x = torch.full((1, 8 * reduction), half_ulp)
    x[:, :8] = 1.0
    sketched = portable.sketch(x.to(dtype), structure.code, 8)
    assert torch.equal(sketched.float(), torch.full((1, 1, 8), 1.0 + 8 * half_ulp))


@pytest.mark.parametrize("out_features", [12, 11])
def test_grouped_matmul_writes_into_out_and_takes_any_strides(out_features):
    sketched = torch.randn(3, 5, 8, dtype=torch.float64)
    z = torch.randn(8, out_features, dtype=torch.float64).t()
    bias = torch.randn(2 * out_features, dtype=torch.float64)[::2]
    blocks = zip(sketched, z.split(4), strict=True)
    expected = torch.cat([part @ rows.T for part, rows in blocks], 1) + bias
    guarded = torch.full((7, out_features + 2), 7.0, dtype=torch.float64)
    out = guarded[1:-1, 1:-1]
    assert portable.grouped_matmul(sketched, z, bias, out) is out
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(portable.grouped_matmul(sketched, z, None) + bias, expected)
    out.fill_(7.0)
    assert (guarded == 7.0).all()
