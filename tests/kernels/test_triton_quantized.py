import pytest
import torch
from triton_support import DTYPES, ON_GPU, TOLERANCE, assert_close, randn, random_code

from ss1_compile.kernels import (  # isort: skip
    quantized_cuda,
    reference,
    triton_quantized_decode as decode,
    triton_quantized_gemm as gemm,
    triton_quantized_sketch as sketches,
)
from ss1_compile.kernels.quantize import Q_MAX, dequantize, quantize_rows

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
FLOAT8 = torch.float8_e4m3fn
# the interpreter rounds float32 to e4m3 wrongly in the topmost binade
QUANTIZED = (torch.int8, FLOAT8) if ON_GPU else (torch.int8,)
both_dtypes = pytest.mark.parametrize("quantized", QUANTIZED)
# in the interpreter one dtype takes the same path as the next, slowly
every_dtype = pytest.mark.parametrize("dtype", DTYPES if ON_GPU else (torch.float16,))


# what the tensor cores of an H200 keep of a float8 sum: 8e-4 of its norm at 7168 slots
FLOAT8_SUM = 2e-3


def product_factor(quantized, dtype):
    """For ``assert_close``: int8 sums are exact, so only y is rounded."""
    return 1 if quantized == torch.int8 else max(2, FLOAT8_SUM / TOLERANCE[dtype])


def assert_quantized(q, scale, expected, rounding=0.0):
    """q and scale are those of the float64 rows ``expected``, up to ties and float32 sums.

    ``rounding`` is the relative error of an X̃ that was stored before it was quantised.
    """
    expected = expected.to(q.device)
    limit = Q_MAX[q.dtype]
    wanted = (expected.abs().amax(-1) / limit).float()
    wanted = torch.where(wanted < torch.finfo(torch.float32).tiny, 1.0, wanted)
    torch.testing.assert_close(scale, wanted, rtol=1e-5 + rounding, atol=0)
    assert q.float().abs().max() <= limit
    step = scale.double().unsqueeze(-1)
    error = (q.double() * step - expected).abs()
    # half a unit in the last place of 3 bits, or half of the smallest e4m3 step, 2⁻⁹
    half = 0.5 * step if q.dtype == torch.int8 else (expected.abs() / 16).clamp(min=2**-10 * step)
    # float32 sums are off by some 1e-7 of the row's greatest, also where they are small themselves
    sums = 5e-7 * limit * step
    assert (error <= half * (1 + 1e-4) + sums + 2 * rounding * expected.abs()).all()


def assert_non_finite_rows(q, scale, rows):
    """Exactly ``rows`` have scale NaN, and all their q are 0."""
    bad = torch.zeros(scale.shape[1], dtype=torch.bool, device=scale.device)
    bad[rows] = True
    assert torch.equal(scale.isnan(), bad.expand_as(scale))
    assert (q.float()[:, rows] == 0).all()


# rows, K, c, J, B_K: few rows and many, ragged K, every c, one row in several pieces
ROTATIONS = [(5, 100, 3, 2, 16), (67, 90, 5, 1, 8)]
if ON_GPU:
    ROTATIONS += [(66, 250, 2, 3, 64), (65, 512, 2, 1, 256)]
    ROTATIONS += [(m, 4096, c, c, 64) for m, c in ((1, 2), (300, 1), (300, 4), (70, 8), (65, 16))]
    ROTATIONS += [(70, 40000, 2, 2, 64), (333, 14336, 4, 4, 128), (257, 768, 8, 8, 32)]


