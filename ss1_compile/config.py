"""``SS1Config``: what to compress and how, with one meaning for every way in."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch

from ss1_compile.errors import ConfigError, StructureError
from ss1_compile.learned import LearnedStructure, Structure
from ss1_compile.option_checks import PER_LAYER, check_options, reject_unknown_keys
from ss1_compile.structure import HashFamily, SS1Structure

ProjectionMethod = Literal["average", "calibrated", "learned"]
Quantization = Literal["int8_weight_only", "int8_dynamic", "fp8_dynamic"]
Rounding = Literal["nearest", "calibrated"]


@dataclass(frozen=True)
class LayerQuantization:
    """How z of one layer is quantised; the attributes are the options of :class:`SS1Config`.

    Attributes:
        method: ``quantization``, not ``None``.
        group_size: ``quantization_group_size``.
        rounding: of z.
    """

    method: Quantization
    group_size: int | None = None
    rounding: Rounding = "nearest"

    @property
    def dtype(self) -> torch.dtype:
        """Of the quantised z."""
        return torch.float8_e4m3fn if self.method == "fp8_dynamic" else torch.int8

    @property
    def dynamic(self) -> bool:
        """Whether activations are quantised too, per token, to the dtype of z."""
        return self.method != "int8_weight_only"


@dataclass(frozen=True, kw_only=True)
class SS1Config:
    """How linear layers become SS1 layers. Frozen, validated on construction.

    Attributes:
        reduction: c, the factor by which parameters and multiplications of a layer fall. It need
            not be an integer for the learned projection.
        num_hashes: J, the number of column blocks; ``None`` means c for a rotation sketch and 1 for
            a learned one.
        block_k: B_K, the chunk length along K; ``None`` means the largest of 128 … 8 that keeps
            the zero-padding of K under 3 %.
        hash_family: ``"independent"`` (default) or ``"affine"`` (the authors' public kernel).
        signed: draw random signs (independent family).
        seed: seed of the structures.
        group_size: input features per block of a learned sketch. ``None`` means, for ``compress``
            with calibration data, the best of a few sizes on held-out batches if it is sequential
            and N/2 within 128 … 384 if not; elsewhere about 128.
        share_sketches: layers that read the same input (q, k and v, say) get one learned sketch in
            common, which is stored and computed once and leaves more of the budget to each.
        weigh_outputs: learned sketches are fitted with a layer's output errors weighed by what the
            model makes of them: gradients, which ``compress`` collects from calibration batches
            (of the model's outputs, no labels are needed; a second forward and a backward pass per
            batch). A model that does not allow it has its outputs counted alike, and the report
            says why. Statistics collected earlier have gradients if
            ``calibrate(..., weigh_outputs=True)`` made them.
        projection: how a dense weight becomes z. ``"average"`` is the signed mean of the tied
            weights, ``"calibrated"`` minimises the output error on calibration inputs,
            ``"learned"`` does so over z and the blocks of a learned sketch (c = 1 stays a rotation,
            which loses nothing). ``None`` means learned where input statistics exist (calibrated if
            ``num_hashes``, ``block_k``, ``hash_family`` or ``signed`` asks for a certain rotation,
            and for experts) and average elsewhere.
        damping: ridge of the calibrated and learned projections, relative to the mean of
            ``diag(H)``; ``"auto"`` chooses it per layer by the error on held-out batches.
        asymmetry: of sequential calibration: 1 fits every layer towards the dense model's outputs,
            given the inputs that the compressed layers before it leave; 0 towards its own dense
            outputs on them; ``"auto"`` chooses per layer by the error on held-out batches. Unless
            it is 0, layers whose outputs are added to a stream of residuals also make up for what
            the stream lacks of the dense model's, as far as held-out batches bear it out.
        refit_dense: in sequential calibration, layers that ``overrides`` keep dense (not those that
            are excluded) are fitted to what is wanted of the inputs that the layers before them
            leave, as the others are: their weights and biases change, and make up for some of the
            errors so far. :func:`ss1_compile.plan` asks for it.
        quantization: how z is stored: ``None``, in the dtype of the weight; ``"int8_weight_only"``,
            int8 with float32 scales, activations as they are; ``"int8_dynamic"``, activations int8
            too, a scale per token, after the sketch; ``"fp8_dynamic"``, both float8 (e4m3). The
            quantised z is frozen. Experts cannot be quantised.
        quantization_group_size: neighbouring slots of a row of z that share one scale
            (``int8_weight_only``); it must divide K_c. ``None`` means the whole row.
        rounding: of the quantised z: ``"nearest"``; or ``"calibrated"``, which makes the error of
            the *output* on the calibration inputs small (GPTQ in the sketched space).
        include: fnmatch patterns on qualified module names; a layer must match one.
        exclude: fnmatch patterns; a layer that matches one stays dense.
        overrides: pattern → reduction c, or ``None`` to keep dense, or a mapping with any of
            ``reduction``, ``quantization``, ``quantization_group_size`` and ``rounding``; the first
            match wins.
        min_features: layers with fewer input or output features stay dense.
        max_error: layers whose relative projection error is above this stay dense.
        warn_error: one warning names the layers whose relative error is above this.
        allow_empty: compressing nothing is not an error.
        strict: the first linear layer that cannot be handled is an error. Layers that the
            configuration itself leaves dense (exclude, overrides, min_features, max_error) are not.

    Raises:
        ConfigError: a value is of the wrong type or out of range; the message names the field.
    """

    reduction: float = 4
    num_hashes: int | None = None
    block_k: int | None = None
    group_size: int | None = None
    share_sketches: bool = True
    weigh_outputs: bool = True
    hash_family: HashFamily = "independent"
    signed: bool = True
    seed: int = 0
    projection: ProjectionMethod | None = None
    damping: float | Literal["auto"] = 1e-3
    asymmetry: float | Literal["auto"] = "auto"
    refit_dense: bool = False
    quantization: Quantization | None = None
    quantization_group_size: int | None = None
    rounding: Rounding = "nearest"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, float | Mapping[str, Any] | None] = field(default_factory=dict)
    min_features: int = 32
    max_error: float | None = None
    warn_error: float = 0.5
    allow_empty: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            listed = tuple(patterns) if isinstance(patterns, Iterable) else (None,)
            if isinstance(patterns, str) or not all(isinstance(p, str) for p in listed):
                raise ConfigError(f"{name} must be a sequence of patterns, got {patterns!r}")
            object.__setattr__(self, name, listed)
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(f"overrides must map patterns to reductions, got {self.overrides!r}")
        overrides = {
            pattern: dict(override) if isinstance(override, Mapping) else override
            for pattern, override in self.overrides.items()
        }
        object.__setattr__(self, "overrides", overrides)
        check_options(self)

    def merged(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a layer. A group size is not inherited by a method that has none."""
        merged = {name: getattr(self, name) for name in PER_LAYER} | dict(options)
        if merged["quantization"] != "int8_weight_only" and (
            "quantization_group_size" not in options
        ):
            merged["quantization_group_size"] = None
        return merged

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SS1Config:
        """Build from plain values, for instance ``torch.compile`` options or JSON.

        Raises:
            ConfigError: an unknown key (the nearest known one is named) or a bad value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"options must map names to values, got {values!r}")
        reject_unknown_keys(values, [f.name for f in fields(cls)])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_dict` inverts it."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def why_too_lossy(self, error: float) -> str | None:
        """Why a layer of this relative error stays dense; ``None`` within ``max_error``."""
        if self.max_error is None or not error > self.max_error:
            return None
        return f"relative error {error:.3f} exceeds max_error = {self.max_error}"

    def reduction_for(self, name: str, in_features: int, out_features: int) -> float | str:
        """The reduction of the layer called ``name``, or the reason why it stays dense."""
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.include):
            return f"matches no include pattern of {list(self.include)}"
        for pattern in self.exclude:
            if fnmatch.fnmatchcase(name, pattern):
                return f"excluded by {pattern!r}"
        reduction: float | None = self.reduction
        matching, override = self._override(name)
        if matching is not None:
            reduction = override
            if isinstance(override, Mapping):
                reduction = override.get("reduction", self.reduction)
        if reduction is None:
            return f"kept dense by overrides[{matching!r}]"
        if min(in_features, out_features) < self.min_features:
            return f"smaller than min_features = {self.min_features}"
        if reduction > in_features:
            return f"reduction {reduction} exceeds in_features {in_features}"
        return reduction

    def refits(self, name: str) -> bool:
        """Whether the layer is kept dense by ``overrides`` and is to be refitted."""
        included = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.include)
        excluded = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)
        matching, override = self._override(name)
        if isinstance(override, Mapping):
            override = override.get("reduction", self.reduction)
        kept = matching is not None and override is None
        return self.refit_dense and included and not excluded and kept

    def _override(self, name: str) -> tuple[str | None, Any]:
        """The first pattern of ``overrides`` that matches ``name``, and what it maps to."""
        for pattern, override in self.overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                return pattern, override
        return None, None

    @property
    def quantizations(self) -> frozenset[str]:
        """Every ``quantization`` that some layer may get; empty if none is quantised."""
        mappings = (o for o in self.overrides.values() if isinstance(o, Mapping))
        methods = {self.quantization, *(o.get("quantization") for o in mappings)}
        return frozenset(str(method) for method in methods if method is not None)

    def quantization_for(self, name: str) -> LayerQuantization | None:
        """How the layer called ``name`` is quantised, ``None`` if it is not."""
        _, override = self._override(name)
        options = self.merged(override if isinstance(override, Mapping) else {})
        if options["quantization"] is None:
            return None
        return LayerQuantization(
            options["quantization"], options["quantization_group_size"], options["rounding"]
        )

    def is_learned(self, calibrated: bool) -> bool:
        """Whether layers get a learned sketch, given whether statistics of their inputs exist.

        Left open (``projection=None``) they do if there are statistics, and if no option asks for a
        certain rotation.
        """
        if self.projection is not None:
            return self.projection == "learned"
        rotation = (self.num_hashes, self.block_k, self.hash_family, self.signed)
        return calibrated and rotation == (None, None, "independent", True)

    def structure_for(
        self, name: str, in_features: int, out_features: int, *, calibrated: bool = False
    ) -> Structure | str:
        """The structure of the layer called ``name``, or the reason why it stays dense.

        Args:
            name: qualified name of the module.
            in_features: K.
            out_features: N.
            calibrated: whether there are statistics of its inputs (:meth:`is_learned`).
        """
        reduction = self.reduction_for(name, in_features, out_features)
        if isinstance(reduction, str):
            return reduction
        if self.is_learned(calibrated) and reduction > 1:
            try:
                return LearnedStructure.create(
                    in_features,
                    out_features,
                    reduction,
                    group_size=self.group_size,
                    num_hashes=self.num_hashes,
                )
            except StructureError as error:
                return str(error)
        structure = SS1Structure.create(
            in_features,
            out_features,
            int(reduction),
            num_hashes=self.num_hashes,
            block_k=self.block_k,
            hash_family=self.hash_family,
            signed=self.signed,
            seed=self.seed,
        )
        if reduction > 1 and structure.reduced_features >= in_features:
            return (
                f"padding {in_features} features to {structure.padded_features} leaves nothing to "
                f"gain at reduction {reduction}; choose a smaller block_k"
            )
        return structure
