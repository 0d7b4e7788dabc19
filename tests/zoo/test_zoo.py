"""Every architecture of the zoo goes through every door."""

import pytest

pytest.importorskip("transformers")

from architectures import ARCHITECTURES
from checks import examine

SAMPLE = (
    "gpt2",  # Conv1D and a tied head
    "dlrm",  # widths that are no multiple of anything
    "nn.TransformerEncoder",  # fused operators
    "fused qkv",
    "einsum",
    "1×1 convolution",
    "checkpointed",
    "weight-norm",
)
BROKEN = {
    "torch.cond": "Dynamo refuses the eager torch.cond of a copied model; not understood yet",
}


def marks(name):
    made = [] if name in SAMPLE else [pytest.mark.zoo]
    return [*made, pytest.mark.xfail(reason=BROKEN[name])] if name in BROKEN else made


EVERY = [pytest.param(name, marks=marks(name)) for name in ARCHITECTURES]


@pytest.mark.parametrize("name", EVERY)
def test_architecture(name):
    result = examine(ARCHITECTURES[name])
    assert not result.failures
    assert result.flops > 0
    for door in result.doors.values():
        handled = door.rewritten + sum(door.reasons.values())
        assert door.skipped or handled == result.flops


def test_the_zoo_is_large():
    assert len(ARCHITECTURES) >= 40
    assert len({a.kind for a in ARCHITECTURES.values()}) >= 8
