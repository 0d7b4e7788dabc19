"""Models and comparisons for the tests of ``backend="ss1"``."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from ss1_compile import compress

D = 64


class Mlp(nn.Module):
    def __init__(self, width=D, hidden=2 * D):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


def compiled(model, inner="eager", **options):
    options.setdefault("warn_error", 2.0)
    return torch.compile(model, backend="ss1", options={"inner_backend": inner, **options})


def ss1_of(model, **options):
    """The same compression through the other door: the oracle for every test at c > 1."""
    other = copy.deepcopy(model)
    compress(other, progress=False, **{"warn_error": 2.0, **options})
    return other


def assert_same(actual, expected, tolerance=1e-5):
    error = (actual - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


def call_compiled(model, grad=False, **options):
    with torch.set_grad_enabled(grad):
        return compiled(model.eval(), **options)(torch.randn(2, D))


def in_place(model):
    with torch.no_grad():
        model.up.weight.mul_(-2)
