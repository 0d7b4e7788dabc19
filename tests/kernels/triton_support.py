"""Operands and device for the Triton tests: the GPU if there is one, else Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="the Triton kernels need Triton")
pytest.importorskip("numpy", reason="Triton's interpreter needs NumPy")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU and type(triton.language.zeros).__name__ != "InterpretedFunction":
    pytest.skip("Triton was imported before TRITON_INTERPRET was set", allow_module_level=True)


def _allow_numpy_2_4() -> None:
    """Let the interpreter of Triton 3.6 convert its one-element arrays to loop bounds.

    It calls ``int`` on an array of shape ``[1]``, which NumPy refuses since 2.4.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if not ON_GPU:
    _allow_numpy_2_4()

ACTIVATIONS = {  # what the kernels' names mean
    "none": lambda v: v,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
}

# of the result's norm: rounding the output once, and for products the rounding of X̃
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# the interpreter computes bfloat16 through NumPy, which has none
DTYPES = (
    (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)
)


def random_code(hashes: int, groups: int, reduction: int, block_k: int) -> torch.Tensor:
    """A random packed rotation code ``[J, G, c]``."""
    rotations = torch.randint(0, block_k // 8, (hashes, groups, reduction)) * 8
    signs = torch.rand(rotations.shape) < 0.5
    return torch.where(signs, ~rotations, rotations).to(torch.int32).to(DEVICE)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal on the test device, rounded to ``dtype``."""
    return torch.randn(*shape).to(dtype).to(DEVICE)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
    """Relative error in the Frobenius norm within the dtype's tolerance; NaN never passes."""
    expected = expected.double().to(actual.device)
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= factor * TOLERANCE[actual.dtype], f"relative error {error:.1e}"
