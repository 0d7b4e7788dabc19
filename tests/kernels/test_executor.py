"""Replaying recorded calls from C++: the same results as Python, for every form of a call."""

import ctypes
import itertools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from ss1_compile.kernels import executor, lowering
from ss1_compile.kernels.executor import Executor
from ss1_compile.kernels.launch import Launch

FALLBACK = torch.library.Library("ss1_test_python", "FRAGMENT")
LIBRARY = torch.library.Library("ss1_test", "FRAGMENT")
NUMBER = itertools.count()


class Driver:
    """Stands in for the GPU's driver: keeps what is launched."""

    LAUNCH = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
    )
    REPLACE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64)
    STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_void_p)
    RETAIN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    SET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)

    def __init__(self):
        self.sizes, self.answers, self.launched, self.contexts = (), [], [], []
        self._kept = [
            self.LAUNCH(self._launch),
            self.REPLACE(self._replace),
            self.STREAM(self._stream),
            self.RETAIN(lambda context, device: 0),
            self.SET(lambda context: self.contexts.append(context) or 0),
        ]
        self.addresses = tuple(
            ctypes.cast(function, ctypes.c_void_p).value for function in self._kept
        )

    def _launch(self, config, function, parameters, extra):
        words = (ctypes.c_uint32 * 7).from_address(config)
        stream, attributes = (ctypes.c_uint64 * 2).from_address(config + 32)
        count = ctypes.c_uint32.from_address(config + 48).value
        dependent = count and (ctypes.c_uint32 * 3).from_address(attributes)[::2] == [6, 1]
        pointers = (ctypes.c_uint64 * len(self.sizes)).from_address(parameters)
        values = [ctypes.string_at(at, size) for at, size in zip(pointers, self.sizes, strict=True)]
        self.launched.append((list(words), stream, bool(dependent), function, values))
        return self.answers.pop(0) if self.answers else 0

    def _replace(self, tensor_map, address):
        assert tensor_map % 64 == 0
        ctypes.memmove(tensor_map, ctypes.byref(ctypes.c_uint64(address)), 8)
        return 0

    def _stream(self, device, stream):
        ctypes.c_uint64.from_address(stream).value = 77
        return 0


DRIVER = Driver()


@pytest.fixture(scope="module")
def on_cpu():
    """An executor at the CPU's key."""
    found = Executor("CPU", FALLBACK, DRIVER.addresses)
    if not found.advance(wait=True):
        pytest.skip("no C++ compiler")
    return found


def define(on_cpu, schema, function):
    """An operator of ``function`` and the list of its calls in Python."""
    calls = []

    def counted(*operands):
        calls.append(operands)
        return function(*operands)

    name = f"op{next(NUMBER)}"
    LIBRARY.define(name + schema)
    on_cpu.implement(LIBRARY, name, schema, counted)
    return getattr(torch.ops.ss1_test, name).default, calls


def products(x, z, bias, residual, scale=1.0):
    """Allocations, views, calls with and without ``out``, defaults, a copy, two results."""
    y = x.new_empty(x.shape[0], sum(part.shape[0] for part in z))
    for part, start, out in zip(z, bias, y.split([p.shape[0] for p in z], dim=1), strict=True):
        if start is None:
            torch.mm(x, part.t(), out=out)
        else:
            torch.addmm(start, x, part.t(), out=out)
    if residual is not None:
        y.add_(residual, alpha=scale)
    hidden = torch.nn.functional.linear(x, z[0], bias[0])
    return y, hidden.t().contiguous().view(1, -1, hidden.shape[0])


PRODUCTS = (
    "(Tensor x, Tensor[] z, Tensor?[] bias, Tensor? residual, float scale=1.0) -> (Tensor, Tensor)"
)


def check(op, *operands):
    expected = products(*operands)
    for actual, wanted in zip(op(*operands), expected, strict=True):
        assert actual.stride() == wanted.stride()
        torch.testing.assert_close(actual, wanted)


def operands(rows, dtype=torch.float32):
    sizes = (rows, 16), (8, 16), (4, 16), (8,), (rows, 12)
    x, z0, z1, b, r = (torch.randn(size, dtype=dtype) for size in sizes)
    return x, [z0, z1], [b, None], r


