"""``LearnedStructure``: the sizes of a sketch whose blocks are fitted to the weight.

SS1's rotation sketch is a block-diagonal matrix of entries 0 and ±1; here the blocks are free. They
are parameters, so the structure holds sizes only, and the blocks travel with ``z``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.errors import StructureError
from ss1_compile.kernels import layout
from ss1_compile.structure import SS1Structure

DEFAULT_GROUP_SIZE = 128
_RANK_UNITS = {8: 0.04, 4: 0.04, 2: 0.06, 1: 1.0}
"""What r may be a multiple of, best first: the part of it that may be left unused for that."""
_ALIGNED = 8  # 16 bytes of a 16-bit type
_MAX_UNALIGNED = 0.25


def group_size_for(in_features: int, group_size: int | None = None) -> int:
    """The group size to use for K: as wished, at most K, and in equal groups.

    ``None`` means about 128. The number of groups is what the wish asks for; the size is then the
    smallest multiple of 8 that so many groups need, which leaves the least padding.
    """
    wished = min(DEFAULT_GROUP_SIZE if group_size is None else group_size, in_features)
    if group_size is not None:
        return wished
    groups = max(1, round(in_features / wished))
    size = -(-in_features // groups)
    return min(in_features, -(-size // 8) * 8)


def rank_for(
    in_features: int, out_features: int, reduction: float, group_size: int, num_hashes: int = 1
) -> int:
    """The largest rank r that keeps z and the blocks within ``K·N/c`` parameters.

    That is ``r = K·N / (c·G·(N + J·gsize))``, or ``gsize·N / (c·(N + J·gsize))`` where the groups
    divide K; then rounded down to a multiple of 8, 4, 2 or 1, the first that leaves at most 4, 4 or
    6 % of it unused: kernels load and store whole vectors of the widest (8192 x 4096, groups of
    128, on one H200: r = 31 takes 37 µs, 30 takes 28). ``K_c = G·r`` is a multiple
    of 8, so that the rows of X̃ and z are whole vectors too, unless that leaves more than a quarter
    unused: with others the library's products ran at half their speed and less.

    Returns:
        r, at most ``group_size``; 0 where the budget allows none.
    """
    groups = -(-in_features // group_size)
    budget = in_features * out_features / reduction
    exact = budget / (groups * (out_features + num_hashes * group_size))
    whole = min(group_size, math.floor(exact * (1 + 1e-12)))
    most = min(exact, group_size)
    fitting = [
        rank
        for unit, unused in _RANK_UNITS.items()
        if (rank := whole // unit * unit) >= (1 - unused) * most
    ]
    aligned = [rank for rank in fitting if groups * rank % _ALIGNED == 0]
    step = _ALIGNED // math.gcd(groups, _ALIGNED)
    if not aligned and whole // step * step >= (1 - _MAX_UNALIGNED) * most:
        return whole // step * step
    return next(iter([*aligned, *fitting]), whole)


@dataclass(frozen=True)
class LearnedStructure:
    """The learned block sketch of one layer: supergroup g maps ``gsize`` features to r slots.

    With the blocks ``S [J, G, gsize, r]`` and ``z [N, G·r]``, for the rows n of column block j:
    ``W[n, g·gsize + t] = Σ_i S[j, g, t, i] · z[n, g·r + i]``.

    Attributes:
        in_features: K, at least 1. Zero-padded to ``padded_features`` where it does not divide.
        out_features: N, at least 1.
        group_size: ``gsize``, input features per supergroup, 1 … K.
        rank: r, slots per supergroup, 1 … ``gsize``.
        num_hashes: J, the column blocks that have blocks of their own.

    Raises:
        StructureError: a field is not an integer, out of range, or does not fit the others.
    """

    in_features: int
    out_features: int
    group_size: int
    rank: int
    num_hashes: int = 1

    kind: ClassVar[Literal["learned"]] = "learned"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise StructureError(
                    f"{field.name} must be an integer of at least 1, got {value!r}"
                )
        if self.group_size > self.in_features:
            raise StructureError(
                f"group_size = {self.group_size} exceeds in_features = {self.in_features}"
            )
        if self.rank > self.group_size:
            raise StructureError(f"rank = {self.rank} exceeds group_size = {self.group_size}")
        if (self.num_hashes - 1) * self.block_n >= self.out_features:
            raise StructureError(
                f"num_hashes = {self.num_hashes} does not cut {self.out_features} columns into "
                f"that many non-empty blocks of equal width"
            )

    @classmethod
    def create(
        cls,
        in_features: int,
        out_features: int,
        reduction: float = 4,
        *,
        group_size: int | None = None,
        num_hashes: int | None = None,
    ) -> LearnedStructure:
        """The structure that keeps a layer at ``K·N/c`` parameters, the blocks counted.

        Args:
            in_features: K.
            out_features: N.
            reduction: c, any number of at least 1.
            group_size: ``gsize``; ``None`` means about 128, lowered to K where that is smaller.
            num_hashes: J; ``None`` means 1. Lowered where N is too small for J non-empty blocks.

        Raises:
            StructureError: an argument is out of range, or the budget allows no slot at all.
        """
        wished = 1 if num_hashes is None else num_hashes
        sizes = {"in_features": in_features, "out_features": out_features, "num_hashes": wished}
        if group_size is not None:
            sizes["group_size"] = group_size
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise StructureError(f"{name} must be an integer of at least 1, got {value!r}")
        if isinstance(reduction, bool) or not isinstance(reduction, int | float):
            raise StructureError(f"reduction must be a number, got {reduction!r}")
        if not 1 <= reduction < math.inf:
            raise StructureError(f"reduction must be finite and at least 1, got {reduction!r}")
        size = group_size_for(in_features, group_size)
        hashes = -(-out_features // layout.block_n(out_features, wished))
        rank = rank_for(in_features, out_features, reduction, size, hashes)
        if rank < 1:
            raise StructureError(
                f"reduction = {reduction} leaves {out_features} × {in_features} features no slot "
                f"in groups of {size}; choose a smaller reduction or a larger group_size"
            )
        return cls(in_features, out_features, size, rank, hashes)

    @classmethod
    def from_sketch(cls, in_features: int, out_features: int, sketch: Tensor) -> LearnedStructure:
        """The structure of blocks ``S [J, G, gsize, r]``.

        Raises:
            StructureError: not floating, or of a shape that does not fit K and N.
        """
        if not sketch.is_floating_point() or sketch.dim() != 4:
            raise StructureError(
                f"a learned sketch must be floating [J, G, gsize, r], got {sketch.dtype} "
                f"{list(sketch.shape)}"
            )
        hashes, groups, size, rank = sketch.shape
        structure = cls(in_features, out_features, size, rank, hashes)
        if groups != structure.num_supergroups:
            raise StructureError(
                f"the sketch has {groups} groups; {in_features} features in groups of {size} "
                f"need {structure.num_supergroups}"
            )
        return structure

    @property
    def block_n(self) -> int:
        """Rows of W per column block (the last block may be shorter)."""
        return layout.block_n(self.out_features, self.num_hashes)

    @property
    def num_supergroups(self) -> int:
        """G = ceil(K / gsize)."""
        return -(-self.in_features // self.group_size)

    @property
    def reduced_features(self) -> int:
        """K_c = G·r, the columns of z."""
        return self.num_supergroups * self.rank

    @property
    def padded_features(self) -> int:
        """K rounded up to G·gsize."""
        return self.num_supergroups * self.group_size

    @property
    def sketch_shape(self) -> tuple[int, ...]:
        """``(J, G, gsize, r)``, the shape of the operator's *sketch* operand."""
        return (self.num_hashes, self.num_supergroups, self.group_size, self.rank)

    @property
    def num_parameters(self) -> int:
        """Numbers stored: those of z and of the blocks."""
        return self.out_features * self.reduced_features + math.prod(self.sketch_shape)

    @property
    def reduction(self) -> float:
        """c, the dense parameters over those stored; not less than what was asked for."""
        return self.in_features * self.out_features / self.num_parameters

    def check_sketch(self, sketch: Tensor | None) -> None:
        """Raise ``StructureError`` unless ``sketch`` has the shape of this structure's blocks."""
        if sketch is None:
            raise StructureError(f"a learned sketch is needed, of shape {list(self.sketch_shape)}")
        if not sketch.is_floating_point() or tuple(sketch.shape) != self.sketch_shape:
            raise StructureError(
                f"the sketch must be floating {list(self.sketch_shape)}, got {sketch.dtype} "
                f"{list(sketch.shape)}"
            )

    def materialize(self, z: Tensor, sketch: Tensor | None = None) -> Tensor:
        """The dense weight ``W [N, K]`` of ``z [N, K_c]`` and the blocks, in z's dtype and device.

        Raises:
            StructureError: z or the blocks have another shape, or the blocks are missing.
        """
        self.check_sketch(sketch)
        assert sketch is not None
        shape = (self.out_features, self.reduced_features)
        if tuple(z.shape) != shape:
            raise StructureError(f"z must be {list(shape)}, got {list(z.shape)}")
        blocks = sketch.to(z.device, z.dtype)
        parts = [
            torch.einsum("ngr,gkr->ngk", rows.unflatten(1, (-1, self.rank)), blocks[j])
            for j, rows in enumerate(z.split(self.block_n))
        ]
        return torch.cat(parts).flatten(1)[:, : self.in_features].contiguous()

    def to_dict(self) -> dict[str, Any]:
        """The structure as plain JSON values; :meth:`from_dict` validates and inverts it."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LearnedStructure:
        """Invert :meth:`to_dict`.

        Raises:
            StructureError: a field is missing, unknown, of the wrong type or out of range.
        """
        expected = {"kind", *(field.name for field in fields(cls))}
        if not isinstance(values, Mapping) or set(values) != expected:
            raise StructureError(f"a learned structure has exactly the fields {sorted(expected)}")
        if values["kind"] != cls.kind:
            raise StructureError(f"kind must be {cls.kind!r}, got {values['kind']!r}")
        return cls(**{name: value for name, value in values.items() if name != "kind"})


Structure = SS1Structure | LearnedStructure
"""Either kind. Both have ``kind``, ``in_features``, ``out_features``, ``num_hashes``, ``block_n``,
``num_supergroups``, ``group_size``, ``reduced_features``, ``padded_features``, ``reduction``,
``num_parameters``, ``sketch_shape``, ``check_sketch``, ``materialize`` and ``to_dict``."""


def structure_from_dict(values: Mapping[str, Any]) -> Structure:
    """Invert ``to_dict`` of either kind of structure.

    Raises:
        StructureError: not such a mapping; the message names the field.
    """
    if isinstance(values, Mapping) and values.get("kind") == LearnedStructure.kind:
        return LearnedStructure.from_dict(values)
    return SS1Structure.from_dict(values)


def structure_of(
    in_features: int, out_features: int, block_k: int | None, sketch: Tensor
) -> Structure:
    """The structure that a layer's tensors say it has, validated.

    Args:
        in_features: K.
        out_features: N.
        block_k: B_K of a rotation sketch; not used for a learned one.
        sketch: int32 ``[J, G, c]`` or floating ``[J, G, gsize, r]``.

    Raises:
        StructureError: they do not fit each other.
    """
    if sketch.is_floating_point():
        return LearnedStructure.from_sketch(in_features, out_features, sketch)
    if block_k is None:
        raise StructureError("a rotation sketch needs block_k")
    return SS1Structure.from_code(in_features, out_features, block_k, sketch)
