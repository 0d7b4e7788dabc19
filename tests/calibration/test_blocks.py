"""Chains of blocks: found where they are, and not where they only seem to be."""

import pytest
import torch
from torch import nn

from ss1_compile.calibration.blocks import Chain, NoChainError, find_chain

D = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x, other=None, cache=None, returns_tuple=False):
        y = torch.tanh(self.linear(x))
        y = y if other is None else y + other
        return (y, None) if returns_tuple else y


class Stack(nn.Module):
    """Blocks called in the way that ``kind`` says."""

    def __init__(self, kind="plain", depth=3):
        super().__init__()
        self.kind = kind
        self.before, self.head = nn.Linear(D, D), nn.Sequential(nn.Linear(D, D), nn.ReLU())
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        fixed, before = x.mean(-1, keepdim=True), self.before(x)
        outputs = []
        for i, block in enumerate(
            reversed(self.blocks) if self.kind == "backwards" else self.blocks
        ):
            if self.kind == "tuple":
                x = block(x, returns_tuple=True)[0]
            elif self.kind == "keyword":
                x = block(x=x, other=fixed)
            elif self.kind == "skip":
                x = block(x, outputs[-2] if i > 1 else None)
            elif self.kind == "of the model":
                x = block(x, before)
            elif self.kind == "glue":
                x = block(2 * x)
            elif self.kind == "cache":
                x = block(x, cache=object())
            elif self.kind == "twice":
                x = block(block(x))
            else:
                x = block(x)
            outputs.append(x)
        return self.head(x)


def weights(model):
    return [n for n, p in model.named_parameters() if p.dim() == 2]


@pytest.mark.parametrize("kind", ["plain", "tuple", "keyword"])
def test_a_chain_is_found_and_replayed(kind):
    torch.manual_seed(0)
    model, x = Stack(kind), torch.randn(4, D)
    with torch.no_grad():
        chain = find_chain(model, weights(model), x)
        assert chain.names == ["blocks.0", "blocks.1", "blocks.2"]
        assert chain.block_of("blocks.1.linear.weight") == 1
        assert chain.block_of("before.weight") is None
        calls = chain.record(model, x)
        h = calls[0].previous
        for block, call in zip(model.blocks, calls, strict=True):
            h = call.run(block, h)
            h = h[0] if kind == "tuple" else h
        assert torch.equal(model.head(h), model(x))
        assert len(chain.record(model, x, last=1)) == 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["skip", "of the model", "glue", "cache", "twice", "backwards"])
def test_no_chain_where_a_block_reads_something_else(kind):
    torch.manual_seed(0)
    model = Stack(kind)
    with torch.no_grad():
        assert find_chain(model, weights(model), torch.randn(4, D)) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_does_not_change_with_the_layers_may_be_read_beside():
    model = Stack("of the model")
    others = [name for name in weights(model) if not name.startswith("before")]
    with torch.no_grad():
        assert find_chain(model, others, torch.randn(4, D)) is not None


def test_the_chain_is_where_most_layers_are_spread():
    model = nn.Sequential(Stack(), nn.Linear(D, D))  # itself a list of two, one of them nearly all
    with torch.no_grad():
        chain = find_chain(model, weights(model), torch.randn(4, D))
    assert chain.names[0] == "0.blocks.0"
    assert find_chain(nn.Linear(D, D), ["weight"], torch.randn(4, D)) is None


def test_a_block_in_two_places_is_no_chain():
    model = Stack()
    model.blocks[2] = model.blocks[0]
    with torch.no_grad(), pytest.raises(NoChainError, match="several places"):
        Chain(["blocks.0", "blocks.2"]).record(model, torch.randn(4, D))
