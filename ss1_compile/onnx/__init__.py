"""ONNX: a compressed model as one file that any runtime runs.

* :func:`export_onnx` exports and verifies; :func:`from_onnx` reads the layers back;
* :func:`compress_onnx` and :func:`estimate_onnx` start from an ONNX file instead;
* :func:`onnx_translation_table`, :func:`attach_functions`, :func:`register_schemas` and
  :func:`inline` are its parts, for those who call ``torch.onnx.export`` themselves.

Needs the extra ``onnx``.
"""

from ss1_compile.errors import MissingPackageError

try:
    import ml_dtypes as _ml_dtypes  # noqa: F401
    import onnx as _onnx  # noqa: F401
    import onnx_ir as _onnx_ir  # noqa: F401
    import onnxruntime as _onnxruntime  # noqa: F401
    import onnxscript as _onnxscript  # noqa: F401
except ImportError as error:
    raise MissingPackageError(
        f"{error.name} is not installed; pip install 'ss1-compile[onnx]'"
    ) from error

from ss1_compile.onnx.export import export_onnx, inline
from ss1_compile.onnx.layers import OnnxLayer, attach_functions
from ss1_compile.onnx.operators import DOMAIN, register_schemas
from ss1_compile.onnx.reading import from_onnx
from ss1_compile.onnx.rewriting import compress_onnx, estimate_onnx
from ss1_compile.onnx.translation import onnx_translation_table
from ss1_compile.onnx.verification import ExportReport

__all__ = [
    "DOMAIN",
    "ExportReport",
    "OnnxLayer",
    "attach_functions",
    "compress_onnx",
    "estimate_onnx",
    "export_onnx",
    "from_onnx",
    "inline",
    "onnx_translation_table",
    "register_schemas",
]
