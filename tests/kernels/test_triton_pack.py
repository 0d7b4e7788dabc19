import pytest
import torch
from triton_support import DTYPES, randn

from ss1_compile.kernels import triton_pack  # isort: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [[(70, 72), (3, 72)], [(5,), (4100,), (1,)]])
def test_pack(shapes, dtype):
    parts = [randn(*shape, dtype=dtype) for shape in shapes]
    assert torch.equal(triton_pack.pack(parts), torch.cat(parts))


def test_pack_of_strided_parts():
    wide = randn(20, 48)
    parts = [wide[:, :40], wide[3:7, :40]]
    assert torch.equal(triton_pack.pack(parts), torch.cat(parts))
