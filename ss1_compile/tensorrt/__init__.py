"""SS1 layers inside TensorRT engines: :func:`register` and :func:`export_tensorrt`.

Importing this package imports nothing of TensorRT.
"""

from ss1_compile.tensorrt.engines import export_tensorrt, register

__all__ = ["export_tensorrt", "register"]