@pytest.mark.parametrize("variant", ["gather", "permute"])
@every_dtype
@both_dtypes
@pytest.mark.parametrize(("rows", "features", "c", "hashes", "block_k"), ROTATIONS)
def test_rotation(rows, features, c, hashes, block_k, quantized, dtype, variant, monkeypatch):
    if variant == "permute" and dtype == torch.float32:
        pytest.skip("the tensor cores round float32")
    if rows == 67:
        monkeypatch.setattr(sketches, "_MOST_SLOTS", 16)
    groups = -(-features // (c * block_k))
    code = random_code(hashes, groups, c, block_k)
    x = randn(rows, features, dtype=dtype)
    if rows > 4:
        x[1] = 0
    q, scale = sketches.rotation(x, code, groups * block_k, quantized, variant=variant)
    assert_quantized(q, scale, reference.sketched(x, code, groups * block_k))
    if rows > 4:
        assert (scale[:, 1] == 1).all()
        x[2, 3], x[4, 0] = float("nan"), float("-inf")
        q, scale = sketches.rotation(x, code, groups * block_k, quantized, variant=variant)
        assert_non_finite_rows(q, scale, [2, 4])


BLOCKS = [(5, 100, 2, 32, 12), (257, 290, 1, 150, 20)]
if ON_GPU:
    BLOCKS += [(1037, 4096, 1, 128, 32), (3, 4096, 2, 128, 24)]
    BLOCKS += [(333, 14336, 1, 256, 64), (300, 2048, 1, 512, 256)]


@every_dtype
@both_dtypes
@pytest.mark.parametrize(("rows", "features", "hashes", "size", "rank"), BLOCKS)
def test_learned(rows, features, hashes, size, rank, quantized, dtype):
    groups = -(-features // size)
    blocks = randn(hashes, groups, size, rank, dtype=dtype)
    x = randn(rows, features, dtype=dtype)
    x[1] = 0
    q, scale = sketches.learned(x, blocks, quantized)
    stored = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert_quantized(q, scale, reference.sketched(x, blocks, groups * rank), stored)
    assert (scale[:, 1] == 1).all()
    x[2, 3] = float("nan")
    assert_non_finite_rows(*sketches.learned(x, blocks, quantized), [2])


@both_dtypes
@pytest.mark.parametrize(("hashes", "rows", "reduced"), [(2, 3, 40), (1, 5, 8200), (1, 4100, 2050)])
def test_rows_already_sketched(hashes, rows, reduced, quantized):
    if not ON_GPU and rows > 4000:
        pytest.skip("the interpreter takes minutes for this many programs")
    sketched = randn(hashes, rows, reduced)
    sketched[0, 1] = 0
    q, scale = sketches.quantize_rows(sketched, quantized)
    assert_quantized(q, scale, sketched.double())
    sketched[:, 2, 3] = float("inf")
    assert_non_finite_rows(*sketches.quantize_rows(sketched, quantized), [2])


def quantized_layer(hashes, rows, reduced, out_features, quantized, groups=1):
    """Random quantised rows with their scales, and quantised z with its scales."""
    sketched = randn(hashes * rows, reduced)
    q, q_scale = quantize_rows(sketched, 1, quantized)
    z, scale = quantize_rows(randn(out_features, reduced), groups, quantized)
    return q.view(hashes, rows, reduced), q_scale.view(hashes, rows), z, scale


# J, M, K_c, N: K_c not a multiple of 16, N not divisible by J, several row tiles
PRODUCTS = [(2, 9, 72, 70)]
if ON_GPU:
    PRODUCTS += [(3, 70, 40, 100), (1, 1, 1600, 20)]
    PRODUCTS += [(j, m, 1024, 776) for j, m in ((4, 1), (1, 16), (4, 64), (1, 65), (4, 300))]
    PRODUCTS += [(1, 4, 7168, 4096), (8, 64, 512, 4096)]


@pytest.mark.parametrize("bias", [False, True])
@every_dtype
@both_dtypes
@pytest.mark.parametrize(("hashes", "rows", "reduced", "out_features"), PRODUCTS)
def test_stream(hashes, rows, reduced, out_features, quantized, dtype, bias):
    q, q_scale, z, scale = quantized_layer(hashes, rows, reduced, out_features, quantized)
    b = randn(out_features, dtype=dtype) if bias else None
    y = decode.stream(q, q_scale, z, scale, b, dtype)
    factor = product_factor(quantized, dtype)
    assert_close(y, reference.quantized_product(q, q_scale, z, scale, b), factor)
    floating = randn(hashes, rows, reduced, dtype=dtype)
    ones = torch.ones(hashes, rows)
    for groups in (1, reduced // 8):
        z, scale = quantize_rows(randn(out_features, reduced), groups, quantized)
        wide = dequantize(z, scale, torch.float64)
        y = decode.stream(floating, None, z, scale, b, dtype)
        expected = reference.quantized_product(floating, ones, wide, torch.ones(out_features, 1), b)
        assert_close(y, expected, factor=2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_split_k_is_the_same_sum(dynamic, groups):
    if dynamic and groups > 1:
        return
    q, q_scale, z, scale = quantized_layer(2, 9, 256, 130, torch.int8, groups)
    sketched = q if dynamic else q.float()
    runs = [
        decode.stream(
            *(sketched, q_scale if dynamic else None, z, scale, None, torch.float32),
            tile=(32, split, 2),
        )
        for split in (1, 2, 4, 4)
    ]
    assert_close(runs[0], runs[1])
    if dynamic:
        assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[2], runs[3])


@pytest.mark.parametrize("groups", [1, 3])
@every_dtype
@both_dtypes
@pytest.mark.parametrize("c", [1, 4])
def test_gemv(c, quantized, dtype, groups):
    code = random_code(3, 6, c, 16)
    x = randn(1, 6 * 16 * c - 5, dtype=dtype)
    z, scale = quantize_rows(randn(31, 96), groups, quantized)
    b = randn(31, dtype=dtype)
    y = decode.gemv(x, code, z, scale, b)
    assert_close(y, reference.linear_weight_only(x, code, z, scale, b), factor=2)


# J, M, K_c, N
GEMMS = [(2, 33, 144, 70)]
if ON_GPU:
    GEMMS += [(2, 70, 80, 130), (1, 33, 144, 64)]
    GEMMS += [(4, 1000, 1024, 4096), (8, 300, 512, 1024), (1, 513, 2048, 776), (4, 130, 192, 776)]


@pytest.mark.parametrize("fused", [False, True])
@every_dtype
@both_dtypes
@pytest.mark.parametrize(("hashes", "rows", "reduced", "out_features"), GEMMS)
def test_gemm(hashes, rows, reduced, out_features, quantized, dtype, fused):
    q, q_scale, z, scale = quantized_layer(hashes, rows, reduced, out_features, quantized)
    b = residual = None
    extra = {}
    if fused:
        b, residual = randn(out_features, dtype=dtype), randn(rows, out_features, dtype=dtype)
        extra = {"activation": "relu", "residual": residual}

    def finish(y):
        return torch.relu(y) + residual.cpu().double() if fused else y

    y = gemm.grouped_matmul(q, q_scale, z, scale, b, dtype, **extra)
    factor = product_factor(quantized, dtype)
    assert_close(y, finish(reference.quantized_product(q, q_scale, z, scale, b)), factor)


@every_dtype
@both_dtypes
@pytest.mark.parametrize("groups", [1, 3])
def test_widen(groups, quantized, dtype):
    z, scale = quantize_rows(randn(5, 1050), groups, quantized)
    expected = dequantize(z, scale, torch.float64)
    assert_close(gemm.widen(z, scale, dtype), expected)


@both_dtypes
@every_dtype
@pytest.mark.parametrize("kind", ["rotation", "learned"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rows", [1, 9, 70] if ON_GPU else [1, 70])
def test_layer_is_the_quantised_definition(rows, dynamic, kind, dtype, quantized):
    if kind == "rotation":
        code, reduced = random_code(2, 3, 2, 32), 96
    else:
        code, reduced = randn(1, 3, 64, 32, dtype=dtype), 96
    x = randn(rows, 180, dtype=dtype)
    z, scale = quantize_rows(randn(70, reduced), 1, quantized)
    b = randn(70, dtype=dtype)
    y = quantized_cuda.linear(x.view(1, rows, 180), code, z, scale, b, dynamic)[0]
    if dynamic:
        q, q_scale = quantized_cuda.sketch(x, code, reduced, quantized)
        expected = reference.quantized_product(q, q_scale, z, scale, b)
    else:
        expected = reference.linear_weight_only(x, code, z, scale, b)
    assert_close(y, expected, 2 * product_factor(quantized, dtype))
    assert quantized_cuda.linear(x[:0], code, z, scale, b, dynamic).shape == (0, 70)


@gpu
@needs_gpu
@both_dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_library_product_of_float8_rows(bias, quantized):
    if quantized != FLOAT8:
        return
    blocks = randn(1, 8, 128, 32, dtype=torch.bfloat16)
    x = randn(300, 1000, dtype=torch.bfloat16)
    z, scale = quantize_rows(randn(512, 256), 1, quantized)
    b = randn(512, dtype=torch.bfloat16) if bias else None
    y = quantized_cuda.run("library", x, blocks, z, scale, b, True)
    assert_close(y, quantized_cuda.run("triton", x, blocks, z, scale, b, True), factor=2)


@gpu
@needs_gpu
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_cuda_graph_replays_with_new_inputs(rows, dynamic):
    code = random_code(4, 4, 4, 64)
    x = randn(rows, 1024, dtype=torch.bfloat16)
    z, scale = quantize_rows(randn(512, 256))
    args = (code, z, scale, None, dynamic)
    with torch.inference_mode():
        quantized_cuda.linear(x, *args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = quantized_cuda.linear(x, *args)
        for _ in range(3):
            x.copy_(randn(rows, 1024, dtype=torch.bfloat16))
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, quantized_cuda.linear(x, *args))
