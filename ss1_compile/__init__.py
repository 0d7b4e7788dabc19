"""ss1-compile: smaller and faster PyTorch models through sketch structured transforms (SS1).

* :func:`compress` swaps linear layers for SS1 layers and frees the dense weights;
* ``torch.compile(model, backend="ss1")`` rewrites the captured graph and leaves the model alone;
* :func:`compile` does both; :func:`calibrate` collects the input statistics that either uses;
* :func:`plan` chooses the reduction of every layer for a budget or a quality;
* :func:`heal` distils the dense model into the compressed one, on text of its own
  (:func:`sample_texts`) where a language model has no other;
* :func:`compare` shows, layer by layer, where the accuracy went;
* :func:`quantize` quantises a compressed model; :func:`sensitivity` shows what that costs, layer by
  layer, next to SS1;
* :func:`save` and :func:`load` keep a compressed model in safetensors and JSON;
* :func:`export_onnx` writes an ONNX file and checks it (:mod:`ss1_compile.onnx`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ss1_compile.calibration.statistics import InputStatistics, Statistics, calibrate
from ss1_compile.comparison import Comparison, LayerComparison, compare
from ss1_compile.compression.compress import compile, compress
from ss1_compile.config import SS1Config
from ss1_compile.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    ExportError,
    NothingToCompressError,
    ProjectionError,
    QuantizationError,
    SS1Error,
    SS1Warning,
    StructureError,
    TrainingError,
    UnhandledLinearError,
)
from ss1_compile.export import compress_exported
from ss1_compile.healing.config import HealConfig, Healing
from ss1_compile.healing.heal import heal
from ss1_compile.healing.sampling import sample_texts
from ss1_compile.learned import LearnedStructure
from ss1_compile.modules import SS1Linear
from ss1_compile.planning.planner import plan
from ss1_compile.planning.plans import Plan
from ss1_compile.projection.project import Projection, project
from ss1_compile.quantization.quantize import quantize
from ss1_compile.quantization.sensitivity import LayerSensitivity, Sensitivity, sensitivity
from ss1_compile.report import LayerReport, Report
from ss1_compile.serialization.load import load
from ss1_compile.serialization.save import save
from ss1_compile.structure import SS1Structure

if TYPE_CHECKING:
    from ss1_compile.onnx import ExportReport as ExportReport
    from ss1_compile.onnx import export_onnx as export_onnx
    from ss1_compile.onnx import from_onnx as from_onnx

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "ExportError",
    "HealConfig",
    "Healing",
    "InputStatistics",
    "LayerComparison",
    "LayerReport",
    "LayerSensitivity",
    "LearnedStructure",
    "NothingToCompressError",
    "Plan",
    "Projection",
    "ProjectionError",
    "QuantizationError",
    "Report",
    "SS1Config",
    "SS1Error",
    "SS1Linear",
    "SS1Structure",
    "SS1Warning",
    "Sensitivity",
    "Statistics",
    "StructureError",
    "TrainingError",
    "UnhandledLinearError",
    "calibrate",
    "compare",
    "compile",
    "compress",
    "compress_exported",
    "heal",
    "load",
    "plan",
    "project",
    "quantize",
    "sample_texts",
    "save",
    "sensitivity",
]

_OF_EXTRAS = {  # not in __all__: a star import needs no extra
    "ExportReport": "ss1_compile.onnx",
    "export_onnx": "ss1_compile.onnx",
    "from_onnx": "ss1_compile.onnx",
}


def __getattr__(name: str) -> Any:
    """Import what needs an optional package on first use."""
    if name in _OF_EXTRAS:
        return getattr(import_module(_OF_EXTRAS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
