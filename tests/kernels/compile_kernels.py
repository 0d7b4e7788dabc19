"""Compile every kernel, as its launcher calls it, for a GPU that need not be there.

Run as a script by ``test_triton_compile.py`` (Triton decides when a kernel is decorated whether it
is interpreted), with the compute capability and its bytes of shared memory. Prints a JSON line for
each kernel: name, whether registers spilled, memory widths, shared memory.
"""

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ss1_compile.kernels import (
    parameters,
    triton_activation,
    triton_blocks,
    triton_decode,
    triton_epilogue,
    triton_gemm,
    triton_gemm_sketch,
    triton_norm,
    triton_pack,
    triton_quantize_rows,
    triton_quantized_decode,
    triton_quantized_gemm,
    triton_quantized_sketch,
    triton_sketch,
)

TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
calls = []
later = []


def record(self, grid):
    """Stands in for Triton's launcher, and for the compiled kernel that it returns."""

    def launch(*args, **kwargs):
        calls.append((self, args, kwargs))
        return {grid: lambda *direct: later.append((self, direct))}

    return launch


def is_launch_of(kernel, direct, args, kwargs):
    """Whether a compiled kernel called with ``direct`` gets what ``args`` and ``kwargs`` say."""
    values = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = kernel.signature.bind(*args, **values).arguments.values()

    def same(value, given):
        if isinstance(value, torch.Tensor):
            return type(given) is int and given % 16 == 0
        if isinstance(value, TensorDescriptor):
            return hasattr(given, "base") and all(
                list(getattr(value, name)) == list(getattr(given, name))
                for name in ("shape", "strides", "block_shape")
            )
        if isinstance(value, tuple):
            if type(given) is not tuple or len(value) != len(given):
                return False
            return all(map(same, value, given))
        return value is given or (type(value) is type(given) and value == given)

    return len(bound) == len(direct) and all(map(same, bound, direct))


def check_later_launches():
    """Launch all again: directly, and with the arguments of the first time."""
    first = calls[:]
    launch_all()
    launch_fused()
    assert len(calls) == len(first), calls[-1][0].fn.__name__
    for kernel, args, kwargs in first:
        matching = [
            direct
            for launched, direct in later
            if launched is kernel and is_launch_of(kernel, direct, args, kwargs)
        ]
        assert matching, (kernel.fn.__name__, kwargs)


