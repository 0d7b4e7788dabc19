from __future__ import annotations

import copy
import hashlib
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.errors import StructureError
from ss1_compile.kernels import reference
from ss1_compile.structure import BLOCK_K_CHOICES, SS1Structure, default_block_k


@st.composite
def structures(draw: st.DrawFn) -> SS1Structure:
    in_features = draw(st.integers(1, 200))
    return SS1Structure.create(
        in_features,
        draw(st.integers(1, 40)),
        draw(st.integers(1, min(in_features, 9))),
        num_hashes=draw(st.none() | st.integers(1, 12)),
        block_k=draw(st.none() | st.sampled_from([8, 16, 32, 64])),
        hash_family=draw(st.sampled_from(["independent", "affine"])),
        signed=draw(st.booleans()),
        seed=draw(st.integers(-5, 2**40)),
    )


def random_z(structure: SS1Structure, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (structure.out_features, structure.reduced_features)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@given(structures(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_materialize_and_sketch_agree_with_the_definition(structure, seed):
    z = random_z(structure, seed)
    w = structure.materialize(z)
    assert torch.equal(w, reference.materialize(structure.code, z, structure.in_features))
    x = torch.randn(2, 3, structure.in_features, dtype=torch.float64)
    sketched = structure.sketch(x)
    assert sketched.shape == (structure.num_hashes, 2, 3, structure.reduced_features)
    blocks = zip(sketched, z.split(structure.block_n), strict=True)
    y = torch.cat([s @ rows.T for s, rows in blocks], dim=-1)
    torch.testing.assert_close(y, x @ w.T, rtol=1e-12, atol=1e-12)


@given(structures())
@settings(max_examples=60, deadline=None)
def test_sizes_and_tables_are_consistent(structure):
    s = structure
    assert s.padded_features == s.reduction * s.reduced_features
    assert s.in_features <= s.padded_features < s.in_features + s.reduction * s.block_k
    assert s.rotations.shape == (s.num_hashes, s.num_supergroups, s.reduction)
    assert (s.rotations % 8 == 0).all()
    assert ((s.rotations >= 0) & (s.rotations < s.block_k)).all()
    assert (s.num_hashes - 1) * s.block_n < s.out_features <= s.num_hashes * s.block_n
    again = SS1Structure.from_dict(s.to_dict())
    assert again == s
    assert hash(again) == hash(s)
    assert SS1Structure.from_code(s.in_features, s.out_features, s.block_k, s.code) == s


@given(st.integers(1, 20_000), st.integers(1, 40))
@settings(deadline=None)
def test_default_block_k_pads_little(in_features, reduction):
    block_k = default_block_k(in_features, reduction)
    padding = {b: -in_features % (reduction * b) / in_features for b in BLOCK_K_CHOICES}
    if min(padding.values()) < 0.03:
        assert padding[block_k] < 0.03
        assert all(padding[b] >= 0.03 for b in BLOCK_K_CHOICES if b > block_k)
    else:
        assert padding[block_k] == min(padding.values())


@pytest.mark.parametrize("family", ["independent", "affine"])
@pytest.mark.parametrize("features", [64, 72, 128])
def test_reduction_one_is_a_signed_permutation(family, features):
    structure = SS1Structure.create(features, 10, 1, hash_family=family, num_hashes=3)
    assert structure.reduced_features == features
    z = torch.randn(10, features, dtype=torch.float64)
    w = structure.materialize(z)
    assert torch.equal(w.abs().sort(dim=1).values, z.abs().sort(dim=1).values)
    eye = torch.eye(features, dtype=torch.float64)
    for permutation in structure.sketch(eye):
        assert torch.equal(permutation @ permutation.T, eye)
        assert (permutation.abs().sum(0) == 1).all()


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_rank_of_each_family(reduction):
    def rank(family: str) -> int:
        s = SS1Structure.create(128, 128, reduction, hash_family=family, block_k=8, num_hashes=16)
        return int(torch.linalg.matrix_rank(s.materialize(random_z(s, reduction))))

    assert rank("independent") == 128
    assert rank("affine") <= 128 // reduction


def digest(structure: SS1Structure) -> str:
    return hashlib.sha256(structure.code.numpy().astype("<i4").tobytes()).hexdigest()[:16]


GOLDEN = {
    (768, 768, 4, 0, "independent"): "6326b1ebc7450670",
    (100, 30, 3, 7, "independent"): "efdc78747ce64024",
    (3072, 768, 8, -12345, "independent"): "518de81f37ac096a",
    (768, 768, 4, 0, "affine"): "fc293038a34f7402",
}


@pytest.mark.parametrize(("arguments", "expected"), GOLDEN.items())
def test_structures_are_the_same_for_ever(arguments, expected):
    k, n, c, seed, family = arguments
    assert digest(SS1Structure.create(k, n, c, seed=seed, hash_family=family)) == expected


def test_affine_structure_follows_the_authors_formula():
    r0, r1, r2, r3 = 45007, 10**12 + 39, 97, 5
    s = SS1Structure.create(
        256, 64, 2, hash_family="affine", block_k=32, affine_coefficients=(r0, r1, r2, r3)
    )
    for j in range(s.num_hashes):
        for g in range(s.num_supergroups):
            for part in range(2):
                expected = -((r3 + r2 * j + r1 * (g + 1) + r0 * (part + 1)) * 8) % 32
                assert s.rotations[j, g, part] == expected
    assert (s.signs == 1).all()


@pytest.mark.parametrize("family", ["independent", "affine"])
def test_independent_of_global_state_and_leaves_it_alone(family):
    expected = SS1Structure.create(96, 48, 3, hash_family=family)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        made = SS1Structure.create(96, 48, 3, hash_family=family)
        parsed = SS1Structure.from_dict(expected.to_dict())
        w = made.materialize(torch.ones(48, made.reduced_features, device="cpu"))
        sketched = made.sketch(torch.ones(2, 96, device="cpu"))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert made == parsed == expected
    assert made.code.device.type == w.device.type == sketched.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_and_signs_matter():
    base = SS1Structure.create(256, 64, 4)
    assert SS1Structure.create(256, 64, 4, seed=1) != base
    unsigned = SS1Structure.create(256, 64, 4, signed=False)
    assert (unsigned.signs == 1).all()
    assert torch.equal(unsigned.rotations, base.rotations)
    assert set(base.signs.flatten().tolist()) == {1, -1}


def test_hashes_are_uniform():
    s = SS1Structure.create(64 * 1024, 64, 4, block_k=64, num_hashes=8)
    count = s.rotations.numel()
    expected = count / 8
    frequencies = torch.bincount((s.rotations // 8).flatten().long(), minlength=8)
    assert ((frequencies - expected).square() / expected).sum() < 24.3  # χ², 7 df, p = 0.001
    assert abs(int(s.signs.long().sum())) < 3.3 * count**0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features must be an integer of at least 1, got 0"),
        ({"in_features": 64.0}, "in_features must be an integer"),
        ({"out_features": -3}, "out_features must be .* got -3"),
        ({"out_features": True}, "out_features must be an integer"),
        ({"reduction": 0}, "reduction must be .* got 0"),
        ({"reduction": 1.5}, "reduction must be an integer"),
        ({"reduction": 65}, "reduction = 65 exceeds in_features = 64"),
        ({"block_k": 4}, "block_k must be a power of two in 8"),
        ({"block_k": 48}, "block_k .* got 48"),
        ({"block_k": 2048}, "block_k .* got 2048"),
        ({"num_hashes": 0}, "num_hashes must be .* got 0"),
        ({"num_hashes": True}, "num_hashes must be an integer"),
        ({"num_hashes": "2"}, "num_hashes must be an integer"),
        ({"hash_family": "md5"}, "hash_family must be one of .* got 'md5'"),
        ({"seed": "one"}, "seed must be an integer"),
        ({"seed": 2**65}, "seed must be an integer of at most 64 bits"),
        ({"affine_coefficients": (1, 2, 3, 4)}, "affine_coefficients need hash_family='affine'"),
        (
            {"hash_family": "affine", "affine_coefficients": (1, 2, 3)},
            "affine_coefficients must be four integers",
        ),
        (
            {"hash_family": "affine", "affine_coefficients": (1, 2, 3, 0.5)},
            "affine_coefficients must be four integers",
        ),
    ],
)
def test_create_names_the_bad_argument(arguments: dict[str, Any], message):
    values = {"in_features": 64, "out_features": 32, "reduction": 2, **arguments}
    with pytest.raises(StructureError, match=message):
        SS1Structure.create(**values)


def tables(shape: tuple[int, ...] = (2, 1, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(shape, dtype=torch.int32), torch.ones(shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, s: (h.long(), s), "rotations must be a CPU tensor of torch.int32"),
        (lambda h, s: (h.tolist(), s), "rotations must be a CPU tensor"),
        (lambda h, s: (h.to("meta"), s), "rotations must be a CPU tensor"),
        (lambda h, s: (h, s.float()), "signs must be a CPU tensor of torch.int8"),
        (lambda h, s: (h[0], s), r"rotations has shape \[1, 4\]"),
        (lambda h, s: (h, s[:, :, :3]), r"signs has shape \[2, 1, 3\].*need \[J, 1, 4\]"),
        (lambda h, s: (h, s[:1]), r"rotations \[2, 1, 4\] and signs \[1, 1, 4\] differ"),
        (lambda h, s: (h[:0], s[:0]), "num_hashes = 0 does not cut 32 columns"),
        (lambda h, s: (h + 4, s), "rotation 4 is not a multiple of 8"),
        (lambda h, s: (h + 16, s), r"rotation 16 is not .* in \[0, 16\)"),
        (lambda h, s: (h - 8, s), "rotation -8 is not"),
        (lambda h, s: (h, s * 0), "signs must be"),
        (lambda h, s: (h, s * 2), "signs must be"),
        (lambda h, s: (h, s * -128), "signs must be"),
    ],
)
def test_constructor_validates_the_tables(change, message):
    SS1Structure(64, 32, 4, 16, *tables())
    with pytest.raises(StructureError, match=message):
        SS1Structure(64, 32, 4, 16, *change(*tables()))


def test_blocks_of_columns_may_not_be_empty():
    with pytest.raises(StructureError, match="num_hashes = 4 does not cut 5 columns"):
        SS1Structure(64, 5, 4, 16, *tables((4, 1, 4)))  # blocks of 2: 2, 2, 1, 0
    assert SS1Structure.create(64, 5, 4, num_hashes=4).num_hashes == 3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (torch.zeros(2, 1, 4, dtype=torch.int64), "must be int32"),
        (torch.zeros(2, 4, dtype=torch.int32), r"\[J, G, c\], got torch.int32 \[2, 4\]"),
        (torch.zeros(2, 1, 4, dtype=torch.int32, device="meta"), "on meta"),
        (torch.full((2, 1, 4), 2**31 - 1, dtype=torch.int32), "rotation 2147483647"),
        (torch.full((2, 1, 4), -(2**31), dtype=torch.int32), "rotation 2147483647"),
        (torch.full((2, 1, 4), -8, dtype=torch.int32), "rotation 7 "),
        (torch.zeros(2, 3, 4, dtype=torch.int32), "shape"),
        (torch.zeros(2, 1, 0, dtype=torch.int32), "reduction must be .* got 0"),
    ],
)
def test_from_code_validates(code, message):
    with pytest.raises(StructureError, match=message):
        SS1Structure.from_code(64, 32, 16, code)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "learned"},
        {"kind": ["rotation"]},
        {"in_features": 63.5},
        {"in_features": 128},
        {"out_features": None},
        {"out_features": 1},
        {"reduction": 2},
        {"reduction": 10**30},
        {"block_k": 12},
        {"block_k": "16"},
        {"code": None},
        {"code": "ffff"},
        {"code": []},
        {"code": [[[0, 0, 0, 0]], [[0, 0, 0]]]},
        {"code": [[[0, 0, 0, 0]], [[0, 0, 0, 1]]]},
        {"code": [[[0, 0, 0, 0]], [[0, 0, 0, 2**32 + 8]]]},
        {"code": [[[0, 0, 0, 0]], [[0, 0, 0, 10**40]]]},
        {"code": [[[0, 0, 0, 0]], [[0, 0, 0, 8.5]]]},
        {"code": [[[False] * 4], [[False] * 4]]},
        {"code": [[[0, 0, 0, 0]], [[0, 0, 0, float("nan")]]]},
        {"extra": 1},
    ],
)
def test_from_dict_refuses_tampered_values(change):
    values = SS1Structure(64, 32, 4, 16, *tables()).to_dict()
    with pytest.raises(StructureError):
        SS1Structure.from_dict({**values, **change})