def test_the_third_call_of_a_form_needs_no_python(on_cpu):
    op, calls = define(on_cpu, PRODUCTS, products)
    for rows in (5, 7, 1, 5, 7, 1):
        check(op, *operands(rows))
    assert len(calls) == 6
    replays = on_cpu.library.ss1_replays()
    for rows in (5, 7, 1, 7):
        for _ in range(2):
            check(op, *operands(rows))
    assert len(calls) == 6
    assert on_cpu.library.ss1_replays() == replays + 8


def forms():
    """Calls that Python may answer in different ways."""
    x, z, bias, residual = operands(6)
    wide = torch.randn(6, 40)
    together = torch.randn(12, 16)
    memory = torch.randn(400)
    yield x, z, bias, residual
    yield x, z, bias, None
    yield x, z, [None, None], residual
    yield x, z, [bias[0], torch.randn(4)], residual
    yield x, z, bias, residual, 2.0
    yield x, z[:1], bias[:1], residual[:, :8]
    yield x, z, bias, wide[:, :12]
    yield wide[:, :16], z, bias, wide[:, 16:28]
    yield wide[:, :16], z, bias, wide[:, 20:32]
    yield wide[:, 20:36], z, bias, wide[:, :12]
    yield torch.randn(16, 6).t(), z, bias, residual
    yield x, [together[:8], together[8:]], bias, residual
    yield x, [together[4:], together[:4]], bias, residual
    yield memory[1:97].view(6, 16), z, bias, residual
    yield operands(6, torch.float64)


def test_forms_are_kept_apart(on_cpu):
    op, calls = define(on_cpu, PRODUCTS, products)
    for _ in range(2):
        for form in forms():
            check(op, *form)
    count = len(calls)
    assert count == 2 * len(list(forms()))
    for form in reversed(list(forms())):
        check(op, *form)
    assert len(calls) == count


def test_operands_in_one_storage_are_told_apart_by_their_distance(on_cpu):
    """Python finds an operand in another's memory, so the program must not move it."""

    def second(x, y):
        return x.as_strided(y.shape, y.stride(), y.storage_offset()).clone()

    op, calls = define(on_cpu, "(Tensor x, Tensor y) -> Tensor", second)
    memory = torch.arange(64.0)
    for start in (8, 16, 24, 16, 8) * 3:
        x, y = memory[:8], memory[start : start + 8]
        assert torch.equal(op(x, y), y)
    assert len(calls) == 6


def test_what_the_form_does_not_say_stays_in_python(on_cpu):
    constant = torch.randn(3)
    for function in (
        lambda x: torch.add(x, x, alpha=x.sum().item()),  # a value read on the host
        lambda x: x * 2.0,  # a number where the operator has a tensor
        lambda x: x + constant,  # a tensor from elsewhere
        lambda x: x.to(torch.float64),  # an argument that no program holds
        lambda x: torch.stack(torch.sort(x)).sum(0),  # several new tensors
    ):
        op, calls = define(on_cpu, "(Tensor x) -> Tensor", function)
        for _ in range(5):
            x = torch.randn(3)
            torch.testing.assert_close(op(x), function(x))
        assert len(calls) == 5


def test_errors_of_python_are_errors_each_time(on_cpu):
    def refusing(x):
        raise RuntimeError("no")

    op, calls = define(on_cpu, "(Tensor x) -> Tensor", refusing)
    for _ in range(4):
        with pytest.raises(RuntimeError, match="no"):
            op(torch.zeros(2))
    assert len(calls) == 4


def test_a_gradient_that_is_wanted_is_left_to_python(on_cpu):
    op, calls = define(on_cpu, "(Tensor x) -> Tensor", lambda x: torch.add(x, x))
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        for _ in range(4):
            op(x)
    assert len(calls) == 2
    for _ in range(4):
        op(x)
    assert len(calls) == 6


@pytest.fixture
def differentiable(on_cpu):
    """An operator ``x·w`` with a gradient to x, and how often its Python kernel for it ran."""
    name, schema = f"op{next(NUMBER)}", "(Tensor x, Tensor w) -> Tensor"
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    seen = []

    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None

    def setup(ctx, inputs, output):
        seen.append(True)
        ctx.save_for_backward(inputs[1])

    qualified = f"ss1_test::{name}"
    torch.library.register_fake(qualified, lambda x, w: torch.empty_like(x), lib=LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup, lib=LIBRARY)
    on_cpu.implement(LIBRARY, name, schema, lambda x, w: x * w, differentiable=True)
    return getattr(torch.ops.ss1_test, name).default, seen


