"""The guard of a graph whose layers share a sketch: it looks again only where it must."""

import pytest
import torch

from ss1_compile import fusion
from ss1_compile.errors import SS1Warning
from ss1_compile.fusion import Fused


@pytest.fixture
def compared(monkeypatch):
    """Every pair that was compared."""
    found = []

    def equal(a, b):
        found.append((a, b))
        return bool((a == b).all())

    monkeypatch.setattr(fusion.torch, "equal", equal)
    return found


def guarded(pairs=((0, 1),)):
    fused = Fused(original=lambda *args: "original", equal=pairs)
    return fused.guard(lambda *args: "fused")


def test_each_pair_is_compared_once_though_blocks_take_turns(compared):
    run = guarded(((0, 1), (0, 2)))
    blocks = [[torch.full((4,), float(i)) for _ in range(3)] for i in range(3)]
    for _ in range(4):
        for block in blocks:
            assert run(*block) == "fused"
    assert len(compared) == 2 * len(blocks)


def test_a_written_tensor_is_compared_again(compared):
    run = guarded()
    a, b = torch.ones(4), torch.ones(4)
    assert run(a, b) == run(a, b) == "fused"
    assert len(compared) == 1
    a.mul_(2)
    with pytest.warns(SS1Warning, match="different sketches now"):
        assert run(a, b) == "original"
    assert run(a, b) == "original"
    b.mul_(2)
    assert run(a, b) == "fused"
    b.data = torch.ones(4)
    assert run(a, b) == "original"
    assert len(compared) == 4


def test_a_new_tensor_at_the_place_of_a_dead_one_is_compared(compared):
    run, a = guarded(), torch.ones(4)
    for i in range(6):
        b = torch.ones(4)
        assert run(a, b) == "fused"
        assert len(compared) == i + 1
        del b
        compared[-1] = None


def test_tensors_that_do_not_tell_are_compared_each_time(compared):
    run = guarded()
    with torch.inference_mode():
        a, b = torch.ones(4), torch.ones(4)
        for _ in range(3):
            assert run(a, b) == "fused"
    assert len(compared) == 3


def test_memory_of_pairs_is_bounded(monkeypatch):
    monkeypatch.setattr(fusion, "_CALLS", 5)
    check, a = fusion._StillEqual([(0, 1)]), torch.ones(1)
    kept = [torch.ones(1) for _ in range(12)]
    for b in kept:
        assert check((a, b))
        assert len(check.known) <= 5
    kept.clear()
    del b
    assert not check.known


def test_only_the_pairs_that_changed_are_compared_again(compared):
    run = guarded(((1, 0), (2, 0), (4, 3)))
    tensors = [torch.ones(4) for _ in range(5)]
    assert run(*tensors) == "fused"
    assert len(compared) == 3
    tensors[4].mul_(1)
    assert run(*tensors) == "fused"
    assert len(compared) == 4
    assert compared[-1] == (tensors[4], tensors[3])
    tensors[0].add_(1)
    with pytest.warns(SS1Warning, match="different sketches now"):
        assert run(*tensors) == "original"
    tensors[1].add_(1)
    assert run(*tensors) == "original"  # the third is still another
    tensors[2].add_(1)
    assert run(*tensors) == "fused"
    assert len(compared) == 4 + 2 + 1 + 1