def test_from_dict_refuses_missing_fields_and_other_types():
    values = SS1Structure.create(64, 32, 4).to_dict()
    for key in values:
        with pytest.raises(StructureError, match="exactly the fields"):
            SS1Structure.from_dict({k: v for k, v in values.items() if k != key})
    with pytest.raises(StructureError):
        SS1Structure.from_dict([])  # type: ignore[arg-type]


def test_wrong_operand_shapes_are_named():
    s = SS1Structure.create(64, 32, 4)
    with pytest.raises(StructureError, match=r"z must be \[32, 16\], got \[31, 16\]"):
        s.materialize(torch.zeros(31, 16))
    with pytest.raises(StructureError, match=r"x must be \[\.\.\., 64\], got \[2, 63\]"):
        s.sketch(torch.zeros(2, 63))
    with pytest.raises(StructureError, match="x must be"):
        s.sketch(torch.zeros(()))


def test_equality_hash_copy_and_pickle():
    s = SS1Structure.create(100, 30, 3, seed=5)
    for other in (copy.deepcopy(s), pickle.loads(pickle.dumps(s)), copy.copy(s)):
        assert other == s
        assert hash(other) == hash(s)
    assert s != SS1Structure.create(100, 29, 3, seed=5)
    assert s != "a structure"
    assert len({s, copy.deepcopy(s), SS1Structure.create(100, 30, 3, seed=6)}) == 2
    with pytest.raises(FrozenInstanceError):
        s.block_k = 8  # type: ignore[misc]
    assert "block_k=" in repr(s)
    assert "tensor" not in repr(s)


def test_sketch_is_differentiable_and_keeps_dtype():
    s = SS1Structure.create(40, 12, 3, block_k=8)
    x = torch.randn(4, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(s.sketch, (x,))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert s.sketch(x.detach().to(dtype)).dtype == dtype
        assert s.materialize(torch.zeros(12, 16, dtype=dtype)).dtype == dtype