def test_gradients_pass_the_gate_only_where_wanted(differentiable):
    op, seen = differentiable
    for _ in range(4):
        x, w = torch.randn(3, requires_grad=True), torch.randn(3)
        assert torch.equal(op(x.detach(), w), x.detach() * w)
        y = op(x, w)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y.detach(), x.detach() * w)
        assert torch.equal(grad, w)
        with torch.no_grad():
            assert not op(x, w).requires_grad
        with torch.inference_mode():
            assert op(x, w).is_inference()
    assert len(seen) == 4


def test_compiled_graphs_and_their_gradients(differentiable):
    op, _ = differentiable
    compiled = torch.compile(
        lambda x, w: op(x + 1, w) * 2, backend="aot_eager", dynamic=True, fullgraph=True
    )
    for rows in (3, 5, 3, 5):
        x, w = torch.randn(rows, requires_grad=True), torch.randn(rows)
        y = compiled(x, w)
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(y.detach(), (x.detach() + 1) * w * 2)
        torch.testing.assert_close(grad, 2 * w)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, w), y.detach())


def test_opcheck(differentiable):
    op, _ = differentiable
    for _ in range(3):
        torch.library.opcheck(op, (torch.randn(3, requires_grad=True), torch.randn(3)))
        torch.library.opcheck(op, (torch.randn(3), torch.randn(3)))


def test_an_override_of_the_lowering_is_part_of_the_form(on_cpu):
    op, calls = define(
        on_cpu, "(Tensor x) -> Tensor", lambda x: x + x if lowering._override.get() else x.clone()
    )
    x = torch.ones(2)
    for _ in range(4):
        assert op(x)[0] == 1
        with lowering.override("triton"):
            assert op(x)[0] == 2
            with lowering.override(None):
                assert op(x)[0] == 1
    assert len(calls) == 4


def test_results_are_tensors_of_their_own(on_cpu):
    op, calls = define(on_cpu, "(Tensor x) -> Tensor", lambda x: (x + x).view(1, -1))
    kept = [op(torch.full((4,), float(i))) for i in range(5)]
    assert len(calls) == 2
    assert len({y.data_ptr() for y in kept}) == 5
    for i, y in enumerate(kept):
        assert y._base is None
        assert torch.equal(y, torch.full((1, 4), 2.0 * i))


def test_threads(on_cpu):
    op, _ = define(on_cpu, PRODUCTS, products)

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for i in range(40):
            rows = 1 + (seed + i) % 6
            x, z, bias, residual = operands(rows)
            x = torch.randn(rows, 16, generator=generator)
            check(op, x, z, bias, residual)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


# --- launches -----------------------------------------------------------------------------------

PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u32 kernel_param_2,
	.param .f32 kernel_param_3,
	.param .u64 .ptr .global .align 1 kernel_param_4
)
.reqntid 64
"""


class Kernel:
    """A kernel that adds 1, and what Triton says of it once compiled."""

    arg_names = ("x", "out", "M", "EPS", "BM")

    def __init__(self, **changes):
        metadata = {"global_scratch_size": 0, "profile_scratch_size": 0, "tensordesc_meta": None}
        metadata |= {"launch_cooperative_grid": False, "launch_pdl": True} | changes
        self.compiled = SimpleNamespace(
            name="kernel",
            function=4321,
            packed_metadata=(2, 1, 96),
            metadata=SimpleNamespace(**metadata),
            asm={"ptx": PTX},
            src=SimpleNamespace(
                signature=dict(
                    zip(self.arg_names, ("*fp32", "*fp32", "i32", "fp32", "constexpr"), strict=True)
                )
            ),
        )

    def __getitem__(self, grid):
        def launch(x, out, *numbers, **constants):
            out.fill_(1)
            return Compiled(self.compiled)

        return launch


class Compiled(SimpleNamespace):
    def __init__(self, compiled):
        super().__init__(**vars(compiled))

    def __getitem__(self, grid):
        return lambda x, out, *numbers: ctypes.memset(out, 0, 4)


def launching(kernel):
    """An operator's implementation that launches on a view of its operand, and of its result."""
    plan = Launch(kernel, (3,), (33, 0.5), {"BM": 4}, num_warps=2)

    def function(x):
        out = x.new_empty(2, 4)
        plan(x[1:], out[1])
        return out

    return function


