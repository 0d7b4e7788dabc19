"""The SS1 operators: schemas, CPU and CUDA implementations, and a float64 reference.

Importing this package registers ``torch.ops.ss1.*`` and needs neither a GPU nor Triton.
"""

from ss1_compile.kernels import fused as fused
from ss1_compile.kernels import op as op
from ss1_compile.kernels import quantized as quantized
from ss1_compile.kernels.layout import block_n, pack, unpack

__all__ = ["block_n", "fused", "op", "pack", "quantized", "unpack"]
