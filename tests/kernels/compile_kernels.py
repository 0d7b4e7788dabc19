"""Compile every kernel, as its launcher calls it, for a GPU that need not be there.

Run as a script by ``test_triton_compile.py`` (Triton decides when a kernel is decorated whether it
is interpreted). Prints one JSON line per kernel: name, registers' spill bytes, and memory widths.
"""

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ss1_compile.kernels import triton_blocks, triton_decode, triton_gemm, triton_sketch

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
calls = []


def record(self, grid):
    return lambda *args, **kwargs: calls.append((self, args, kwargs))


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
    for size, rank in ((128, 32), (128, 24), (256, 64)):
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


def compile_for(capability, kernel, args, kwargs):
    """The compiled kernel for arguments specialised as at a launch."""
    options = {k: kwargs[k] for k in ("num_warps", "num_stages") if k in kwargs}
    kwargs = {k: v for k, v in kwargs.items() if k not in (*options, "launch_pdl")}
    signature, constants, attributes = {}, {}, {}
    bound = kernel.signature.bind(*args, **kwargs).arguments
    for parameter, (name, value) in zip(kernel.params, bound.items(), strict=True):
        at = (parameter.num,)
        plain = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None:
            signature[name], constants[at] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[at] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            shape = str(list(value.block_shape)).replace(" ", "")
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{shape}>"
        elif value == 1 and plain:
            signature[name], constants[at] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and plain:
                attributes[at] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main():
    capability = int(sys.argv[1])
    JITFunction.__getitem__ = record
    triton_gemm._processors = lambda device: 132
    launch_all()
    for kernel, args, kwargs in calls:
        if capability < 90 and (kwargs.get("PDL") or kernel.fn.__name__ == "_gemm_kernel"):
            continue  # not launched there
        compiled = compile_for(capability, kernel, args, kwargs)
        ptx = compiled.asm["ptx"]
        widths = set(re.findall(r"(?:ld|st)\.global[\w.:]*?((?:\.v\d)?\.b\d+)", ptx))
        print(
            json.dumps(
                {
                    "kernel": kernel.fn.__name__,
                    "spilled": ".local" in ptx,
                    "widths": sorted(widths),
                    "copies_16_bytes": "cp.async.cg" in ptx or "cp.async.bulk" in ptx,
                    "tensor_cores": "wgmma" in ptx or "mma.sync" in ptx,
                    "shared": compiled.metadata.shared,
                }
            )
        )


main()
