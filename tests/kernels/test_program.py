"""What a recorded call is written down as, and what is not."""

import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.kernels.parameters import Unrecordable, parameter_sizes, parameters_of
from ss1_compile.kernels.program import Recorder


def record(function, *operands):
    numbers = {}
    recorder = Recorder(operands, lambda *name: numbers.setdefault(name, len(numbers)))
    with recorder:
        result = function(*operands)
    return recorder.program(result), list(numbers)


def test_allocations_views_and_calls():
    def function(x, z):
        y = x.new_empty(6, 4)
        torch.mm(x[2:], z[0].t(), out=y[1:5])
        return y

    program, operators = record(function, torch.randn(6, 8), [torch.randn(4, 8)])
    assert operators == [("aten::mm", "out")]
    allocation = [0, 6, 1, 2, 6, 4, 2, 4, 1]
    views = [
        [2, 0, 16, 2, 4, 8, 2, 8, 1],
        [2, 1, 0, 2, 8, 4, 2, 1, 8],
        [2, 2, 4, 2, 4, 4, 2, 4, 1],
    ]
    call = [2, 0, 0, 3, *views[0], *views[1], *views[2]]
    assert program == [2, 2, *allocation, *call, 1, 2, 0, 2, 6, 4, 2, 4, 1]


def test_arguments_of_every_kind():
    def function(x):
        y = torch.addmm(x, x, x, beta=0.5, alpha=2)
        return torch.amax(y, [0, -1], keepdim=True)

    program, operators = record(function, torch.randn(3, 3))
    assert operators == [("aten::addmm", ""), ("aten::amax", "")]
    half = struct.unpack("<q", struct.pack("<d", 0.5))[0]
    matrix = [2, 0, 0, 2, 3, 3, 2, 3, 1]
    addmm = [2, 0, 1, 5, *matrix * 3, 4, half, 3, 2]
    amax = [2, 1, 1, 3, 2, 1, 0, 2, 3, 3, 2, 3, 1, 6, 2, 0, -1, 5, 1]
    assert program == [1, 2, *addmm, *amax, 1, 2, 0, 2, 1, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x, "an operand's"),
        (lambda x: x[:1], "an operand's"),
        (lambda x: (y := x + x, y[:1]), "share memory"),
        (lambda x: (x + x)[1:], "share memory"),
        (lambda x: x.new_empty(2, device="meta"), "an allocation on meta"),
        (lambda x: (x + x).view(torch.int32), "a view as torch.int32"),
        (lambda x: x.new_empty(2, dtype=torch.complex64), "no number for torch.complex64"),
        (lambda x: x.sum(dtype=torch.float64), "an argument torch.float64"),
    ],
)
def test_what_cannot_be_recorded(function, reason):
    with pytest.raises(Unrecordable, match=reason):
        record(function, torch.randn(4))


def test_no_tensor_among_the_operands():
    with pytest.raises(Unrecordable, match="no operand"):
        Recorder((1, None, "a"))


# --- parameters ---------------------------------------------------------------------------------

KINDS = {
    "i1": ("?", st.booleans()),
    "i8": ("b", st.integers(-(2**7), 2**7 - 1)),
    "i16": ("h", st.integers(-(2**15), 2**15 - 1)),
    "i32": ("i", st.integers(-(2**31), 2**31 - 1)),
    "i64": ("q", st.integers(-(2**63), 2**63 - 1)),
    "u32": ("I", st.integers(0, 2**32 - 1)),
    "u64": ("Q", st.integers(0, 2**64 - 1)),
    "fp16": ("e", st.floats(width=16, allow_nan=False)),
    "fp32": ("f", st.floats(width=32, allow_nan=False)),
    "fp64": ("d", st.floats(allow_nan=False)),
}


def compiled(**signature):
    return SimpleNamespace(
        metadata=SimpleNamespace(tensordesc_meta=None), src=SimpleNamespace(signature=signature)
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_numbers_are_passed_as_their_bytes(data):
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    code, values = KINDS[kind]
    value = data.draw(values)
    (parameter,) = parameters_of(compiled(n=kind), [value])
    packed = struct.pack("<" + code, value)
    assert parameter.size == len(packed)
    assert struct.pack("<q", parameter.bits)[: len(packed)] == packed


def test_a_bfloat16_is_the_upper_half():
    (parameter,) = parameters_of(compiled(n="bf16"), [1.5])
    assert (parameter.size, parameter.bits) == (2, 0x3FC0)


def test_tuples_are_taken_apart_and_constants_dropped():
    x = torch.zeros(2)
    kernel = compiled(a="*fp32", aux=("*fp32", "i32", "constexpr", ("i64",)), c="constexpr")
    found = list(parameters_of(kernel, [x, (x, 3, None, (4,)), 7]))
    assert [(p.size, p.bits, p.base is x) for p in found] == [
        (8, 0, True),
        (8, 0, True),
        (4, 3, False),
        (8, 4, False),
    ]


def test_a_type_that_is_not_known():
    with pytest.raises(Unrecordable, match="type fp128"):
        list(parameters_of(compiled(n="fp128"), [1.0]))


def test_sizes_by_ptx():
    text = """
.visible .entry k(
	.param .align 64 .b8 k_param_0[128],
	.param .u32 k_param_1,
	.param .u64 .ptr .global .align 1 k_param_2,
	.param .f32 k_param_3,
	.param .u16 k_param_4,
	.param .u8 k_param_5
)
.reqntid 128
"""
    assert parameter_sizes(text) == [128, 4, 8, 4, 2, 1]
    assert parameter_sizes(".visible .entry k()\n{") == []
    with pytest.raises(Unrecordable, match="no kernel"):
        parameter_sizes("// nothing")
