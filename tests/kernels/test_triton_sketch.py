import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_support import DTYPES, ON_GPU, assert_close, randn, random_code, triton

from ss1_compile.kernels import portable, triton_blocks, triton_sketch  # isort: skip

tl = pytest.importorskip("triton.language")


@triton.jit
def bias_relu(v, rows, columns, mask, bias, ready):
    return tl.maximum(v + tl.load(bias + columns), 0.0)


# rows, K, c, J, B_K: few rows and many, ragged K, K not a multiple of 8, every c
ROTATIONS = [
    (5, 100, 3, 2, 16),
    (70, 256, 4, 4, 32),
    (67, 250, 2, 3, 64),
    (4, 64, 1, 1, 8),
    (66, 130, 5, 3, 8),
    (65, 260, 16, 2, 8),
    (65, 512, 2, 1, 256),
]
if ON_GPU:
    ROTATIONS += [(m, 4096, c, c, 64) for m in (3, 1037) for c in (1, 2, 3, 4, 5, 8, 16)]
    ROTATIONS += [(333, 14336, 4, 4, 128), (257, 768, 8, 8, 32), (129, 2048, 2, 64, 128)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features", "c", "hashes", "block_k"), ROTATIONS)
def test_rotation(rows, features, c, hashes, block_k, dtype):
    groups = -(-features // (c * block_k))
    code = random_code(hashes, groups, c, block_k)
    x = randn(rows, features, dtype=dtype)
    reduced = groups * block_k
    sketched = triton_sketch.sketch(x, code, reduced)
    assert_close(sketched, portable.sketch(x.double(), code, reduced))
    g = randn(hashes, rows, reduced, dtype=dtype)
    assert_close(
        triton_sketch.unsketch(g, code, features), portable.unsketch(g.double(), code, features)
    )


BLOCKS = [(5, 100, 2, 32, 12), (3, 300, 1, 300, 20), (66, 64, 1, 64, 8), (4, 90, 1, 30, 5)]
if ON_GPU:
    BLOCKS += [(1037, 4096, j, 128, r) for j in (1, 2) for r in (16, 24, 32, 64)]
    BLOCKS += [(333, 14336, 1, 256, 64), (1, 4096, 1, 128, 32)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features", "hashes", "size", "rank"), BLOCKS)
def test_learned(rows, features, hashes, size, rank, dtype):
    groups = -(-features // size)
    blocks = randn(hashes, groups, size, rank, dtype=dtype)
    x = randn(rows, features, dtype=dtype)
    expected = portable.sketch(x.double(), blocks.double(), groups * rank)
    assert_close(triton_blocks.sketch(x, blocks), expected)
    g = randn(hashes, rows, groups * rank, dtype=dtype)
    expected = portable.unsketch(g.double(), blocks.double(), features)
    assert_close(triton_blocks.unsketch(g, blocks, features), expected)


@settings(
    max_examples=25 if ON_GPU else 5,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    rows=st.integers(1, 90),
    features=st.integers(1, 150),
    c=st.integers(1, 9),
    hashes=st.integers(1, 3),
    block_k=st.sampled_from((8, 16, 32, 64)),
    half=st.booleans(),
)
def test_sketch_is_the_definition_and_unsketch_its_adjoint(
    rows, features, c, hashes, block_k, half
):
    dtype = torch.float16 if half else torch.float32
    groups = -(-features // (c * block_k))
    code = random_code(hashes, groups, c, block_k)
    x = randn(rows, features, dtype=dtype)
    g = randn(hashes, rows, groups * block_k, dtype=dtype)
    sketched = triton_sketch.sketch(x, code, groups * block_k)
    assert_close(sketched, portable.sketch(x.double(), code, groups * block_k))
    back = triton_sketch.unsketch(g, code, features)
    left, right = (sketched.double() * g).sum(), (x.double() * back).sum()
    scale = sketched.double().norm() * g.double().norm() + 1e-30
    assert abs(left - right) / scale < 3e-3


@pytest.mark.parametrize("rows", [3, 70])
def test_strided_rows_and_columns(rows):
    code = random_code(2, 2, 2, 32)
    wide = randn(rows, 300, dtype=torch.float16)
    for x in (wide[:, :128], wide[:, 3:131], wide[:, ::2][:, :128], wide.t()[:128, :].t()[:, :128]):
        expected = portable.sketch(x.double(), code, 64)
        assert_close(triton_sketch.sketch(x, code, 64), expected)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("learned", [False, True])
def test_prologue_maps_values_before_the_sum_but_not_the_padding(rows, learned):
    features = 120
    bias = randn(128, dtype=torch.float16)
    x = randn(rows, features, dtype=torch.float16)
    mapped = torch.relu(x + bias[:features]).double()
    if learned:
        blocks = randn(1, 4, 32, 8, dtype=torch.float16)
        sketched = triton_blocks.sketch(x, blocks, prologue=bias_relu, aux=bias)
        assert_close(sketched, portable.sketch(mapped, blocks.double(), 32), factor=2)
    else:
        code = random_code(2, 2, 2, 32)
        sketched = triton_sketch.sketch(x, code, 64, prologue=bias_relu, aux=bias)
        assert_close(sketched, portable.sketch(mapped, code, 64), factor=2)


def test_no_rows():
    code = random_code(2, 2, 2, 32)
    assert triton_sketch.sketch(randn(0, 128), code, 64).shape == (2, 0, 64)
    assert triton_sketch.unsketch(randn(2, 0, 64), code, 128).shape == (0, 128)
