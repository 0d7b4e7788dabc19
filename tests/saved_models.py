"""Small models and comparisons for the tests of saving and loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ss1_compile.config import SS1Config
from ss1_compile.modules import SS1Linear

TENSORS, CONFIG = "model.safetensors", "ss1_config.json"


class Net(nn.Module):
    """Linears with and without bias, a tied head, a shared layer and both kinds of buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(32, 32)])
        self.blocks.append(self.blocks[0])
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((32,), 0.5), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.scale
        x = x + self.down(self.up(x).relu())
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def to_ss1(model: nn.Module, skip: tuple[str, ...] = ()) -> nn.Module:
    """Put random SS1 layers in the place of the linear layers; shared layers stay shared."""
    config = SS1Config(reduction=2, min_features=8)
    made: dict[nn.Module, SS1Linear] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if name in skip or type(module).__name__ not in ("Linear", "Conv1D"):
            continue
        if module not in made:
            shape = module.weight.shape
            n, k = shape if isinstance(module, nn.Linear) else reversed(shape)
            structure = config.structure_for(name, k, n)
            assert not isinstance(structure, str)
            z = torch.randn(n, structure.reduced_features, dtype=module.weight.dtype) / k**0.5
            made[module] = SS1Linear.from_tensors(structure, nn.Parameter(z), module.bias)
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, made[module])
    return model


def saved_net() -> nn.Module:
    torch.manual_seed(0)
    net = to_ss1(Net(), skip=("head",)).eval()
    with torch.no_grad():
        net.scale.uniform_(0.5, 1.5)
        net.norm.running_mean.normal_()
    return net


def meta_net() -> nn.Module:
    with torch.device("meta"):
        return Net().eval()


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    return {name: tensor for kind in tensors for name, tensor in kind}


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = everything(a), everything(b)
    return ours.keys() == theirs.keys() and all(
        t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]) for name, t in ours.items()
    )


def identity(model: nn.Module) -> list[Any]:
    """Equal before and after only if no module, mode, tensor or value changed."""
    modules = [(n, id(m), m.training) for n, m in model.named_modules(remove_duplicate=False)]
    tensors = [
        (n, id(t), t._version, t.requires_grad, None if t.is_meta else t.tolist())
        for n, t in everything(model).items()
    ]
    return [modules, tensors]


TOKENS = torch.arange(12) % 20
