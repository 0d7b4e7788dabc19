"""The fixture of the TensorRT tests: Torch-TensorRT with the SS1 converters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tensorrt_support import EXTRA, INSTALLED, device, load


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.tensorrt)
            if not INSTALLED:
                item.add_marker(pytest.mark.skip(reason=EXTRA))


@pytest.fixture(scope="session")
def loaded() -> ModuleType:
    return load()


@pytest.fixture
def torch_tensorrt(loaded: ModuleType) -> Iterator[ModuleType]:
    """The package, with the converters, and a GPU as far as building needs one."""
    from ss1_compile.tensorrt import register

    with device():
        register()
        yield loaded
