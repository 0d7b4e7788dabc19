"""``SS1Structure``: which entries of a weight share which parameter.

The structure belongs to the weights: it is saved with them and never depends on a kernel's tiles,
the device, the torch version or the global random number generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ss1_compile.errors import StructureError
from ss1_compile.kernels import layout

HashFamily = Literal["independent", "affine"]
HASH_FAMILIES: tuple[HashFamily, ...] = ("independent", "affine")
BLOCK_K_CHOICES = (128, 64, 32, 16, 8)
_MAX_BLOCK_K = 1024
_MAX_PADDING = 0.03


def default_block_k(in_features: int, reduction: int) -> int:
    """The largest of 128 … 8 that keeps the zero-padding of K under 3 %, else the least padding."""

    def padding(block_k: int) -> float:
        group = reduction * block_k
        return (-in_features % group) / in_features

    fitting = [b for b in BLOCK_K_CHOICES if padding(b) < _MAX_PADDING]
    return fitting[0] if fitting else min(BLOCK_K_CHOICES, key=padding)


@dataclass(frozen=True, eq=False)
class SS1Structure:
    """The rotation sketch of one layer (SS1, NeurIPS 2024, section 3).

    For the rows n of column block j (``block_n`` rows each):
    ``W[n, (g·c+l)·B_K + t] = s[j,g,l] · z[n, g·B_K + (t + h[j,g,l]) mod B_K]``.

    Attributes:
        in_features: K, at least 1. Zero-padded to ``padded_features`` where it does not divide.
        out_features: N, at least 1.
        reduction: c, any integer in 1 … K.
        block_k: B_K, a power of two in 8 … 1024.
        rotations: ``h``, int32 ``[J, G, c]``, multiples of 8 in ``[0, B_K)``, on the CPU.
        signs: ``s``, int8 ``[J, G, c]``, each +1 or -1, on the CPU.

    Raises:
        StructureError: a field is of the wrong type, out of range, or does not fit the others.
    """

    in_features: int
    out_features: int
    reduction: int
    block_k: int
    rotations: Tensor = field(repr=False)
    signs: Tensor = field(repr=False)

    kind: ClassVar[Literal["rotation"]] = "rotation"

    def __post_init__(self) -> None:
        _check_sizes(self.in_features, self.out_features, self.reduction, self.block_k)
        tables = (("rotations", self.rotations, torch.int32), ("signs", self.signs, torch.int8))
        for name, table, dtype in tables:
            if not isinstance(table, Tensor) or table.dtype != dtype or table.device.type != "cpu":
                raise StructureError(f"{name} must be a CPU tensor of {dtype}, got {table!r}")
            if table.dim() != 3 or table.shape[1:] != (self.num_supergroups, self.reduction):
                raise StructureError(
                    f"{name} has shape {list(table.shape)}; K = {self.in_features}, "
                    f"c = {self.reduction}, block_k = {self.block_k} need "
                    f"[J, {self.num_supergroups}, {self.reduction}]"
                )
        if self.rotations.shape != self.signs.shape:
            raise StructureError(
                f"rotations {list(self.rotations.shape)} and signs {list(self.signs.shape)} differ"
            )
        if (self.num_hashes - 1) * self.block_n >= self.out_features or self.num_hashes < 1:
            raise StructureError(
                f"num_hashes = {self.num_hashes} does not cut {self.out_features} columns into "
                f"that many non-empty blocks of equal width"
            )
        bad = (self.rotations < 0) | (self.rotations >= self.block_k)
        bad |= self.rotations % layout.VECTOR_WIDTH != 0
        if bool(bad.any()):
            raise StructureError(
                f"rotation {int(self.rotations[bad][0])} is not a multiple of "
                f"{layout.VECTOR_WIDTH} in [0, {self.block_k})"
            )
        if not bool((self.signs.abs() == 1).all()):
            raise StructureError("signs must be +1 or -1")

    @classmethod
    def create(
        cls,
        in_features: int,
        out_features: int,
        reduction: int = 4,
        *,
        num_hashes: int | None = None,
        block_k: int | None = None,
        hash_family: HashFamily = "independent",
        signed: bool = True,
        seed: int = 0,
        affine_coefficients: tuple[int, int, int, int] | None = None,
    ) -> SS1Structure:
        """Draw a structure; the same arguments give the same structure everywhere and for ever.

        It depends on the sizes and the seed and not on the layer's name, so linears that read the
        same input with the same reduction share their hash, and one sketch can serve them all.

        Args:
            in_features: K.
            out_features: N.
            reduction: c, 1 … K.
            num_hashes: J; ``None`` means c. Lowered where N is too small for J non-empty blocks.
            block_k: B_K; ``None`` chooses by :func:`default_block_k`.
            hash_family: ``"independent"`` (uniform h and s) or ``"affine"`` (the authors' public
                kernel, ``h = -((R3 + R2·j + R1·(g+1) + R0·(l+1))·8) mod B_K``, no signs; every W
                of it has rank at most K/c).
            signed: draw signs; without effect on the affine family, which has none.
            seed: any integer of at most 64 bits.
            affine_coefficients: ``(R0, R1, R2, R3)`` of an existing checkpoint of the authors;
                ``None`` draws them from the seed.

        Raises:
            StructureError: an argument is out of range.
        """
        if hash_family not in HASH_FAMILIES:
            raise StructureError(f"hash_family must be one of {HASH_FAMILIES}, got {hash_family!r}")
        if affine_coefficients is not None and hash_family != "affine":
            raise StructureError("affine_coefficients need hash_family='affine'")
        if block_k is None:
            _check_sizes(in_features, out_features, reduction, BLOCK_K_CHOICES[0])
            block_k = default_block_k(in_features, reduction)
        _check_sizes(in_features, out_features, reduction, block_k)
        num_hashes = reduction if num_hashes is None else num_hashes
        if not isinstance(num_hashes, int) or isinstance(num_hashes, bool) or num_hashes < 1:
            raise StructureError(f"num_hashes must be an integer of at least 1, got {num_hashes!r}")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed.bit_length() > 64:
            raise StructureError(f"seed must be an integer of at most 64 bits, got {seed!r:.80}")
        num_hashes = -(-out_features // layout.block_n(out_features, num_hashes))
        shape = (num_hashes, -(-in_features // (reduction * block_k)), reduction)
        if hash_family == "affine":
            coefficients = affine_coefficients or tuple(_random_words(f"affine/{seed}", 4))
            if len(coefficients) != 4 or not all(isinstance(r, int) for r in coefficients):
                raise StructureError(
                    f"affine_coefficients must be four integers, got {affine_coefficients!r}"
                )
            r0, r1, r2, r3 = (r % block_k for r in coefficients)  # no overflow below
            axes = (torch.arange(n, device="cpu") for n in shape)
            j, g, l = torch.meshgrid(*axes, indexing="ij")  # noqa: E741
            rotations = -((r3 + r2 * j + r1 * (g + 1) + r0 * (l + 1)) * 8) % block_k
            signs = torch.ones(shape, dtype=torch.int8, device="cpu")
        else:
            key = f"independent/{seed}/{'x'.join(map(str, shape))}/{block_k}"
            count = shape[0] * shape[1] * shape[2]
            drawn = _random_words(key, count)
            words = torch.tensor(drawn, dtype=torch.int64, device="cpu").view(shape)
            rotations = (words >> 1) % (block_k // layout.VECTOR_WIDTH) * layout.VECTOR_WIDTH
            positive = (words & 1) == 0
            signs = 2 * positive.long() - 1 if signed else torch.ones_like(words)
        return cls(
            in_features,
            out_features,
            reduction,
            block_k,
            rotations.to(torch.int32),
            signs.to(torch.int8),
        )

    @classmethod
    def from_code(
        cls, in_features: int, out_features: int, block_k: int, code: Tensor
    ) -> SS1Structure:
        """Rebuild and validate a structure from the operator's int32 code ``[J, G, c]``."""
        if code.dtype != torch.int32 or code.dim() != 3:
            raise StructureError(
                f"the sketch code must be int32 [J, G, c], got {code.dtype} {list(code.shape)}"
            )
        if code.is_meta:
            raise StructureError("the sketch code is on meta and has no values; load them first")
        rotations, signs = layout.unpack(code.cpu())
        return cls(in_features, out_features, code.shape[2], block_k, rotations, signs)

    @property
    def num_hashes(self) -> int:
        """J, the number of column blocks."""
        return self.rotations.shape[0]

    @property
    def block_n(self) -> int:
        """B_N, the rows of W per column block (the last block may be shorter)."""
        return layout.block_n(self.out_features, max(1, self.num_hashes))

    @property
    def num_supergroups(self) -> int:
        """G = ceil(K / (c·B_K))."""
        return -(-self.in_features // (self.reduction * self.block_k))

    @property
    def reduced_features(self) -> int:
        """K_c = G·B_K, the columns of z."""
        return self.num_supergroups * self.block_k

    @property
    def padded_features(self) -> int:
        """K rounded up to G·c·B_K."""
        return self.num_supergroups * self.reduction * self.block_k

    @property
    def group_size(self) -> int:
        """``c·B_K``, input features per supergroup."""
        return self.reduction * self.block_k

    @property
    def sketch_shape(self) -> tuple[int, ...]:
        """``(J, G, c)``, the shape of the operator's *sketch* operand."""
        return tuple(self.rotations.shape)

    @property
    def num_parameters(self) -> int:
        """Numbers stored: those of z. Rotations and signs are none."""
        return self.out_features * self.reduced_features

    def check_sketch(self, sketch: Tensor | None) -> None:
        """Raise ``StructureError`` unless ``sketch`` is this structure's code (or is not given)."""
        if sketch is not None and not torch.equal(sketch.cpu(), self.code):
            raise StructureError("the sketch is not the code of this structure")

    @cached_property
    def code(self) -> Tensor:
        """The operator's *sketch* operand: int32 ``[J, G, c]`` (:mod:`ss1_compile.kernels`)."""
        return layout.pack(self.rotations, self.signs)

    def materialize(self, z: Tensor, sketch: Tensor | None = None) -> Tensor:
        """The dense weight ``W [N, K]`` that ``z [N, K_c]`` stands for, in z's dtype and device.

        ``sketch`` may be given as for a learned structure; it must be the structure's own code.
        """
        self._check_columns("z", z, self.reduced_features)
        self.check_sketch(sketch)
        slots, signs = layout.target_slots(
            self.code.to(z.device), self.reduced_features, self.in_features
        )
        return torch.cat(
            [
                block.index_select(1, slots[j]) * signs[j].to(z.dtype)
                for j, block in enumerate(z.split(self.block_n))
            ]
        )

    def sketch(self, x: Tensor) -> Tensor:
        """``X̃ [J, ..., K_c]`` of ``x [..., K]``, in x's dtype and device. Differentiable."""
        self._check_columns("x", x, self.in_features)
        flat = x.reshape(-1, self.in_features)
        code = self.code.to(x.device)
        out: Tensor = torch.ops.ss1.sketch(flat, code, self.reduced_features)
        return out.view(self.num_hashes, *x.shape[:-1], self.reduced_features)

    def to_dict(self) -> dict[str, Any]:
        """The structure as plain JSON values; :meth:`from_dict` validates and inverts it."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "reduction": self.reduction,
            "block_k": self.block_k,
            "code": self.code.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SS1Structure:
        """Invert :meth:`to_dict`.

        Raises:
            StructureError: a field is missing, unknown, of the wrong type or out of range.
        """
        expected = {"kind", "in_features", "out_features", "reduction", "block_k", "code"}
        if not isinstance(values, Mapping) or set(values) != expected:
            raise StructureError(f"a structure has exactly the fields {sorted(expected)}")
        if values["kind"] != "rotation":
            raise StructureError(f"unknown kind of sketch {values['kind']!r}")
        _check_sizes(*(values[k] for k in ("in_features", "out_features", "reduction", "block_k")))
        try:
            table = torch.tensor(values["code"], device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise StructureError(f"code is not a rectangular table of int32: {error}") from error
        code = table.to(torch.int32)
        if table.dtype != torch.int64 or not torch.equal(code.long(), table):
            raise StructureError("code is not a rectangular table of int32")
        structure = cls.from_code(
            values["in_features"], values["out_features"], values["block_k"], code
        )
        if structure.reduction != values["reduction"]:
            raise StructureError(
                f"reduction = {values['reduction']} but the code has {structure.reduction} parts"
            )
        return structure

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SS1Structure):
            return NotImplemented
        return self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        sizes = (self.in_features, self.out_features, self.reduction, self.block_k)
        return (*sizes, tuple(self.code.flatten().tolist()))

    def _check_columns(self, name: str, tensor: Tensor, columns: int) -> None:
        rows_fit = name != "z" or (tensor.dim() == 2 and tensor.shape[0] == self.out_features)
        if tensor.dim() < 1 or tensor.shape[-1] != columns or not rows_fit:
            wanted = f"[{self.out_features}, {columns}]" if name == "z" else f"[..., {columns}]"
            raise StructureError(f"{name} must be {wanted}, got {list(tensor.shape)}")


def _check_sizes(in_features: int, out_features: int, reduction: int, block_k: int) -> None:
    sizes = {"in_features": in_features, "out_features": out_features, "reduction": reduction}
    for name, value in (*sizes.items(), ("block_k", block_k)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise StructureError(f"{name} must be an integer of at least 1, got {value!r}")
    if reduction > in_features:
        raise StructureError(
            f"reduction = {reduction} exceeds in_features = {in_features}; choose a smaller c"
        )
    if block_k & (block_k - 1) or not layout.VECTOR_WIDTH <= block_k <= _MAX_BLOCK_K:
        raise StructureError(
            f"block_k must be a power of two in {layout.VECTOR_WIDTH} … {_MAX_BLOCK_K}, "
            f"got {block_k}"
        )


def _random_words(key: str, count: int) -> list[int]:
    """``count`` uniform 32-bit words that depend on ``key`` alone (SHAKE-256 as a stream)."""
    stream = hashlib.shake_256(f"ss1-structure/1/{key}".encode()).digest(4 * count)
    return [int.from_bytes(stream[i : i + 4], "little") for i in range(0, 4 * count, 4)]
