import pytest
import torch
from triton_support import ACTIVATIONS, DTYPES, ON_GPU, assert_close, randn

from ss1_compile.kernels import triton_gemm  # isort: skip

HALF = [dtype for dtype in DTYPES if dtype != torch.float32]


def expected(sketched, z, bias, activation, residual):
    width = -(-z.shape[0] // sketched.shape[0])
    pieces = zip(sketched.double(), z.double().split(width), strict=True)
    y = torch.cat([rows @ block.T for rows, block in pieces], dim=1)
    y = y if bias is None else y + bias
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


# J, M, K_c, N: N not divisible by J, a short last tile, K_c not a multiple of the step
SHAPES = [(3, 70, 72, 76), (1, 5, 16, 40), (4, 33, 64, 128)]
TILE = (32, 32, 4, 2)
if ON_GPU:
    SHAPES += [(4, 1000, 1024, 4096), (8, 513, 96, 1024), (3, 777, 264, 1000), (2, 64, 512, 130)]
    TILE = None


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("hashes", "rows", "reduced", "features"), SHAPES)
@pytest.mark.parametrize(("activation", "extras"), [("none", False), ("gelu", True)])
def test_grouped_matmul(hashes, rows, reduced, features, activation, extras, dtype):
    sketched = randn(hashes, rows, reduced, dtype=dtype)
    z = randn(features, reduced, dtype=dtype)
    bias = randn(features, dtype=dtype) if extras else None
    residual = randn(rows, features, dtype=dtype) if extras else None
    assert triton_gemm.supported(sketched, z)
    y = triton_gemm.grouped_matmul(
        sketched, z, bias, activation=activation, residual=residual, tile=TILE, block_k=32
    )
    assert_close(y, expected(sketched, z, bias, activation, residual))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation):
    sketched, z = randn(1, 20, 32, dtype=HALF[0]), randn(48, 32, dtype=HALF[0])
    y = triton_gemm.grouped_matmul(sketched, z, activation=activation, tile=TILE, block_k=32)
    assert_close(y, expected(sketched, z, None, activation, None))


def test_two_halves_and_a_strided_output():
    sketched, z = randn(2, 20, 32, dtype=HALF[0]), randn(512, 32, dtype=HALF[0])
    wide = torch.full((20, 520), float("nan"), dtype=HALF[0], device=sketched.device)
    tile = TILE and (32, 256, 4, 2)
    triton_gemm.grouped_matmul(sketched, z, out=wide[:, :512], tile=tile, block_k=32)
    assert_close(wide[:, :512], expected(sketched, z, None, "none", None))
    assert wide[:, 512:].isnan().all()


def test_unsupported_operands_are_told():
    z = randn(16, 32, dtype=torch.float16)
    assert not triton_gemm.supported(randn(1, 4, 32), z)
    assert not triton_gemm.supported(randn(1, 4, 30, dtype=torch.float16), z)
    assert not triton_gemm.supported(randn(1, 4, 32, dtype=torch.float16), z.t())
