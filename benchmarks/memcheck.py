"""Every kernel once on an odd shape, for ``compute-sanitizer``.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/memcheck.py

Without the caching allocator, an access outside a tensor is an access outside an allocation.
"""

import torch

from ss1_compile.kernels import triton_blocks, triton_decode, triton_gemm, triton_sketch


def main() -> None:
    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    def code(hashes: int, groups: int, reduction: int, block_k: int) -> torch.Tensor:
        shape = (hashes, groups, reduction)
        return torch.randint(0, block_k // 8, shape, device="cuda", dtype=torch.int32) * 8

    ragged = code(5, 6, 3, 32)  # K = 520 of 576, J = 5
    for rows, dtype in ((77, torch.bfloat16), (77, torch.float32), (3, torch.bfloat16)):
        sketched = triton_sketch.sketch(randn(rows, 520, dtype=dtype), ragged, 192)
        triton_sketch.unsketch(sketched, ragged, 520)
    blocks = randn(2, 5, 120, 24)
    triton_blocks.unsketch(triton_blocks.sketch(randn(77, 530), blocks), blocks, 530)
    for features in (650, 640, 1280):
        z, bias = randn(features, 192), randn(features)
        triton_gemm.grouped_matmul(randn(5, 77, 192), z, bias, residual=randn(77, features))
        triton_gemm.grouped_matmul(randn(5, 77, 192), z)
    triton_decode.gemv(randn(1, 520), ragged, randn(653, 192), randn(653))
    for split in (1, 3):
        triton_decode.stream(randn(5, 13, 192), randn(653, 192), randn(653), tile=(64, split, 3))
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
