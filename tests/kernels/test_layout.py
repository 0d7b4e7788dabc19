import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.kernels import layout, reference
from ss1_compile.structure import SS1Structure


@st.composite
def structures(draw):
    reduction = draw(st.integers(1, 6))
    block_k = draw(st.sampled_from([8, 16]))
    in_features = draw(st.integers(reduction, 3 * reduction * block_k))
    hashes = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 100))
    return SS1Structure.create(
        in_features, 12, reduction, num_hashes=hashes, block_k=block_k, seed=seed
    )


@settings(deadline=None, max_examples=30)
@given(structures())
def test_unpack_inverts_pack(structure):
    rotations, signs = layout.unpack(layout.pack(structure.rotations, structure.signs))
    assert torch.equal(rotations, structure.rotations)
    assert torch.equal(signs, structure.signs)


def test_rotation_zero_keeps_its_sign():
    rotations = torch.zeros(1, 1, 2, dtype=torch.int32)
    signs = torch.tensor([[[1, -1]]], dtype=torch.int8)
    assert layout.pack(rotations, signs).tolist() == [[[0, -1]]]
    assert torch.equal(layout.unpack(layout.pack(rotations, signs))[1], signs)


@settings(deadline=None, max_examples=30)
@given(structures())
def test_columns_and_slots_are_the_reference(structure):
    """Both index tables rebuild the dense weight that the definition gives."""
    code, reduced = structure.code, structure.reduced_features
    z = torch.randn(structure.out_features, reduced, dtype=torch.float64)
    expected = reference.materialize(code, z, structure.in_features)
    columns, column_signs = layout.source_columns(code, reduced)
    slots, slot_signs = layout.target_slots(code, reduced, structure.in_features)
    for j, rows in enumerate(torch.arange(structure.out_features).split(structure.block_n)):
        by_slot = z[rows][:, slots[j]] * slot_signs[j]
        padded = torch.zeros(len(rows), structure.padded_features, dtype=torch.float64)
        for part in range(structure.reduction):
            padded[:, columns[j, part]] = z[rows] * column_signs[j, part]
        assert torch.equal(by_slot, expected[rows])
        assert torch.equal(padded[:, : structure.in_features], expected[rows])


def test_kinds_and_group_size():
    rotation = torch.zeros(2, 3, 4, dtype=torch.int32)
    learned = torch.zeros(2, 3, 40, 8)
    assert layout.is_rotation(rotation)
    assert not layout.is_rotation(learned)
    assert layout.group_size(rotation, 3 * 16) == 4 * 16
    assert layout.group_size(learned, 3 * 8) == 40


def test_last_block_may_be_narrower():
    assert layout.block_n(12, 4) == 3
    assert layout.block_n(13, 4) == 4
