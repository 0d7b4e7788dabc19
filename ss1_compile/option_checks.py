"""What values the options of :class:`~ss1_compile.config.SS1Config` may have."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ss1_compile.errors import ConfigError
from ss1_compile.structure import HASH_FAMILIES

if TYPE_CHECKING:
    from ss1_compile.config import SS1Config

_PROJECTIONS = (None, "average", "calibrated", "learned")
_QUANTIZATIONS = (None, "int8_weight_only", "int8_dynamic", "fp8_dynamic")
_ROUNDINGS = ("nearest", "calibrated")
PER_LAYER = ("reduction", "quantization", "quantization_group_size", "rounding")
"""The options that a mapping in ``overrides`` may hold."""


def check_options(config: SS1Config) -> None:
    """Raise :class:`ConfigError` for the first option that is out of its domain or fits no other.

    Patterns are those of ``include`` and ``exclude`` already, and ``overrides`` is a mapping.
    """
    _require_choice("projection", config.projection, _PROJECTIONS)
    _check_reduction("reduction", config.reduction, config.projection)
    _check_quantization("", vars(config))
    for pattern, override in config.overrides.items():
        if not isinstance(pattern, str):
            raise ConfigError(f"overrides must map patterns to reductions, got {pattern!r}")
        if isinstance(override, Mapping):
            _check_override(f"overrides[{pattern!r}]", override, config)
        elif override is not None:
            _check_reduction(f"overrides[{pattern!r}]", override, config.projection)
    if config.rounding != "nearest" and not config.quantizations:
        raise ConfigError(
            f"rounding={config.rounding!r} is of a quantised z; choose a quantization too"
        )
    if config.num_hashes is not None:
        _require_int("num_hashes", config.num_hashes, 1)
    if config.block_k is not None:
        _require_int("block_k", config.block_k, 8)
        if config.block_k & (config.block_k - 1) or config.block_k > 1024:
            raise ConfigError(f"block_k must be a power of two in 8 … 1024, got {config.block_k}")
    if config.group_size is not None:
        _require_int("group_size", config.group_size, 1)
        if config.projection != "learned":
            raise ConfigError(
                f"group_size = {config.group_size} is for projection='learned', "
                f"not {config.projection!r}"
            )
    if config.block_k is not None and config.projection == "learned":
        raise ConfigError("block_k is for rotation sketches; projection='learned' has none")
    _require_int("seed", config.seed, None)
    if config.seed.bit_length() > 64:
        raise ConfigError("seed must be an integer of at most 64 bits")
    _require_int("min_features", config.min_features, 0)
    switches = ("signed", "share_sketches", "weigh_outputs", "refit_dense", "allow_empty", "strict")
    for name in switches:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} must be True or False, got {getattr(config, name)!r}")
    _require_choice("hash_family", config.hash_family, HASH_FAMILIES)
    if config.damping != "auto":
        _require_positive("damping", config.damping)
    if config.asymmetry != "auto":
        if config.asymmetry != 0:
            _require_positive("asymmetry", config.asymmetry)
        if isinstance(config.asymmetry, bool) or config.asymmetry > 1:
            raise ConfigError(f"asymmetry must be 'auto' or in 0 … 1, got {config.asymmetry!r}")
    _require_positive("warn_error", config.warn_error)
    if config.max_error is not None:
        _require_positive("max_error", config.max_error)


def _check_reduction(name: str, value: object, projection: str | None) -> None:
    if projection != "learned":
        if isinstance(value, float) and value >= 1 and not value.is_integer():
            raise ConfigError(f"{name} = {value} is no integer; use projection='learned'")
        _require_int(name, value, 1)
        return
    _require_positive(name, value)
    if value < 1:  # type: ignore[operator]
        raise ConfigError(f"{name} must be at least 1, got {value}")


def _check_override(where: str, options: Mapping[str, Any], config: SS1Config) -> None:
    for name in options:
        if name not in PER_LAYER:
            raise ConfigError(
                f"{where}: {name!r} cannot differ by layer; {', '.join(PER_LAYER)} can"
            )
    if options.get("reduction") is not None:
        _check_reduction(f"{where}['reduction']", options["reduction"], config.projection)
    _check_quantization(f"{where}: ", config.merged(options))


def _check_quantization(where: str, options: Mapping[str, Any]) -> None:
    method, size = options["quantization"], options["quantization_group_size"]
    _require_choice(f"{where}quantization", method, _QUANTIZATIONS)
    _require_choice(f"{where}rounding", options["rounding"], _ROUNDINGS)
    if size is None:
        return
    _require_int(f"{where}quantization_group_size", size, 1)
    if method != "int8_weight_only":
        raise ConfigError(
            f"{where}quantization_group_size = {size} is for "
            f"quantization='int8_weight_only', not {method!r}: with activations quantised per "
            f"token a row of z has one scale"
        )


def reject_unknown_keys(values: Mapping[str, Any], known: list[str]) -> None:
    """Raise ``ConfigError`` for the first key that is not in ``known``, naming the nearest one."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(known)}"
            raise ConfigError(f"unknown option {key!r}; {hint}")


def _require_int(name: str, value: object, least: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    if not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{name} must be positive and finite, got {value!r:.80}")


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} must be one of {list(choices)}, got {value!r}{hint}")