def test_a_launch_is_repeated_on_the_addresses_of_the_call(on_cpu):
    op, calls = define(on_cpu, "(Tensor x) -> Tensor", launching(Kernel()))
    DRIVER.sizes = (8, 8, 4, 4, 8)
    DRIVER.launched.clear()
    for _ in range(4):
        x = torch.zeros(8)
        y = op(x)
    assert len(calls) == 2
    assert len(DRIVER.launched) == 2
    config, stream, dependent, function, values = DRIVER.launched[-1]
    assert config == [3, 1, 1, 64, 1, 1, 96]
    assert (stream, dependent, function) == (77, True, 4321)
    assert values == [
        (x.data_ptr() + 4).to_bytes(8, "little"),
        (y.data_ptr() + 16).to_bytes(8, "little"),
        (33).to_bytes(4, "little"),
        b"\0\0\0\x3f",
        bytes(8),
    ]


def test_a_failing_launch_raises_and_a_new_thread_gets_its_context(on_cpu):
    op, _ = define(on_cpu, "(Tensor x) -> Tensor", launching(Kernel()))
    DRIVER.sizes = (8, 8, 4, 4, 8)
    for _ in range(3):
        op(torch.zeros(8))
    DRIVER.answers[:] = [700]
    with pytest.raises(RuntimeError, match="CUDA driver error 700"):
        op(torch.zeros(8))
    DRIVER.answers[:], DRIVER.contexts[:] = [201], []
    op(torch.zeros(8))
    assert len(DRIVER.contexts) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"global_scratch_size": 8},
        {"launch_cooperative_grid": True},
        {"tensordesc_meta": 5},  # another Triton's
    ],
)
def test_kernels_of_another_kind_stay_in_python(on_cpu, changes):
    op, calls = define(on_cpu, "(Tensor x) -> Tensor", launching(Kernel(**changes)))
    for _ in range(4):
        op(torch.zeros(8))
    assert len(calls) == 4


# --- without it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["asked not to", "no driver", "no compiler"])
def test_without_it_python_runs_all_calls_and_says_so_once(monkeypatch, caplog, reason):
    from torch._inductor.codecache import CppCodeCache

    def fails(*args, **kwargs):
        raise RuntimeError("no compiler")

    driver = DRIVER.addresses
    monkeypatch.setenv("SS1_COMPILE_NATIVE", "0" if reason == "asked not to" else "1")
    if reason == "no driver":
        driver = None
        monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(CppCodeCache, "load", fails)
    name, schema = f"op{next(NUMBER)}", "(Tensor x) -> Tensor"
    LIBRARY.define(name + schema)
    alone = Executor("CPU", FALLBACK, driver)
    alone.implement(LIBRARY, name, schema, lambda x: x + 1)
    with caplog.at_level(logging.WARNING, logger=executor.logger.name):
        assert not alone.advance(wait=True)
        for _ in range(3):
            y = getattr(torch.ops.ss1_test, name)(torch.zeros(2))
    assert torch.equal(y, torch.ones(2))
    assert alone.settled
    assert len(caplog.records) == (reason != "asked not to")


def test_calls_go_on_in_python_while_it_is_compiled(monkeypatch, on_cpu):
    from torch._inductor.codecache import CppCodeCache

    ready = threading.Event()

    def load(*args, **kwargs):
        ready.wait(60)
        return on_cpu.library

    monkeypatch.setattr(CppCodeCache, "load", load)
    name, schema = f"op{next(NUMBER)}", "(Tensor x) -> Tensor"
    LIBRARY.define(name + schema)
    calls = []
    slow = Executor("CPU", FALLBACK, DRIVER.addresses)
    slow.implement(LIBRARY, name, schema, lambda x: calls.append(1) or x + x)
    op = getattr(torch.ops.ss1_test, name).default
    for _ in range(5):
        assert op(torch.ones(1)) == 2
    assert slow.library is None
    assert not slow.settled
    ready.set()
    slow._thread.join()
    for _ in range(6):
        assert op(torch.ones(1)) == 2
    assert slow.settled
    assert len(calls) == 5 + 3  # the one that put it in place, a first, a recorded one
