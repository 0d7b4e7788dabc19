"""Layers and comparisons for the tests of input statistics."""

import torch
from torch import Tensor, nn

from ss1_compile.calibration.statistics import (
    InputStatistics,
)


class Conv1D(nn.Module):
    """The layer of GPT-2 in Hugging Face transformers: weight ``[K, N]``, through addmm."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], -1)


class Attention(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        h = self.norm(x * scale)
        mixed = torch.softmax(self.query(h) @ self.key(h).mT, -1) @ self.value(h)
        return self.output(self.dropout(mixed))


def assert_moments(found: InputStatistics, rows: Tensor) -> None:
    rows = rows.double()
    assert found.count == len(rows)
    assert found.mean.dtype == found.second_moment.dtype == torch.float64
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        found.second_moment, rows.t() @ rows / len(rows), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        found.covariance(), torch.cov(rows.t(), correction=0).view_as(found.second_moment)
    )
