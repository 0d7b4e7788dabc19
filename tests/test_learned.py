from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.errors import StructureError
from ss1_compile.kernels import reference
from ss1_compile.learned import (
    LearnedStructure,
    group_size_for,
    rank_for,
    structure_from_dict,
    structure_of,
)
from ss1_compile.structure import SS1Structure


@settings(deadline=None, max_examples=80)
@given(
    k=st.integers(1, 700),
    n=st.integers(1, 700),
    c=st.floats(1, 12),
    group=st.one_of(st.none(), st.integers(1, 800)),
    hashes=st.integers(1, 5),
)
def test_create_keeps_the_budget_and_covers_every_feature(k, n, c, group, hashes):
    size, blocks = group_size_for(k, group), -(-n // (-(-n // hashes)))
    if rank_for(k, n, c, size, blocks) == 0:
        with pytest.raises(StructureError, match="no slot"):
            LearnedStructure.create(k, n, c, group_size=group, num_hashes=hashes)
        return
    s = LearnedStructure.create(k, n, c, group_size=group, num_hashes=hashes)
    assert s.num_parameters <= k * n / c * (1 + 1e-9)
    assert s.reduction >= c * (1 - 1e-9)
    assert s.padded_features - s.group_size < k <= s.padded_features
    assert 1 <= s.rank <= s.group_size <= k
    assert (s.num_hashes - 1) * s.block_n < n <= s.num_hashes * s.block_n
    assert s.num_parameters == n * s.reduced_features + math.prod(s.sketch_shape)


def test_the_rank_is_that_of_the_formula():
    # r = gsize·N / (c·(N + J·gsize)), then a multiple of 8, 4, 2 or 1 within 4 % of it
    assert rank_for(384, 384, 2, 128) == 48
    assert rank_for(4096, 14336, 4, 128) == 30  # 31.7: 28 would leave 12 % unused
    assert rank_for(4096, 14336, 8, 128) == 15  # 15.9: 14 would leave 12 % unused
    assert rank_for(4096, 14336, 2, 128, 2) == 62  # 62.9
    assert rank_for(384, 1536, 2, 192) == 84  # 85.3, and K_c = 168
    assert rank_for(8, 8, 1, 8) == 4
    assert rank_for(64, 64, 100, 8) == 0


def test_the_slots_are_whole_vectors_unless_that_wastes_a_quarter():
    assert rank_for(1280, 5120, 4, 128) == 28  # 31.2: 30 is within 4 %, and 10 groups make 300
    assert rank_for(768, 768, 4, 128) == 24  # 27.4: 27 would make 162
    assert rank_for(384, 1536, 4, 128) == 24  # 29.5
    assert rank_for(45, 30, 2, 15) == 5  # of 8 none fits
    assert rank_for(40, 16, 4, 40) == 2  # 2.9


@settings(deadline=None, max_examples=100)
@given(k=st.integers(8, 3000), n=st.integers(8, 3000), c=st.floats(1, 8), size=st.integers(8, 400))
def test_unaligned_slots_have_a_reason(k, n, c, size):
    size = min(size, k)
    groups = -(-k // size)
    rank = rank_for(k, n, c, size)
    exact = k * n / c / (groups * (n + size))
    assert rank <= exact * (1 + 1e-9)
    if groups * rank % 8:
        step = 8 // math.gcd(groups, 8)
        assert rank // step * step < 0.75 * min(exact, size)


def test_default_groups_are_equal_and_near_128():
    assert [group_size_for(k) for k in (384, 1536, 4096, 768, 192)] == [128, 128, 128, 128, 96]
    assert group_size_for(37) == 37
    assert group_size_for(1000) == 128
    assert group_size_for(100, 500) == 100


@settings(deadline=None, max_examples=40)
@given(
    k=st.integers(1, 60),
    n=st.integers(1, 40),
    group=st.integers(1, 60),
    rank=st.integers(1, 60),
    hashes=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_materialize_agrees_with_the_reference(k, n, group, rank, hashes, seed):
    group, hashes = min(group, k), min(hashes, n)
    hashes = -(-n // (-(-n // hashes)))
    s = LearnedStructure(k, n, group, min(rank, group), hashes)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, s.reduced_features, generator=generator, dtype=torch.float64)
    sketch = torch.randn(s.sketch_shape, generator=generator, dtype=torch.float64)
    w = s.materialize(z, sketch)
    torch.testing.assert_close(w, reference.materialize(sketch, z, k))
    assert w.is_contiguous()
    assert structure_of(k, n, None, sketch) == s
    x = torch.randn(3, k, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(torch.ops.ss1.linear(x, sketch, z), x @ w.T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 0}, "in_features must be"),
        ({"rank": True}, "rank must be"),
        ({"rank": 9}, "rank = 9 exceeds"),
        ({"group_size": 65}, "group_size = 65 exceeds"),
        ({"num_hashes": 33}, "num_hashes = 33"),
        ({"out_features": 1.5}, "out_features must be"),
    ],
)
def test_bad_sizes_are_named(change, message):
    sizes = {"in_features": 64, "out_features": 32, "group_size": 8, "rank": 4, "num_hashes": 1}
    with pytest.raises(StructureError, match=message):
        LearnedStructure(**(sizes | change))


@pytest.mark.parametrize("reduction", [0.5, float("nan"), float("inf"), True, "2"])
def test_bad_reductions_are_named(reduction):
    with pytest.raises(StructureError, match="reduction"):
        LearnedStructure.create(64, 64, reduction)


def test_a_sketch_that_does_not_fit_is_refused():
    s = LearnedStructure(64, 32, 16, 4)
    z = torch.zeros(32, 16)
    for sketch in (None, torch.zeros(1, 4, 16, 5), torch.zeros(1, 4, 16, 4, dtype=torch.int32)):
        with pytest.raises(StructureError, match="sketch"):
            s.materialize(z, sketch)
    with pytest.raises(StructureError, match="z must be"):
        s.materialize(z[:, 1:], torch.zeros(s.sketch_shape))
    with pytest.raises(StructureError, match="need 4"):
        LearnedStructure.from_sketch(64, 32, torch.zeros(1, 5, 16, 4))
    with pytest.raises(StructureError, match="block_k"):
        structure_of(64, 32, None, torch.zeros(1, 4, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    "structure", [LearnedStructure(100, 30, 32, 7, 2), SS1Structure.create(100, 30, 3)]
)
def test_dictionaries_round_trip_and_are_validated(structure):
    values = structure.to_dict()
    assert structure_from_dict(values) == structure
    assert hash(structure_from_dict(values)) == hash(structure)
    with pytest.raises(StructureError, match="fields"):
        structure_from_dict(values | {"more": 1})
    with pytest.raises(StructureError, match="kind"):
        structure_from_dict(values | {"kind": "other"})
    with pytest.raises(StructureError, match="in_features"):
        structure_from_dict(values | {"in_features": "3"})
