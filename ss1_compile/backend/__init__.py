"""``torch.compile(model, backend="ss1")``."""

from ss1_compile.backend.compilation import ss1
from ss1_compile.backend.options import BackendOptions

__all__ = ["BackendOptions", "ss1"]
