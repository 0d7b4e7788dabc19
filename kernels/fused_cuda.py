"""CUDA implementation of the fused operators; see :mod:`ss1_compile.kernels.fused`."""

from __future__ import annotations

from ss1_compile.kernels.fused_portable import activation_sketch, matmul, norm_sketch

__all__ = ["activation_sketch", "matmul", "norm_sketch"]
