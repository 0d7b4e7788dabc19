"""Launching known kernels directly: only where Triton would have picked the same one."""

from types import SimpleNamespace

import pytest
import torch
from triton_support import DEVICE, ON_GPU, assert_close, randn, random_code

import triton  # isort: skip

from ss1_compile.kernels import portable, triton_activation, triton_blocks, triton_gemm  # isort: skip
from ss1_compile.kernels import triton_sketch
from ss1_compile.kernels.launch import Block, Launch, ceil_div, device_of, once_per_form, power_of_2


class Kernel:
    """Stands in for a jitted kernel: counts first launches, and records later ones."""

    arg_names = ("x", "aux", "M", "EPS", "BM", "ACT")

    def __init__(self):
        self.first, self.later = [], []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.first.append((grid, args, kwargs))
            return {grid: lambda *direct: self.later.append(direct)}

        return launch


def make(blocks=None):
    kernel = Kernel()
    constants = {"ACT": "relu", "BM": 4}  # in another order than the kernel's
    return kernel, Launch(kernel, (7,), (33, 0.5), constants, blocks=blocks, num_warps=2)


def test_a_known_launch_passes_addresses_numbers_and_constants_in_order():
    kernel, launch = make()
    x, gate = torch.zeros(8), torch.zeros(8)
    launch(x, (gate, 5, None))
    assert kernel.first == [
        ((7, 1, 1), (x, (gate, 5, None), 33, 0.5), {"BM": 4, "ACT": "relu", "num_warps": 2})
    ]
    launch(x, (gate, 5, None))
    assert len(kernel.first) == 1
    assert kernel.later == [(x.data_ptr(), (gate.data_ptr(), 5, None), 33, 0.5, 4, "relu")]


def test_whatever_triton_specialises_on_is_kept_apart():
    memory = torch.zeros(64)
    kernel, launch = make()
    forms = [
        (memory, None),
        (memory[1:], None),  # not a multiple of 16 bytes
        (memory.double(), None),
        (memory, memory),
        (memory, (memory, 1)),
        (memory, (memory, 1.0)),
        (memory, (memory, 16)),
        (memory, (memory[1:], 16)),
        (memory, (memory, None)),
        (memory, (memory, (None,))),
        (memory, (memory.half(), None)),
    ]
    for operands in forms:
        launch(*operands)
    assert len(kernel.first) == len(forms)
    assert not kernel.later
    for operands in reversed(forms):
        launch(*operands)
    assert len(kernel.first) == len(kernel.later) == len(forms)


def test_described_operands():
    block = Block((8, 16), (16, 1), (8, 8))
    kernel, launch = make(blocks={0: block, 1: block})
    x = torch.zeros(8, 16)
    launch(x, None)
    descriptor = kernel.first[0][1][0]
    assert isinstance(descriptor, triton.tools.tensor_descriptor.TensorDescriptor)
    launch(x, None)
    direct = kernel.later[0][0]
    for name in ("shape", "strides", "block_shape"):
        assert list(getattr(descriptor, name)) == list(getattr(direct, name))
    assert direct.base is x
    assert kernel.later[0][1] is None
    fields = {name for name in vars(descriptor) if not hasattr(direct, name)}
    assert not fields, "what Triton's launcher may read"
    with pytest.raises(AssertionError, match="16-byte aligned"):
        launch(torch.zeros(8 * 16 + 1)[1:].view(8, 16), None)


@pytest.mark.parametrize("learned", [False, True])
def test_changing_sizes_strides_and_alignment(learned):
    """Every combination twice, in turns, so that each meets the kernels that others left."""
    dtype, memory = torch.float16, randn(80 * 200 + 8, dtype=torch.float16)
    code = randn(2, 3, 32, 16, dtype=dtype) if learned else random_code(2, 3, 2, 16)

    def inputs():
        for rows in (1, 3, 70):
            for start, stride in ((0, 96), (1, 96), (0, 97), (8, 200)):
                yield memory[start:].as_strided((rows, 96), (stride, 1))
        yield memory[: 96 * 3].view(96, 3).t()

    for _ in range(2):
        for x in inputs():
            actual = triton_blocks.sketch(x, code) if learned else triton_sketch.sketch(x, code, 48)
            expected = portable.sketch(x.double(), code.double() if learned else code, 48)
            assert_close(actual, expected)


def test_a_gate_may_come_and_go():
    x, code = randn(5, 97, dtype=torch.float16), random_code(2, 4, 2, 16)
    gates = [None, randn(5, 97, dtype=torch.float16), randn(5, 200, dtype=torch.float16)[:, 3:100]]
    for gate in (*gates, *reversed(gates)):
        actual = triton_activation.activation_sketch(x, gate, code, 64, "silu")
        value = (x if gate is None else gate).double()
        value = torch.nn.functional.silu(value) * (1 if gate is None else x.double())
        assert_close(actual, portable.sketch(value, code, 64), factor=2)


def test_host_arithmetic():
    for n in (*range(1, 300), 2**31, 2**31 + 1):
        assert power_of_2(n) == triton.next_power_of_2(n)
        assert ceil_div(n, 7) == -(-n // 7)


def test_checks_run_once_for_each_form():
    seen = []

    @once_per_form
    def check(x, others, name):
        seen.append((x.dtype, tuple(x.shape)))
        if x.shape[0] == 2:
            raise RuntimeError("two")

    for _ in range(3):
        check(torch.zeros(3), [None, torch.zeros(1)], "a")
        check(torch.zeros(3), [torch.zeros(1), None], "a")
        check(torch.zeros(3).half(), [None, torch.zeros(1)], "a")
        check(torch.zeros(3), [None, torch.zeros(1)], "b")
        with pytest.raises(RuntimeError, match="two"):
            check(torch.zeros(2), [], "a")
    assert len(seen) == 4 + 3


def test_device_of_a_tensor_on_the_host_or_the_current_device():
    x = torch.zeros(1, device=DEVICE)
    with device_of(x) as entered:
        assert entered is None


@pytest.mark.gpu
def test_known_launches_are_direct_and_equal():
    """On the GPU: Triton's launcher is not asked again, numbers agree, and graphs capture it."""
    sketched, z = randn(4, 300, 128, dtype=torch.float16), randn(256, 128, dtype=torch.float16)
    bias, residual = randn(256, dtype=torch.float16), randn(300, 256, dtype=torch.float16)

    def run():
        return triton_gemm.grouped_matmul(sketched, z, bias, activation="gelu", residual=residual)

    first = run()
    launcher = triton_gemm._gemm_kernel.run
    triton_gemm._gemm_kernel.run = SimpleNamespace()  # not callable
    try:
        again = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        sketched.normal_()
        graph.replay()
        expected = run()
    finally:
        triton_gemm._gemm_kernel.run = launcher
    assert ON_GPU
    assert torch.equal(first, again)
    assert torch.equal(captured, expected)
    assert not torch.equal(first, expected)
