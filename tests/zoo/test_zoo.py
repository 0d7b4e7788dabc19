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
EVERY = [
    pytest.param(name, marks=() if name in SAMPLE else pytest.mark.zoo) for name in ARCHITECTURES
]


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
