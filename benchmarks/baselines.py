"""The other structured layers, at the same number of parameters as SS1: ``K·N/c``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _multiple(value: float, of: int = 8) -> int:
    return max(of, round(value / of) * of)


class LowRank:
    """``y = (x Uᵀ) Vᵀ`` with rank ``K·N / (c·(K + N))``; Llama-style layers without bias."""

    def __init__(
        self, in_features: int, out_features: int, reduction: float, dtype: torch.dtype
    ) -> None:
        rank = _multiple(in_features * out_features / (reduction * (in_features + out_features)))
        self.u = torch.randn(rank, in_features, device="cuda", dtype=dtype) / in_features**0.5
        self.v = torch.randn(out_features, rank, device="cuda", dtype=dtype) / rank**0.5
        self.parameters = self.u.numel() + self.v.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """``[M, K] -> [M, N]``."""
        return F.linear(F.linear(x, self.u), self.v)


class Monarch:
    """Two block-diagonal products with a permutation between (Dao et al., ICML 2022).

    ``nblocks`` blocks ``[K/nblocks, q]``, the intermediate ``[nblocks, q]`` read as
    ``[q, nblocks]``, then ``nblocks`` blocks ``[q, N/nblocks]``; ``q·(K + N)`` parameters, so
    ``q = K·N / (c·(K + N))``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        reduction: float,
        dtype: torch.dtype,
        nblocks: int = 4,
    ) -> None:
        q = _multiple(in_features * out_features / (reduction * (in_features + out_features)))
        self.nblocks, self.q = nblocks, q
        self.first = torch.randn(nblocks, in_features // nblocks, q, device="cuda", dtype=dtype)
        self.second = torch.randn(nblocks, q, out_features // nblocks, device="cuda", dtype=dtype)
        self.first *= (nblocks / in_features) ** 0.5
        self.second *= q**-0.5
        self.parameters = self.first.numel() + self.second.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """``[M, K] -> [M, N]``, the output straight into its columns."""
        rows, blocks = x.shape[0], self.nblocks
        inner = torch.bmm(x.view(rows, blocks, -1).transpose(0, 1), self.first)
        shuffled = inner.permute(1, 2, 0).reshape(rows, blocks, self.q).transpose(0, 1)
        y = x.new_empty(rows, self.second.shape[2] * blocks)
        torch.bmm(shuffled, self.second, out=y.view(rows, blocks, -1).transpose(0, 1))
        return y
