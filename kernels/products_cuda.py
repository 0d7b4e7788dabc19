"""CUDA implementation of ``ss1::matmul``: products of sketched rows with what follows them.

Importing this module needs neither a GPU nor Triton. Where no kernel applies (float64, no Triton)
the operator is composed of PyTorch functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ss1_compile.kernels import cuda, fused_portable, lowering
from ss1_compile.kernels.launch import device_of


@cache
def _products() -> tuple[ModuleType, ModuleType]:
    """The Triton launchers ``(decode, gemm)``."""
    from ss1_compile.kernels import triton_decode, triton_gemm

    return triton_decode, triton_gemm


def _as_one(
    rows: int, z: Sequence[Tensor], bias: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Weights and biases of layers that read the same rows (J = 1), as one where that is faster."""
    biased = [part for part in bias if part is not None]
    if biased and len(biased) < len(bias):
        return z, bias
    together, start = _adjacent(z), _adjacent(bias)
    if together is not None and (start is not None or not biased):
        return [together], [start]
    if not _packing_pays(rows, z):
        return z, bias
    from ss1_compile.kernels import triton_pack

    with device_of(z[0]):
        return [triton_pack.pack(z)], [triton_pack.pack(biased) if biased else None]


def _packing_pays(rows: int, z: Sequence[Tensor]) -> bool:
    """Whether one product behind a copy of the weights beats one for each.

    On one NVIDIA H200 (bf16, three times 256 → 1024 with bias) in µs: 13.8 → 6.1 for 256 rows,
    74.5 → 56.6 for 16384. 1024 → 4096, 1024, 1024 (12.6 MB): 25.6 → 26.7 for 1024 rows.
    """
    return rows >= 256 and sum(part.numel() * part.element_size() for part in z) <= 8 << 20


def _adjacent(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The parts as one tensor, where each begins in memory where the one before it ends."""
    first = parts[0]
    if first is None:
        return None
    at = first.data_ptr()
    for part in parts:
        if part is None or not part.is_contiguous() or part.data_ptr() != at:
            return None
        at += part.numel() * part.element_size()
    total = sum(part.shape[0] for part in parts if part is not None)
    if first.storage_offset() * first.element_size() + at - first.data_ptr() > (
        first.untyped_storage().nbytes()
    ):
        return None  # neighbours by chance, in storages of their own
    return first.as_strided((total, *first.shape[1:]), first.stride())


def library_activates(sketched: Tensor, bias: Tensor | None, activation: str) -> bool:
    """Whether cuBLASLt has an epilogue for bias and activation: ReLU, or tanh-GELU.

    Of 16-bit types, for which its tanh is exact enough.
    """
    return (
        activation in ("relu", "gelu_tanh")
        and sketched.shape[0] == 1
        and bias is not None
        and sketched.is_cuda
        and sketched.element_size() == 2
    )


def _in_epilogue(
    sketched: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out: Tensor,
) -> bool:
    """Whether the library's own epilogue is all of it."""
    activates = library_activates(sketched, bias, activation)
    return activates and residual is None and out.is_contiguous()


def _library_product(
    sketched: Tensor,
    z: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    """The library's product, then one kernel for what it has no epilogue for."""
    hashes = sketched.shape[0]
    if _in_epilogue(sketched, bias, residual, activation, out):
        assert bias is not None
        gelu = activation == "gelu_tanh"
        torch._addmm_activation(bias, sketched[0], z.t(), use_gelu=gelu, out=out)
        return
    plain = activation == "none" and residual is None
    if hashes == 1:
        whole = out.is_contiguous()
        if bias is not None and whole:
            torch.addmm(bias, sketched[0], z.t(), out=out)
            bias = None
        else:
            torch.mm(sketched[0], z.t(), out=out)
    else:
        cuda.library_matmul(sketched, z, None, out)
    if plain:
        if bias is not None:
            out.add_(bias)
        return
    from ss1_compile.kernels import triton_epilogue

    triton_epilogue.finish(out, bias, residual, activation)


def _product(
    sketched: Tensor,
    z: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    """``act(X̃ zᵀ + b) + residual`` of one z, into ``out [M, N]``, a column slice of y."""
    triton_decode, triton_gemm = _products()
    if z.stride(1) != 1:
        z = z.contiguous()
    layer = cuda.describe_product(sketched, z, bias)
    # what the library leaves to a second kernel: y is read and written, and a residual read
    passes = 0.0
    strided = sketched.shape[0] > 1 or not out.is_contiguous()
    extra = activation != "none" or residual is not None or (bias is not None and strided)
    if extra and not _in_epilogue(sketched, bias, residual, activation, out):
        passes = 2.0 + (residual is not None)
    chosen = lowering.choose_product(layer, passes, cuda._device_name(z.device))
    if chosen == "stream":
        triton_decode.stream(sketched, z, bias, activation=activation, residual=residual, out=out)
    elif chosen == "triton":
        triton_gemm.grouped_matmul(
            sketched, z, bias, activation=activation, residual=residual, out=out
        )
    else:
        _library_product(sketched, z, bias, residual, activation, out)


def matmul(
    sketched: Tensor,
    z: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """``act(X̃ zᵀ + b) + residual``; linears whose z lie side by side run as one (J = 1)."""
    if not sketched.shape[1] or not cuda.has_kernels(sketched.dtype):
        return fused_portable.matmul(sketched, z, bias, residual, activation)
    sketched = sketched.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    if sketched.shape[0] == 1 and len(z) > 1:
        z, bias = _as_one(sketched.shape[1], z, bias)
    y = sketched.new_empty(sketched.shape[1], sum(part.shape[0] for part in z))
    with device_of(sketched):
        if len(z) == 1:
            _product(sketched, z[0], bias[0], residual, activation, y)
            return y
        first = 0
        for part, start in zip(z, bias, strict=True):
            columns = slice(first, first + part.shape[0])
            first += part.shape[0]
            added = None if residual is None else residual[:, columns]
            _product(sketched, part, start, added, activation, y[:, columns])
    return y
