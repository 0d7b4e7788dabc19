"""The CPU implementation of the operators."""

from ss1_compile.kernels.portable import linear, sketch, unsketch

__all__ = ["linear", "sketch", "unsketch"]
