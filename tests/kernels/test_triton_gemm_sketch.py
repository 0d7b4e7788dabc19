import pytest
import torch
import torch.nn.functional as F
from triton_support import ACTIVATIONS, DTYPES, ON_GPU, assert_close, randn

from ss1_compile.kernels import triton_elementwise, triton_gemm_sketch  # isort: skip

HALF = [dtype for dtype in DTYPES if dtype != torch.float32]


def expected(sketched, z, bias, blocks, activation, gate=None):
    def product(z, bias):
        y = sketched[0].double() @ z.double().T
        return y if bias is None else y + bias.double()

    h = product(z, bias)
    h = ACTIVATIONS[activation](h if gate is None else product(*gate)) * (1 if gate is None else h)
    _, groups, size, rank = blocks.shape
    h = F.pad(h, (0, groups * size - h.shape[1])).view(-1, groups, size)
    return torch.einsum("mgs,gsr->mgr", h, blocks[0].double()).reshape(1, -1, groups * rank)


# M, K_c, N, gsize, r: a ragged last group, groups of one and of several pieces, narrow and odd r
SHAPES = [(70, 72, 90, 32, 8), (5, 16, 40, 40, 24), (33, 64, 128, 64, 16)]
TILE = (32, 32, 4, 2, None)
if ON_GPU:
    SHAPES += [(1000, 256, 4096, 128, 32), (513, 200, 3000, 192, 48), (300, 512, 1536, 384, 96)]
    SHAPES += [(1, 64, 500, 128, 12), (130, 1024, 1000, 256, 128)]
    TILE = None


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "reduced", "features", "size", "rank"), SHAPES)
def test_matmul_sketch(rows, reduced, features, size, rank, gated, dtype):
    sketched = randn(1, rows, reduced, dtype=dtype)
    z = randn(features, reduced, dtype=dtype) / reduced**0.5
    bias = randn(features, dtype=dtype)
    # rows of zeros would hide what is read beyond N
    blocks = randn(1, -(-features // size), size, rank, dtype=dtype)
    gate = (randn(features, reduced, dtype=dtype) / reduced**0.5, None) if gated else None
    assert triton_gemm_sketch.supported(sketched, z, blocks)
    y = triton_gemm_sketch.matmul_sketch(sketched, z, bias, blocks, "gelu", gate=gate, tile=TILE)
    assert_close(y, expected(sketched, z, bias, blocks, "gelu", gate))


@pytest.mark.parametrize("activation", list(triton_elementwise.ACTIVATIONS))
def test_activations(activation):
    sketched, z = randn(1, 20, 32, dtype=HALF[0]), randn(64, 32, dtype=HALF[0])
    blocks = randn(1, 2, 32, 16, dtype=HALF[0])
    y = triton_gemm_sketch.matmul_sketch(sketched, z, None, blocks, activation, tile=TILE)
    assert_close(y, expected(sketched, z, None, blocks, activation))
