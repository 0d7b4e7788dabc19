"""On the GPU: every operator replayed from C++ gives the bits that Python's launches gave."""

import threading

import pytest
import torch
from triton_support import ON_GPU, randn, random_code

from ss1_compile.kernels import lowering, portable
from ss1_compile.kernels.executor import on_cuda

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def executor():
    """In place, and without the forms of other tests."""
    if not ON_GPU:
        pytest.skip("needs a GPU")
    torch.ops.ss1.sketch(randn(1, 64), random_code(1, 1, 1, 64), 64)
    if not on_cuda.advance(wait=True):
        pytest.skip("no C++ compiler")


def sketches(kind, features, reduction, dtype):
    """``(sketch, K_c)``."""
    if kind == "rotation":
        return random_code(reduction, features // reduction // 64, reduction, 64), features // 4
    rank = 128 // reduction
    return randn(1, features // 128, 128, rank, dtype=dtype), features // reduction


def calls(kind, rows, dtype):
    """``(operator, a function that makes operands)`` for layers and fused blocks 256 → 512."""
    sketch, reduced = sketches(kind, 256, 4, dtype)
    ops = torch.ops.ss1

    def fresh(*shape):
        return randn(*shape, dtype=dtype)

    wide = fresh(rows, 600)
    z, bias = fresh(512, reduced), fresh(512)
    together = fresh(3 * 128, reduced)
    hashes = sketch.shape[0]
    weight = fresh(256)
    yield ops.linear, lambda: (fresh(rows, 256), sketch, z, bias)
    yield ops.linear, lambda: (fresh(1, rows, 256), sketch, z)
    yield ops.linear, lambda: (fresh(rows, 260)[:, 2:258], sketch, z[:500], bias[:500])
    yield ops.sketch, lambda: (fresh(rows, 256), sketch, reduced)
    yield ops.unsketch, lambda: (fresh(hashes, rows, reduced), sketch, 256)
    for residual, keep, rms in ((None, False, False), (wide[:, :256], True, True)):
        yield (
            ops.norm_sketch,
            lambda residual=residual, keep=keep, rms=rms: (
                *(fresh(rows, 256), residual, weight, None if rms else weight),
                *(sketch, reduced, 1e-5, rms, keep),
            ),
        )
    yield ops.activation_sketch, lambda: (fresh(rows, 256), None, sketch, reduced, "gelu")
    yield (
        ops.activation_sketch,
        lambda: (wide[:, :256], wide[:, 256:512], sketch, reduced, "silu"),
    )
    sketched = (hashes, rows, reduced)
    yield ops.matmul, lambda: (fresh(*sketched), [z], [bias], fresh(rows, 512), "gelu")
    yield ops.matmul, lambda: (fresh(*sketched), [z], [None], None, "none")
    yield (
        ops.matmul,
        lambda: (fresh(*sketched), [z, z[:256]], [bias, None], fresh(rows, 768), "none"),
    )
    yield (
        ops.matmul,
        lambda: (fresh(*sketched), list(together.split(128)), [None] * 3, None, "none"),
    )
    half, start = z[:256], bias[:256]
    for activation, gate in (("gelu", None), ("gelu_tanh", None), ("silu", z[256:])):
        yield (
            ops.matmul_sketch,
            lambda act=activation, gate=gate: (
                *(fresh(*sketched), half, start, gate, None, act, sketch, reduced),
            ),
        )


def in_python(op, operands):
    """Through the operator's twin, which keeps the Python implementation."""
    return getattr(torch.ops.ss1_python, op._qualified_op_name.partition("::")[2])(*operands)


def flat(result):
    return result if isinstance(result, tuple) else (result,)


def assert_equal(actual, expected):
    for a, b in zip(flat(actual), flat(expected), strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "rows", "dtype"),
    [
        ("rotation", 300, torch.bfloat16),
        ("learned", 300, torch.bfloat16),
        ("rotation", 16, torch.bfloat16),
        ("learned", 1, torch.float16),
        ("rotation", 1, torch.float32),
    ],
)
def test_replays_are_bit_equal(kind, rows, dtype):
    with torch.no_grad():
        for op, make in calls(kind, rows, dtype):
            for _ in range(2):
                op(*make())
            before = on_cuda.library.ss1_replays()
            for _ in range(2):
                operands = make()
                assert_equal(op(*operands), in_python(op, operands))
            assert on_cuda.library.ss1_replays() == before + 2, op


@pytest.mark.parametrize("name", lowering.NAMES)
def test_every_lowering(name):
    rows = 1 if name == "gemv" else 8 if name == "stream" else 256
    code, x = random_code(4, 4, 4, 64), randn(rows, 1024, dtype=torch.bfloat16)
    z = randn(1024, 256, dtype=torch.bfloat16)
    with lowering.override(name), torch.no_grad():
        for _ in range(2):
            torch.ops.ss1.linear(x, code, z)
        before = on_cuda.library.ss1_replays()
        y = torch.ops.ss1.linear(x, code, z)
        assert on_cuda.library.ss1_replays() == before + 1
    expected = portable.linear(x.double(), code, z.double(), None)
    assert (y.double() - expected).norm() / expected.norm() < 1e-2


def layer(rows):
    x = randn(rows, 1024, dtype=torch.bfloat16)
    return x, random_code(4, 4, 4, 64), randn(512, 256, dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [8, 512])
def test_cuda_graphs_capture_replays(rows):
    x, code, z = layer(rows)
    with torch.no_grad():
        for _ in range(3):
            torch.ops.ss1.linear(x, code, z)
        graph = torch.cuda.CUDAGraph()
        before = on_cuda.library.ss1_replays()
        with torch.cuda.graph(graph):
            y = torch.ops.ss1.linear(x, code, z)
        assert on_cuda.library.ss1_replays() == before + 1
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert torch.equal(y, torch.ops.ss1.linear(x, code, z))


def test_replays_run_on_the_current_stream():
    """A stream that is held up holds up the replay, and the default stream does not wait."""
    x, code, z = layer(512)
    with torch.no_grad():
        expected = [torch.ops.ss1.linear(x, code, z) for _ in range(3)][-1]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            y = torch.ops.ss1.linear(x, code, z)
            done = torch.cuda.Event()
            done.record()
        assert not done.query()
        side.synchronize()
    assert torch.equal(y, expected)


def test_a_new_thread():
    x, code, z = layer(300)
    results = []

    def work():
        with torch.no_grad():
            results.extend(torch.ops.ss1.linear(x, code, z) for _ in range(4))

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(results) == 8
    for y in results:
        assert torch.equal(y, results[0])


def test_gradients():
    _, code, z = layer(64)
    z = z.float()
    for _ in range(4):
        a = torch.randn(64, 1024, device="cuda", requires_grad=True)
        w = z.clone().requires_grad_()
        y = torch.ops.ss1.linear(a, code, w)
        grads = torch.autograd.grad(y.square().sum(), (a, w))
        b, v = (t.detach().cpu().double().requires_grad_() for t in (a, w))
        y = torch.ops.ss1.linear(b, code.cpu(), v)
        expected = torch.autograd.grad(y.square().sum(), (b, v))
        for grad, wanted in zip(grads, expected, strict=True):
            assert (grad.cpu().double() - wanted).norm() / wanted.norm() < 5e-5


def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x, code, z = layer(300)
    with torch.no_grad():
        for device in ("cuda:0", "cuda:1") * 4:
            moved = [tensor.to(device) for tensor in (x, code, z)]
            y = torch.ops.ss1.linear(*moved)
            assert y.device == torch.device(device)
            assert torch.equal(y.cpu(), in_python(torch.ops.ss1.linear, (x, code, z)).cpu())
