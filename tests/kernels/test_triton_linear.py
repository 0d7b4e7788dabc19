import pytest
import torch
from triton_support import DTYPES, ON_GPU, assert_close, randn, random_code

from ss1_compile.kernels import cuda, lowering, reference, triton_decode, triton_sketch  # isort: skip

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")

# rows, K, c, J, B_K, N: N not divisible by J, one row, few, many
LAYERS = [(1, 120, 4, 3, 16, 30), (5, 250, 2, 2, 64, 130), (70, 64, 1, 1, 8, 20)]
if ON_GPU:
    LAYERS += [(m, 1000, c, c, 32, 776) for m in (1, 7, 64, 65, 300) for c in (1, 2, 3, 5, 8, 16)]
    LAYERS += [(64, 4096, 4, 4, 128, 1024), (1, 4096, 8, 8, 64, 4096)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features", "c", "hashes", "block_k", "out_features"), LAYERS)
def test_every_lowering_is_the_definition(
    rows, features, c, hashes, block_k, out_features, dtype, bias
):
    groups = -(-features // (c * block_k))
    code = random_code(hashes, groups, c, block_k)
    x = randn(rows, features, dtype=dtype)
    z = randn(out_features, groups * block_k, dtype=dtype)
    b = randn(out_features, dtype=dtype) if bias else None
    expected = reference.linear(x, code, z, b)
    for name in (None, *cuda.describe(x.shape[0], x.shape[1], code, z, b).candidates()):
        with lowering.override(name):
            y = cuda.linear(x, code, z, b)
        assert y.is_contiguous()
        assert_close(y, expected, factor=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_learned_sketch(rows, dtype):
    blocks = randn(1, 3, 32, 12, dtype=dtype)
    x, z = randn(rows, 90, dtype=dtype), randn(50, 36, dtype=dtype)
    y = cuda.linear(x.view(1, rows, 90), blocks, z, None)
    assert_close(y[0], reference.linear(x, blocks, z), factor=2)


@pytest.mark.parametrize("split", [1, 2, 4])
def test_split_k_sums_in_a_fixed_order(split):
    code = random_code(2, 4, 2, 64)
    x, z = randn(9, 512), randn(130, 256)
    sketched = triton_sketch.sketch(x, code, 256)
    first = triton_decode.stream(sketched, z, None, tile=(64, split, 2))
    assert_close(first, reference.linear(x, code, z))
    again = triton_decode.stream(sketched, z, None, tile=(64, split, 2))
    assert torch.equal(first, again)


def test_strided_z_and_no_rows():
    code = random_code(2, 2, 2, 32)
    x, z = randn(5, 128), randn(64, 40)
    assert_close(cuda.linear(x, code, z.t(), None), reference.linear(x, code, z.t()))
    assert cuda.linear(x[:0], code, z.t(), None).shape == (0, 40)


def test_float64_takes_the_portable_path():
    code = random_code(2, 2, 2, 32)
    x, z = randn(5, 128).double(), randn(40, 64).double()
    torch.testing.assert_close(
        cuda.linear(x, code, z, None).cpu(), reference.linear(x, code, z), rtol=1e-10, atol=1e-10
    )


@gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_cuda_graph_replays_with_new_inputs(rows, bias):
    code = random_code(4, 4, 4, 64)
    x = randn(rows, 1024, dtype=torch.bfloat16)
    z = randn(512, 256, dtype=torch.bfloat16)
    b = randn(512, dtype=torch.bfloat16) if bias else None
    with torch.inference_mode():
        cuda.linear(x, code, z, b)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = cuda.linear(x, code, z, b)
        for _ in range(3):
            x.copy_(randn(rows, 1024, dtype=torch.bfloat16))
            y.fill_(float("nan"))
            graph.replay()
            assert_close(y, reference.linear(x, code, z, b), factor=2)


@gpu
@needs_gpu
def test_streams_do_not_share_workspace():
    code = random_code(2, 8, 2, 64)
    z = randn(256, 1024 // 2, dtype=torch.bfloat16)
    inputs = [randn(16, 1024, dtype=torch.bfloat16) for _ in range(8)]
    streams = [torch.cuda.Stream() for _ in inputs]
    outputs = []
    torch.cuda.synchronize()
    for _ in range(5):
        outputs = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(cuda.linear(x, code, z, None))
    torch.cuda.synchronize()
    for x, y in zip(inputs, outputs, strict=True):
        assert_close(y, reference.linear(x, code, z), factor=2)


@gpu
@needs_gpu
def test_new_seeds_and_new_m_do_not_recompile():
    cache = triton_sketch._permute_kernel.device_caches
    x = randn(1000, 1024, dtype=torch.bfloat16)
    triton_sketch.sketch(x, random_code(4, 4, 4, 64), 256)
    compiled = sum(len(entry[0]) for entry in cache.values())
    for rows in (999, 777, 128, 65):
        triton_sketch.sketch(x[:rows], random_code(4, 4, 4, 64), 256)
    assert sum(len(entry[0]) for entry in cache.values()) == compiled


@gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_operands_device():
    code = random_code(2, 2, 2, 32).to("cuda:1")
    x, z = randn(70, 128).to("cuda:1"), randn(40, 64).to("cuda:1")
    with torch.cuda.device(0):
        y = cuda.linear(x, code, z, None)
    assert y.device == x.device
    assert_close(y, reference.linear(x, code, z))
