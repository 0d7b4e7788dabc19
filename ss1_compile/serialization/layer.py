"""One layer of a saved model: its sizes in ``ss1_config.json``, and whether its tensors agree."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ss1_compile.errors import CheckpointError, StructureError
from ss1_compile.experts import SS1ExpertLinear
from ss1_compile.learned import LearnedStructure, Structure, structure_of
from ss1_compile.modules import SS1Linear

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_SIZES = {
    "rotation": ("in_features", "out_features", "reduction", "block_k", "num_hashes"),
    "learned": ("in_features", "out_features", "group_size", "rank", "num_hashes"),
}
_QUANTIZATION_KEYS = ("quantization", "quantization_groups")
_QUANTIZED = {
    "int8_weight_only": torch.int8,
    "int8_dynamic": torch.int8,
    "fp8_dynamic": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class SavedLayer:
    """The sizes of one saved SS1 layer, named as in its structure.

    A layer of the kind ``"learned"`` has ``group_size`` and ``rank``, one of the kind
    ``"rotation"`` has ``reduction`` and ``block_k``; the others are ``None`` and left out of the
    file, as is the kind of a rotation. The matrices of experts, which share one sketch, are one
    layer without bias, z ``[E, N, K_c]``.

    Attributes:
        in_features: K.
        out_features: N.
        num_hashes: J.
        dtype: of z unless it is quantised, the bias and learned blocks: ``"float64"``,
            ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        bias: whether the layer has a bias.
        kind: of its sketch.
        reduction: c.
        block_k: B_K.
        group_size: gsize.
        rank: r.
        experts: E, or ``None`` (and left out of the file) for a layer with one matrix.
        quantization: how z is quantised, as in :class:`ss1_compile.SS1Config`; z is then int8 or
            float8_e4m3fn, and the layer has a float32 tensor ``scale [N, quantization_groups]``.
            ``None`` (and left out of the file) for a floating z.
        quantization_groups: scales per row of a quantised z, else ``None`` (and left out).
    """

    in_features: int
    out_features: int
    num_hashes: int
    dtype: str
    bias: bool
    kind: Literal["rotation", "learned"] = "rotation"
    reduction: int | None = None
    block_k: int | None = None
    group_size: int | None = None
    rank: int | None = None
    experts: int | None = None
    quantization: str | None = None
    quantization_groups: int | None = None

    @property
    def features_per_group(self) -> int:
        """Input features per supergroup."""
        return self.group_size or (self.reduction or 1) * (self.block_k or 1)

    @property
    def slots_per_group(self) -> int:
        """Columns of z per supergroup."""
        return self.rank or self.block_k or 1

    @property
    def z_shape(self) -> tuple[int, ...]:
        """``(N, K_c)``, or ``(E, N, K_c)`` of experts."""
        supergroups = -(-self.in_features // self.features_per_group)
        matrix = (self.out_features, supergroups * self.slots_per_group)
        return matrix if self.experts is None else (self.experts, *matrix)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype called ``dtype``."""
        return _DTYPES[self.dtype]

    @property
    def z_dtype(self) -> torch.dtype:
        """Of z."""
        return self.torch_dtype if self.quantization is None else _QUANTIZED[self.quantization]

    @property
    def format_version(self) -> int:
        """The first version of the format that has such layers, for the sake of earlier readers."""
        if self.quantization is not None:
            return 4
        if self.experts is not None:
            return 3
        return 1 if self.kind == "rotation" else 2

    @classmethod
    def of(cls, module: SS1Linear | SS1ExpertLinear) -> SavedLayer:
        """The sizes of a layer.

        Raises:
            StructureError: its sketch is broken.
        """
        structure = module.structure
        scale = module.scale if isinstance(module, SS1Linear) else None
        values = {name: getattr(structure, name) for name in _SIZES[structure.kind]}
        return cls(
            **values,
            kind=structure.kind,
            dtype=dtype_name(module.dtype if isinstance(module, SS1Linear) else module.z.dtype),
            bias=module.bias is not None,
            experts=module.z.shape[0] if isinstance(module, SS1ExpertLinear) else None,
            quantization=module.quantization if isinstance(module, SS1Linear) else None,
            quantization_groups=scale.shape[1] if scale is not None else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """As ``ss1_config.json`` has it."""
        values = {name: getattr(self, name) for name in (*_SIZES[self.kind], "dtype", "bias")}
        for name in ("experts", *_QUANTIZATION_KEYS):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        return values if self.kind == "rotation" else {"kind": self.kind, **values}


def parse_layer(path: Path, name: str, values: Any) -> SavedLayer:
    """The layer called ``name`` from its entry in ``path``.

    Raises:
        CheckpointError: a key is missing, unknown, of the wrong type or out of range.
    """
    where = f"layer {show(name)}"
    require(isinstance(values, dict), path, f"{where} must be an object, got {show(values)}")
    kind = values.get("kind", "rotation")
    known = isinstance(kind, str) and kind in _SIZES
    require(known, path, f"{where}: kind must be one of {list(_SIZES)}, got {show(kind)}")
    own = {"kind"} if kind == "learned" or "kind" in values else set()
    sizes = (*_SIZES[kind], "experts") if "experts" in values else _SIZES[kind]
    if any(key in values for key in _QUANTIZATION_KEYS):
        sizes, own = (*sizes, "quantization_groups"), {*own, "quantization"}
        require("experts" not in values, path, f"{where}: experts are never quantised")
    require_keys(path, where, values, {*sizes, "dtype", "bias"} | own)
    if "quantization" in own:
        method = values["quantization"]
        known = isinstance(method, str) and method in _QUANTIZED
        known_ones = f"{where}: quantization must be one of {list(_QUANTIZED)}"
        require(known, path, f"{known_ones}, got {show(method)}")
    for key in sizes:
        require_int(path, f"{where}: {key}", values[key])
        require(values[key] < 2**63, path, f"{where}: {key} is {show(values[key])}")
    dtype, bias = values["dtype"], values["bias"]
    known = isinstance(dtype, str) and dtype in _DTYPES
    require(known, path, f"{where}: dtype must be one of {list(_DTYPES)}, got {show(dtype)}")
    require(isinstance(bias, bool), path, f"{where}: bias must be a boolean, got {show(bias)}")
    require(not (bias and "experts" in values), path, f"{where}: experts have no bias")
    layer = SavedLayer(**values)
    groups = layer.quantization_groups
    if groups is not None:
        reduced = layer.z_shape[-1]
        fits = reduced % groups == 0 and (groups == 1 or layer.quantization == "int8_weight_only")
        problem = f"{where}: quantization_groups = {groups} does not fit {layer.quantization}"
        require(fits, path, f"{problem} with K_c = {reduced}")
        problem = f"{where}: a quantised layer computes in float32 or less, not {dtype}"
        require(dtype != "float64", path, problem)
    return layer


def check_layer(
    source: str,
    name: str,
    layer: SavedLayer,
    z: Tensor | None,
    bias: Tensor | None,
    sketch: Tensor | None,
    scale: Tensor | None = None,
) -> Structure:
    """The structure of a layer whose tensors agree with its sizes.

    Raises:
        CheckpointError: they do not, z or the bias is not finite, or a scale is not positive and
            finite; ``source`` is named.
    """
    where = f"{source}: layer {name!r}"
    if z is None or sketch is None:
        raise CheckpointError(f"{where}: {'z' if z is None else 'sketch'} is missing")
    if (bias is not None) != layer.bias:
        raise CheckpointError(f"{where}: bias is {'missing' if layer.bias else 'unexpected'}")
    try:
        if sketch.is_floating_point() != (layer.kind == "learned"):
            raise StructureError(f"it is {sketch.dtype}, which is no {layer.kind} sketch")
        structure = structure_of(layer.in_features, layer.out_features, layer.block_k, sketch)
    except StructureError as error:
        raise CheckpointError(f"{where}: sketch: {error}") from error
    for part in _SIZES[layer.kind]:
        stated, found = getattr(layer, part), getattr(structure, part)
        if stated != found:
            raise CheckpointError(f"{where}: {part} is {stated} but the sketch has {found}")
    dtype = _DTYPES.get(layer.dtype)
    z_dtype = dtype if layer.quantization is None else layer.z_dtype
    wanted: dict[str, tuple[Tensor | None, torch.dtype | None, tuple[int, ...]]] = {
        "z": (z, z_dtype, layer.z_shape),
        "bias": (bias, dtype, (layer.out_features,)),
    }
    if isinstance(structure, LearnedStructure):
        wanted["sketch"] = (sketch, dtype, structure.sketch_shape)
    if (scale is not None) != (layer.quantization is not None):
        raise CheckpointError(f"{where}: scale is {'missing' if scale is None else 'unexpected'}")
    if layer.quantization_groups is not None:
        wanted["scale"] = (scale, torch.float32, (layer.out_features, layer.quantization_groups))
    for part, (tensor, expected, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.dtype != expected or tuple(tensor.shape) != shape:
            stated = layer.dtype if expected is None else dtype_name(expected)
            raise CheckpointError(
                f"{where}: {part} must be {stated} {list(shape)}, "
                f"got {dtype_name(tensor.dtype)} {list(tensor.shape)}"
            )
        whole = tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor
        if not bool(whole.isfinite().all()):
            raise CheckpointError(f"{where}: {part} has values that are not finite")
        if tensor.dtype == torch.int8 and bool((tensor == -128).any()):
            # kernels count on it: exact sums, and -q being an int8 too
            raise CheckpointError(f"{where}: {part} has values outside -127 … 127")
    if scale is not None and not bool((scale > 0).all()):
        raise CheckpointError(f"{where}: scale has values that are not positive")
    return structure


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def show(value: object) -> str:
    """``repr``, cut to a line whatever the file holds."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a value of type {type(value).__name__}"


def require(condition: bool, path: Path, problem: str) -> None:
    """Raise :class:`CheckpointError` about the file ``path`` unless ``condition``."""
    if not condition:
        raise CheckpointError(f"{path}: {problem}")


def require_int(path: Path, what: str, value: object) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(fits, path, f"{what} must be an integer of at least 1, got {show(value)}")


def require_keys(path: Path, where: str, values: Mapping[str, Any], keys: set[str]) -> None:
    """Raise unless ``values`` has exactly these ``keys``."""
    missing, unknown = keys - values.keys(), values.keys() - keys
    require(not missing, path, f"{where} lacks {show(sorted(missing))}")
    require(not unknown, path, f"{where} has unknown keys {show(sorted(unknown))}")
