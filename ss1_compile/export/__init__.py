"""Compress ``torch.export`` programs."""

from ss1_compile.export.program import compress_exported

__all__ = ["compress_exported"]
