"""A small model with residual blocks for the tests of ``compress``."""

import torch
import torch.nn.functional as F
from torch import nn

from ss1_compile import compress

D = 64


def quiet(model, **options):
    return compress(model, progress=False, **{"warn_error": 2.0, **options})


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q, self.k = nn.Linear(D, D, bias=False), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 3 * D), nn.Linear(3 * D, D)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.q(h) * torch.sigmoid(self.k(h))
        return x + self.down(F.gelu(self.up(x)))


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block(), nn.Linear(D, 3)).eval()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def batches(count=4):
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(D, D, generator=generator)  # correlated features, as in real models
    return [torch.randn(64, D, generator=generator) @ mixing for _ in range(count)]


def poison(model):
    with torch.no_grad():
        model[1].down.weight[3, 5] = float("nan")
    return model
