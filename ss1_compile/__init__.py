"""ss1-compile: smaller and faster PyTorch models through sketch structured transforms (SS1).

* :func:`compress` swaps linear layers for SS1 layers and frees the dense weights;
* ``torch.compile(model, backend="ss1")`` rewrites the captured graph and leaves the model alone;
* :func:`compile` does both; :func:`calibrate` collects the input statistics that either uses;
* :func:`compare` shows, layer by layer, where the accuracy went;
* :func:`save` and :func:`load` keep a compressed model in safetensors and JSON.
"""

from ss1_compile.comparison import Comparison, LayerComparison, compare
from ss1_compile.compression import compile, compress
from ss1_compile.config import SS1Config
from ss1_compile.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    NothingToCompressError,
    ProjectionError,
    SS1Error,
    SS1Warning,
    StructureError,
    TrainingError,
    UnhandledLinearError,
)
from ss1_compile.export import compress_exported
from ss1_compile.modules import SS1Linear
from ss1_compile.projection import Projection, project
from ss1_compile.report import LayerReport, Report
from ss1_compile.serialization import load, save
from ss1_compile.statistics import InputStatistics, Statistics, calibrate
from ss1_compile.structure import SS1Structure

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "InputStatistics",
    "LayerComparison",
    "LayerReport",
    "NothingToCompressError",
    "Projection",
    "ProjectionError",
    "Report",
    "SS1Config",
    "SS1Error",
    "SS1Linear",
    "SS1Structure",
    "SS1Warning",
    "Statistics",
    "StructureError",
    "TrainingError",
    "UnhandledLinearError",
    "calibrate",
    "compare",
    "compile",
    "compress",
    "compress_exported",
    "load",
    "project",
    "save",
]
