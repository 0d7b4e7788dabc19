import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_support import DTYPES, ON_GPU, assert_close, randn, random_code

from ss1_compile.kernels import (  # isort: skip
    fused_cuda,
    fused_portable,
    lowering,
    portable,
    products_cuda,
    triton_activation,
    triton_elementwise,
    triton_norm,
    triton_norm_rotation,
)

WAYS = (triton_norm.statistics_first, triton_norm.rows_first, triton_norm_rotation.one_kernel)


def make_sketch(kind, features, hashes, c, block_k, dtype):
    groups = -(-features // (c * block_k))
    if kind == "rotation":
        return random_code(hashes, groups, c, block_k), groups * block_k
    blocks = randn(hashes, groups, c * block_k, block_k, dtype=dtype)
    return blocks / (c * block_k) ** 0.5, groups * block_k  # float16 overflows otherwise


def norm_reference(s, weight, bias, eps, rms):
    s = s.double()
    s = s if rms else s - s.mean(-1, keepdim=True)
    n = s / torch.sqrt((s * s).mean(-1, keepdim=True) + eps)
    n = n if weight is None else n * weight.double()
    return n if bias is None else n + bias.double()


def sketch_reference(x, code, reduced):
    return portable.sketch(x, code if code.dtype == torch.int32 else code.double(), reduced)


# rows, K, c, J, B_K: ragged K, K not a multiple of 8, few and many supergroups and hashes
SHAPES = [(3, 100, 3, 2, 16), (9, 256, 4, 4, 32), (17, 130, 2, 3, 8), (1, 64, 1, 1, 64)]
if ON_GPU:
    SHAPES += [(37, 768, 4, 4, 64), (1, 1024, 4, 4, 64), (1037, 4096, 4, 4, 128)]
    SHAPES += [(129, 4096, 8, 8, 64), (333, 14336, 4, 1, 32), (16384, 1024, 4, 1, 32)]


@pytest.mark.parametrize("kind", ["rotation", "learned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features", "c", "hashes", "block_k"), SHAPES)
def test_norm_sketch(rows, features, c, hashes, block_k, dtype, kind):
    code, reduced = make_sketch(kind, features, hashes, c, block_k, dtype)
    # far from zero mean, with an outlier: the variance must not be taken as a difference
    x = randn(rows, features, dtype=dtype) + 30
    x[:, 0] += 500
    residual, weight, bias = (
        randn(*shape, dtype=dtype) for shape in ((rows, features), (features,), (features,))
    )
    ways = WAYS if triton_norm_rotation.suits(x, code, reduced) else WAYS[:2]
    for rms, full in ((False, True), (True, False)):
        r, w, b = (residual, weight, bias) if full else (None, None, None)
        s = x if r is None else x + r
        expected = norm_reference(s, w, b, 1e-5, rms)
        for way in ways:
            out, summed, normed = way(x, r, w, b, code, reduced, 1e-5, rms, full)
            assert out.is_contiguous()
            assert_close(out, sketch_reference(expected, code, reduced), factor=3)
            assert torch.equal(summed, s) if full else summed.shape == (0,)
            if full:
                assert_close(normed, expected, factor=2)
            else:
                assert normed.shape == (0,)
                assert normed is not summed  # Dynamo refuses outputs that alias each other


@pytest.mark.parametrize("kind", ["rotation", "learned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [*triton_elementwise.ACTIVATIONS])
@pytest.mark.parametrize("rows", [3, 70])
def test_activation_sketch_of_slices_of_one_output(rows, activation, dtype, kind):
    features = 120
    code, reduced = make_sketch(kind, features, 2, 3, 16, dtype)
    gate, x = randn(rows, 2 * features, dtype=dtype).split(features, dim=1)
    for g in (None, gate):
        actual = triton_activation.activation_sketch(x, g, code, reduced, activation)
        expected = fused_portable.activate(
            x.double(), None if g is None else g.double(), activation
        )
        assert_close(actual, sketch_reference(expected, code, reduced), factor=2)


@settings(
    max_examples=25 if ON_GPU else 5,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    rows=st.integers(1, 40),
    features=st.integers(1, 150),
    c=st.integers(1, 9),
    hashes=st.integers(1, 3),
    block_k=st.sampled_from((8, 16, 32, 64)),
    learned=st.booleans(),
)
def test_norm_sketch_of_any_shape(rows, features, c, hashes, block_k, learned):
    kind = "learned" if learned else "rotation"
    code, reduced = make_sketch(kind, features, hashes, c, block_k, torch.float16)
    x = randn(rows, features, dtype=torch.float16)
    # a row of one feature is its own mean: nothing is left but the rounding of 0
    expected = norm_reference(x, None, None, 0.1, False)
    for way in WAYS if triton_norm_rotation.suits(x, code, reduced) else WAYS[:2]:
        out = way(x, None, None, None, code, reduced, 0.1, False, False)[0]
        assert_close(out, sketch_reference(expected, code, reduced), factor=3)


@pytest.mark.parametrize("biased", [(False, False), (True, True), (True, False)])
def test_layers_apart_in_memory_are_packed(biased, monkeypatch):
    """Into one product, unless only some have a bias."""
    products = []
    product = products_cuda._product
    monkeypatch.setattr(products_cuda, "_packing_pays", lambda rows, z: rows > 4)
    monkeypatch.setattr(
        products_cuda, "_product", lambda *given: (products.append(given), product(*given))
    )
    sketched = randn(1, 5, 40, dtype=torch.float16)
    z = [randn(n, 40, dtype=torch.float16) for n in (60, 30)]
    bias = [randn(part.shape[0]).half() if b else None for part, b in zip(z, biased, strict=True)]
    y = fused_cuda.matmul(sketched, z, bias, None, "relu")
    assert len(products) == (1 if biased[0] == biased[1] else 2)
    doubled = [None if start is None else start.double() for start in bias]
    exact = [part.double() for part in z]
    assert_close(y, fused_portable.matmul(sketched.double(), exact, doubled, None, "relu"))
    products.clear()
    fused_cuda.matmul(sketched[:, :4], z, bias, None, "relu")
    assert len(products) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hashes", [1, 3])
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_matmul(rows, hashes, dtype):
    reduced = 40
    sketched = randn(hashes, rows, reduced, dtype=dtype)
    adjacent = randn(100, reduced, dtype=dtype).split([60, 40])
    apart = [randn(60, reduced, dtype=dtype), randn(40, reduced, dtype=dtype).clone()]
    starts = randn(100, dtype=dtype).split([60, 40])
    residual = randn(rows, 100, dtype=dtype)
    for z in (adjacent, apart, adjacent[:1]):
        for bias in ([None] * len(z), [*starts[: len(z)]], [None, starts[1]][: len(z)]):
            for r in (None, residual[:, : sum(part.shape[0] for part in z)]):
                for activation in ("none", "gelu"):
                    y = fused_cuda.matmul(sketched, z, bias, r, activation)
                    assert y.is_contiguous()
                    expected = fused_portable.matmul(
                        sketched.double(),
                        [part.double() for part in z],
                        [None if start is None else start.double() for start in bias],
                        None if r is None else r.double(),
                        activation,
                    )
                    assert_close(y, expected, factor=2)


def joined_reference(sketched, z, bias, z_gate, gate_bias, activation, code):
    def product(z, bias, activation):
        start = None if bias is None else bias.double()
        return fused_portable.matmul(sketched.double(), [z.double()], [start], None, activation)

    if z_gate is None:
        y = product(z, bias, activation)
    else:
        y = product(z_gate, gate_bias, activation) * product(z, bias, "none")
    reduced = code.shape[1] * (code.shape[3] if code.dim() == 4 else 16)
    return sketch_reference(y, code, reduced)


@pytest.mark.parametrize(
    "kinds", [("learned", "learned"), ("rotation", "learned"), ("rotation",) * 2]
)
@pytest.mark.parametrize(
    ("rows", "activation"),
    itertools.product([1, 70, 2000], triton_elementwise.ACTIVATIONS)
    if ON_GPU
    else [(1, "silu"), (70, "gelu")],
)
def test_matmul_sketch(rows, activation, kinds):
    """Whichever of product and sketch takes the activation; the sketch's last group is ragged."""
    dtype, features, reduced = torch.float16, 110, 40
    hashes = 1 if kinds[0] == "learned" else 2
    code, further = make_sketch(kinds[1], features, hashes, 3, 16, dtype)
    sketched, z = randn(hashes, rows, reduced, dtype=dtype), randn(features, reduced, dtype=dtype)
    bias = randn(features, dtype=dtype)
    for operands in ((z, None, None, None), (z, bias, None, None), (z, bias, z.flip(0), None)):
        actual = fused_cuda.matmul_sketch(sketched, *operands, activation, code, further)
        assert actual.is_contiguous()
        assert_close(actual, joined_reference(sketched, *operands, activation, code), factor=4)


class _Joined:
    """A launcher that notes its calls, in place of the kernel for product and sketch together."""

    def __init__(self, suits=True):
        self.suits, self.calls = suits, 0

    def supported(self, sketched, z, blocks):
        assert (blocks.dim(), blocks.shape[0], sketched.shape[0]) == (4, 1, 1)
        return self.suits

    def matmul_sketch(self, sketched, z, bias, blocks, activation, *, gate):
        self.calls += 1
        operands = (z, bias, *(gate or (None, None)), activation, blocks)
        return fused_portable.matmul_sketch(sketched, *operands, blocks.shape[1] * blocks.shape[3])


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        ("none", True),
        ("first rotation", False),
        ("second rotation", False),
        ("two hashes", False),
        ("few rows", False),
        ("unsupported", False),
        ("library wanted", False),
        ("triton wanted", True),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_when_product_and_sketch_run_as_one_kernel(change, runs, gated, monkeypatch):
    kernel = _Joined(suits=change != "unsupported")
    monkeypatch.setattr(fused_cuda, "_joined_kernel", lambda: kernel)
    monkeypatch.setattr(fused_cuda, "_joined_wins", lambda rows, reduced, gated: rows >= 8)
    second = 2 if change == "two hashes" else 1
    kind = "rotation" if change == "second rotation" else "learned"
    code, reduced = make_sketch(kind, 96, second, 3, 16, torch.float16)
    first = 2 if change == "first rotation" else 1
    sketched = randn(first, 7 if change == "few rows" else 8, 40, dtype=torch.float16)
    z, bias = randn(96, 40, dtype=torch.float16), randn(96, dtype=torch.float16)
    with lowering.override(change.split()[0] if "wanted" in change else None):
        operands = (z, bias, *((z.flip(0), bias.flip(0)) if gated else (None, None)))
        actual = fused_cuda.matmul_sketch(sketched, *operands, "gelu", code, reduced)
    assert kernel.calls == runs
    assert_close(actual, joined_reference(sketched, *operands, "gelu", code), factor=4)


@pytest.mark.parametrize("up_first", [False, True])
def test_halves_of_one_weight_are_one_product(up_first, monkeypatch):
    monkeypatch.setattr(fused_cuda, "_joins", lambda *_: None)
    products = []
    one = products_cuda._product
    monkeypatch.setattr(products_cuda, "_product", lambda *o: products.append(o[1]) or one(*o))
    code, reduced = make_sketch("learned", 96, 1, 3, 16, torch.float16)
    whole, biases = randn(192, 40, dtype=torch.float16), randn(192, dtype=torch.float16)
    halves = [(whole[:96], biases[:96]), (whole[96:], biases[96:])]
    operands = sum(halves if up_first else halves[::-1], ())
    sketched = randn(1, 70, 40, dtype=torch.float16)
    actual = fused_cuda.matmul_sketch(sketched, *operands, "silu", code, reduced)
    assert [z.shape for z in products] == [whole.shape]
    assert_close(actual, joined_reference(sketched, *operands, "silu", code), factor=4)


@pytest.mark.parametrize("gated", [False, True])
def test_matmul_sketch_in_one_kernel(gated, monkeypatch):
    """The true kernel, behind the choice: operands meet in the right places."""
    monkeypatch.setattr(fused_cuda, "_joined_wins", lambda rows, reduced, gated: rows >= 8)
    monkeypatch.setattr(fused_cuda, "matmul", None)
    code, reduced = make_sketch("learned", 110, 1, 3, 16, torch.float16)
    sketched = randn(1, 9, 48, dtype=torch.float16)[..., :40]  # rows are strided
    z, bias = randn(110, 40, dtype=torch.float16), randn(110, dtype=torch.float16)
    operands = (z, bias, *((z.flip(0), bias.flip(0)) if gated else (None, None)))
    actual = fused_cuda.matmul_sketch(sketched, *operands, "silu", code, reduced)
    assert_close(actual, joined_reference(sketched, *operands, "silu", code), factor=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
def test_activation_in_the_library_s_epilogue(activation, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    sketched, z, bias = (
        randn(1, 300, 64, dtype=dtype),
        randn(96, 64, dtype=dtype),
        randn(96).to(dtype),
    )
    y = torch.empty(300, 96, dtype=dtype, device=sketched.device)
    assert products_cuda._in_epilogue(sketched, bias, None, activation, y)
    products_cuda._library_product(sketched, z, bias, None, activation, y)
    exact = fused_portable.matmul(
        sketched.double(), [z.double()], [bias.double()], None, activation
    )
    assert_close(y, exact, factor=2)


def test_no_rows():
    code, reduced = make_sketch("rotation", 100, 2, 3, 16, torch.float16)
    x = randn(0, 100, dtype=torch.float16)
    out, summed, normed = fused_cuda.norm_sketch(x, x, None, None, code, reduced, 1e-5, False, True)
    assert (out.shape, summed.shape, normed.shape) == ((2, 0, reduced), (0, 100), (0, 100))
    out = fused_cuda.activation_sketch(x, x, code, reduced, "silu")
    assert out.shape == (2, 0, reduced)
    y = fused_cuda.matmul(out, [randn(10, reduced, dtype=torch.float16)], [None], None, "none")
    assert y.shape == (0, 10)
    wide = randn(100, reduced, dtype=torch.float16)
    further = fused_cuda.matmul_sketch(out, wide, *[None] * 3, "gelu", code, reduced)
    assert further.shape == (2, 0, reduced)
