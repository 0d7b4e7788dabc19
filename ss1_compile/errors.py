"""Every error and warning that ss1-compile raises by name.

All derive from :class:`SS1Error`; those about a value the caller gave are ``ValueError`` too.
"""

from __future__ import annotations


class SS1Error(Exception):
    """Base of all ss1-compile errors."""


class ConfigError(SS1Error, ValueError):
    """A configuration value or option name is wrong."""


class StructureError(SS1Error, ValueError):
    """A structure's sizes, rotations or signs are out of range or do not fit together."""


class ProjectionError(SS1Error, ValueError):
    """A weight cannot be projected (not finite, wrong shape, singular statistics)."""


class QuantizationError(SS1Error, ValueError):
    """A layer's parameters cannot be quantised (not finite, wrong groups, unsupported dtype)."""


class CalibrationError(SS1Error, ValueError):
    """Calibration data or input statistics are missing, not finite, or do not fit the model."""


class CheckpointError(SS1Error, ValueError):
    """A saved model is truncated, tampered with, or does not fit the model it is loaded into."""


class ExportError(SS1Error, RuntimeError):
    """A model cannot be exported."""


class NothingToCompressError(SS1Error, ValueError):
    """No linear layer matched; pass ``allow_empty=True`` if that is meant."""


class UnhandledLinearError(SS1Error):
    """``strict=True`` and a linear layer had to stay dense."""


class TrainingError(SS1Error, RuntimeError):
    """The backend was asked to rewrite weights that are being trained; ``compress`` them first."""


class MissingPackageError(SS1Error, ImportError):
    """An optional package is not installed; the message says how to install it."""


class VerificationError(SS1Error, RuntimeError):
    """A compiled or reloaded model does not compute what it should."""


class TensorRTError(SS1Error, RuntimeError):
    """TensorRT does not load here, or cannot build an engine of the model."""


class SS1Warning(UserWarning):
    """Something works but is probably not what the user wants."""
