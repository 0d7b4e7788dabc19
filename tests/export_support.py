"""Programs and checks for the tests of ``compress_exported``."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram, export

from ss1_compile import (
    compress,
    compress_exported,
)

D = 64


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(D, 2 * D)
        self.down = nn.Linear(2 * D, D)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


def exported(model, *args, decompose=False, strict=False, **kwargs) -> ExportedProgram:
    ep = export(model, args, strict=strict, **kwargs)
    return ep.run_decompositions() if decompose else ep


def mlp_program(model, **options):
    return exported(
        model, torch.randn(4, D), dynamic_shapes={"x": {0: Dim("n", max=512)}}, **options
    )


def ss1(ep, **options):
    """The new program, without the warning that random weights deserve."""
    return compress_exported(ep, **{"warn_error": 2.0, **options})


def compressed(model, **options):
    other = copy.deepcopy(model)
    compress(other, progress=False, **{"warn_error": 2.0, **options})
    return other


def assert_same(actual, expected, tolerance=1e-5):
    error = (actual - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


def kinds(ep):
    return {spec.target: spec.kind for spec in ep.graph_signature.input_specs if spec.target}


def snapshot(ep):
    """Everything of a program that a rewrite could damage."""
    return (
        str(ep.graph),
        str(ep.graph_signature),
        {name: (id(t), t._version, t.clone()) for name, t in ep.state_dict.items()},
        dict(ep.constants),
        str(ep.range_constraints),
    )


def assert_unchanged(before, after):
    assert before[0] == after[0]
    assert before[1] == after[1]
    assert before[2].keys() == after[2].keys()
    for name, (identity, version, value) in before[2].items():
        assert (identity, version) == after[2][name][:2]
        assert torch.equal(value, after[2][name][2])
    assert before[3].keys() == after[3].keys()
    assert before[4] == after[4]


class Tied(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.first = nn.Embedding(D, D) if embedding else nn.Linear(D, D, bias=False)
        self.second = nn.Linear(D, D)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))