def launch_all():
    def zeros(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)

    x = zeros(4096, 2048)
    for c, block_k in ((2, 64), (8, 64), (4, 128)):
        code = zeros(c, 2048 // c // block_k, c, dtype=torch.int32)
        triton_sketch.sketch(x, code, 2048 // c)
        triton_sketch.unsketch(zeros(c, 4096, 2048 // c), code, 2048)
        triton_sketch.sketch(x[:16], code, 2048 // c)
        triton_sketch.sketch(zeros(128, 2048, dtype=torch.float32), code, 2048 // c)
    for size, rank in ((128, 32), (128, 24), (256, 64), (256, 128)):
        blocks = zeros(1, 2048 // size, size, rank)
        triton_blocks.sketch(x, blocks)
        triton_blocks.unsketch(zeros(1, 4096, 2048 // size * rank), blocks, 2048)
    bias = zeros(4096)
    triton_gemm.grouped_matmul(zeros(4, 4096, 512), zeros(4096, 512), bias)
    triton_gemm.grouped_matmul(zeros(8, 4096, 256), zeros(1024, 256), bias[:1024])
    triton_gemm.grouped_matmul(zeros(4, 4096, 512), zeros(4096, 512), bias, pdl=True)
    residual = zeros(4096, 4096)
    triton_gemm.grouped_matmul(
        zeros(4, 4096, 512), zeros(4096, 512), bias, activation="gelu", residual=residual
    )
    code = zeros(4, 16, 4, dtype=torch.int32)
    triton_decode.gemv(zeros(1, 4096), code, zeros(4096, 1024), bias)
    for pdl in (False, True):
        triton_decode.stream(zeros(4, 16, 4096), zeros(4096, 4096), bias, pdl=pdl)
        triton_decode.stream(zeros(4, 16, 1024), zeros(14336, 1024), None, pdl=pdl)
        triton_decode.stream(zeros(4, 64, 1024), zeros(14336, 1024), None, pdl=pdl)


def launch_fused():
    def zeros(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)

    x, vector = zeros(4096, 1024), zeros(1024)
    wide = zeros(4096, 2048)
    for code in (zeros(4, 4, 4, dtype=torch.int32), zeros(1, 8, 128, 32)):
        operands = (vector, vector, code, 256, 1e-5, False, False)
        triton_norm.norm_sketch(x, x, *operands)
        triton_norm.norm_sketch(x[:16], None, *operands)
        if code.dtype == torch.int32:  # the way for long rows of a rotation
            triton_norm.statistics_first(x, None, *operands)
        triton_activation.activation_sketch(x, None, code, 256, "gelu")
        triton_activation.activation_sketch(wide[:, :1024], wide[:, 1024:], code, 256, "silu")
    triton_activation.activation_sketch(x, None, zeros(1, 4, 256, 128), 512, "gelu")
    triton_epilogue.finish(x, vector, x, "gelu")
    triton_pack.pack([x[:8], x[:16], x[:8]])
    for rows, reduced, size, rank in (
        (4096, 256, 128, 32),
        (16, 512, 192, 48),
        (4096, 1024, 384, 96),
    ):
        narrow, blocks = zeros(1, rows, reduced), zeros(1, 16, size, rank)
        for gate in (None, (zeros(2048, reduced), None)):
            triton_gemm_sketch.matmul_sketch(
                narrow, zeros(2048, reduced), zeros(2048), blocks, "gelu", gate=gate
            )


def launch_quantized(dtype):
    def zeros(*shape, dtype=dtype):
        return torch.zeros(shape, dtype=dtype)

    bf16, f32 = torch.bfloat16, torch.float32
    x = zeros(4096, 2048, dtype=bf16)
    for c, block_k, variant in ((2, 64, "gather"), (4, 128, "gather"), (8, 64, "permute")):
        code = zeros(c, 2048 // c // block_k, c, dtype=torch.int32)
        triton_quantized_sketch.rotation(x, code, 2048 // c, dtype, variant=variant)
        triton_quantized_sketch.rotation(x[:16], code, 2048 // c, dtype)
    triton_quantized_sketch.learned(x, zeros(1, 16, 128, 32, dtype=bf16), dtype)
    triton_quantize_rows.quantize_rows(zeros(1, 16, 1024, dtype=f32), dtype)
    triton_quantize_rows.quantize_rows(zeros(1, 8192, 2048, dtype=bf16), dtype, chained=True)
    triton_quantize_rows.quantize_rows(zeros(1, 16, 9000, dtype=bf16), dtype, pdl=True)
    scale, bias = zeros(4096, 1, dtype=f32), zeros(4096, dtype=bf16)
    z = zeros(4096, 1024)
    code = zeros(4, 16, 4, dtype=torch.int32)
    triton_quantized_decode.gemv(zeros(1, 4096, dtype=bf16), code, z, scale, bias)
    for pdl in (False, True):
        args = (z, scale, bias, bf16)
        triton_quantized_decode.stream(zeros(4, 16, 1024), zeros(4, 16, dtype=f32), *args, pdl=pdl)
        triton_quantized_decode.stream(zeros(4, 64, 1024, dtype=bf16), None, *args, pdl=pdl)
        for groups in (8, 128):  # whole steps a group, and several groups a step
            grouped = (z, zeros(4096, groups, dtype=f32), bias, bf16)
            triton_quantized_decode.stream(zeros(4, 64, 1024, dtype=bf16), None, *grouped, pdl=pdl)
    q, q_scale = zeros(4, 4096, 1024), zeros(4, 4096, dtype=f32)
    for kwargs in (
        {},
        {"pdl": True},
        {"activation": "gelu", "residual": zeros(4096, 4096, dtype=bf16)},
    ):
        triton_quantized_gemm.grouped_matmul(q, q_scale, z, scale, bias, bf16, **kwargs)
    triton_quantized_gemm.grouped_matmul(q, q_scale, z, scale, bias.float(), f32)
    triton_quantized_gemm.widen(z, scale, bf16)


def compile_for(capability, kernel, args, kwargs):
    """The compiled kernel for arguments specialised as at a launch."""
    options = {k: kwargs[k] for k in ("num_warps", "num_stages", "maxnreg") if k in kwargs}
    kwargs = {k: v for k, v in kwargs.items() if k not in (*options, "launch_pdl")}
    signature, constants, attributes = {}, {}, {}

    def describe(value, at, plain):
        """The type of one argument, or of a tuple of them; ``at`` is its path."""
        if isinstance(value, tuple):
            return tuple(describe(part, (*at, index), plain) for index, part in enumerate(value))
        if value is None or (type(value) is int and value == 1 and plain):
            constants[at] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[at] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        if isinstance(value, TensorDescriptor):
            shape = str(list(value.block_shape)).replace(" ", "")
            return f"tensordesc<{TYPES[value.base.dtype]}{shape}>"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and plain:
            attributes[at] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"

    bound = kernel.signature.bind(*args, **kwargs).arguments
    for parameter, (name, value) in zip(kernel.params, bound.items(), strict=True):
        at = (parameter.num,)
        if parameter.is_constexpr:
            signature[name], constants[at] = "constexpr", value
        else:
            signature[name] = describe(value, at, not parameter.do_not_specialize)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled, tuple(bound.values())


def described(descriptor, metadata):
    """Stands in for Triton's function of this name, which asks the driver for the map."""
    return [None, *descriptor.shape, *descriptor.strides]


def records_every_parameter(compiled, values):
    """Whether what a program would pass has the sizes that the kernel's PTX declares."""
    given = [parameter.size for parameter in parameters.parameters_of(compiled, values)]
    sizes = parameters.parameter_sizes(compiled.asm["ptx"])
    return given == sizes[: len(given)] and sizes[len(given) :] == [8, 8]


def main():
    capability, shared_bytes = map(int, sys.argv[1:])
    for module in (triton_blocks, triton_decode, triton_quantized_decode):
        module.shared_memory = lambda device: shared_bytes
    JITFunction.__getitem__ = record
    triton_gemm._processors = triton_quantized_gemm._processors = lambda device: 132
    nvidia.make_tensordesc_arg = described
    parameters._tensor_map = lambda described: b""
    launch_all()
    launch_fused()
    check_later_launches()
    launch_quantized(torch.int8)
    if capability >= 90:
        launch_quantized(torch.float8_e4m3fn)
    for kernel, args, kwargs in calls:
        uses_tma = kernel.fn.__name__ in ("_gemm_kernel", "_gemm_sketch_kernel")
        chained = kwargs.get("PDL") or kwargs.get("CHAINED")
        if capability < 90 and (chained or uses_tma):
            continue  # not launched there
        compiled, values = compile_for(capability, kernel, args, kwargs)
        assert records_every_parameter(compiled, values), kernel.fn.__name__
        ptx = compiled.asm["ptx"]
        widths = set(re.findall(r"(?:ld|st)\.global[\w.:]*?((?:\.v\d)?\.b\d+)", ptx))
        print(
            json.dumps(
                {
                    "kernel": kernel.fn.__name__,
                    "module": kernel.fn.__module__.rpartition(".")[2],
                    "spilled": ".local" in ptx,
                    "widths": sorted(widths),
                    "copies_16_bytes": "cp.async.cg" in ptx or "cp.async.bulk" in ptx,
                    "tensor_cores": "wgmma" in ptx or "mma.sync" in ptx,
                    "shared": compiled.metadata.shared,
                    "programs": kwargs.get("PROGRAMS"),
                }
            )
        )


main()
