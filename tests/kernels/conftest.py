"""Without a GPU the Triton kernels run in Triton's interpreter.

Triton reads the variable while its own library is imported, so it is set before any test module.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
