"""What ``torch.compile(..., backend="ss1", options={...})`` may be told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ss1_compile.config import SS1Config
from ss1_compile.errors import ConfigError
from ss1_compile.kernels import lowering
from ss1_compile.learned import Structure
from ss1_compile.option_checks import reject_unknown_keys
from ss1_compile.report import Report

_OWN_OPTIONS = (
    "debug_dir",
    "dry_run",
    "fuse",
    "inner_backend",
    "inductor",
    "lowering",
    "mode",
    "report",
    "structures",
    "tensorrt",
)


@dataclass(frozen=True)
class BackendOptions:
    """What ``options={...}`` may hold besides the fields of :class:`SS1Config`.

    Attributes:
        config: the compression.
        chosen: whether any field of the compression was given. If none was, what is dense in a
            model that is compressed already stays dense.
        debug_dir: a folder to write every graph to, before and after each pass, with a table of
            what the passes did and how long they took (:mod:`ss1_compile.passes.trace`).
        dry_run: project and report, and compile the graph as it was captured.
        fuse: fuse producers, epilogues and sketches of the same input around the SS1 layers, where
            gradients and autocast are off; ``None`` means on CUDA only.
        inner_backend: name of the backend that compiles the rewritten graph; for
            ``"torch_tensorrt"`` (also ``"tensorrt"``) the converters of
            :mod:`ss1_compile.tensorrt` are registered and nothing is fused here.
        inductor: Inductor settings for this compilation only (``config_patches``).
        lowering: run every layer that can with this one of ``kernels.lowering.NAMES`` (on a GPU),
            instead of the one expected to be fastest.
        report: a :class:`Report` that receives a row per linear layer.
        structures: layer name → structure, for weights that are known to have one.
        tensorrt: Torch-TensorRT settings for this compilation, ``{"min_block_size": 1}`` say.
    """

    config: SS1Config
    chosen: bool = True
    debug_dir: str | os.PathLike[str] | None = None
    dry_run: bool = False
    fuse: bool | None = None
    inner_backend: str = "inductor"
    inductor: Mapping[str, Any] | None = None
    lowering: str | None = None
    report: Report | None = None
    structures: Mapping[str, Structure] = field(default_factory=dict)
    tensorrt: Mapping[str, Any] | None = None

    @property
    def for_tensorrt(self) -> bool:
        """Whether Torch-TensorRT compiles the rewritten graph."""
        return self.inner_backend in ("torch_tensorrt", "tensorrt")

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> BackendOptions:
        """Validate ``options`` and ``mode`` of ``torch.compile``.

        Raises:
            ConfigError: an unknown option (the nearest one is named), mode or a bad value.
        """
        options = dict(options or {})
        reject_unknown_keys(options, [*(f.name for f in fields(SS1Config)), *_OWN_OPTIONS])
        own = {name: options.pop(name) for name in _OWN_OPTIONS if name in options}
        mode = own.pop("mode", mode)
        if not isinstance(own.get("report"), Report | None):
            raise ConfigError(f"report must be an ss1_compile.Report, got {own['report']!r}")
        if not isinstance(own.get("debug_dir"), str | os.PathLike | None):
            raise ConfigError(f"debug_dir must be a path, got {own['debug_dir']!r}")
        if not isinstance(own.get("dry_run", False), bool):
            raise ConfigError(f"dry_run must be True or False, got {own['dry_run']!r}")
        if not isinstance(own.get("fuse"), bool | None):
            raise ConfigError(f"fuse must be True, False or None, got {own['fuse']!r}")
        if own.get("lowering") not in (None, *lowering.NAMES):
            raise ConfigError(
                f"lowering must be one of {', '.join(lowering.NAMES)}, got {own['lowering']!r}"
            )
        if own.get("tensorrt") is not None or own.get("fuse"):
            for_tensorrt = own.get("inner_backend") in ("torch_tensorrt", "tensorrt")
            if own.get("tensorrt") is not None and not for_tensorrt:
                raise ConfigError("tensorrt settings need inner_backend='torch_tensorrt'")
            if own.get("fuse") and for_tensorrt:
                raise ConfigError("fuse=True does not work with TensorRT, which fuses itself")
        config = SS1Config.from_dict(options)
        dynamic = config.quantizations - {"int8_weight_only"}
        if dynamic and own.get("inner_backend") in ("torch_tensorrt", "tensorrt"):
            raise ConfigError(
                f"quantization={min(dynamic)!r} does not work with TensorRT, which cannot quantise "
                f"activations per token; use 'int8_weight_only'"
            )
        inductor = dict(own.pop("inductor", None) or {})
        if mode not in (None, "default"):
            try:
                inductor = {**torch._inductor.list_mode_options(mode), **inductor}
            except RuntimeError as error:
                raise ConfigError(f"mode={mode!r}: {error}") from error
        return cls(config, chosen=bool(options), inductor=inductor or None, **own)
