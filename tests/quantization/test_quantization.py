import re
from pathlib import Path

import pytest
import torch

from ss1_compile.errors import QuantizationError
from ss1_compile.kernels.quantize import dequantize, quantize_rows
from ss1_compile.quantization.rounding import gptq_round


def correlated(blocks, size, samples=400, rank=6):
    """``Γ [J, K_c, K_c]`` of inputs that lie near a low-dimensional subspace."""
    mixing = torch.randn(blocks, rank, size, dtype=torch.float64)
    x = torch.randn(blocks, samples, rank, dtype=torch.float64) @ mixing
    x += 0.1 * torch.randn_like(x)
    return x.transpose(1, 2) @ x / samples


def added_error(z, q, scale, gram):
    """``Σ_j tr(E Γ_j Eᵀ)``: what rounding adds to the mean squared output."""
    e = (dequantize(q, scale, torch.float64) - z.double()).split(-(-len(z) // len(gram)))
    return sum(((part @ g) * part).sum() for part, g in zip(e, gram, strict=True)).item()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("blocks", "rows", "size"), [(1, 20, 48), (3, 32, 150)])
def test_adds_less_output_error_than_nearest(blocks, rows, size, groups, dtype):
    z, gram = torch.randn(rows, size), correlated(blocks, size)
    nearest, scale = quantize_rows(z, groups, dtype)
    calibrated = gptq_round(z, scale, gram, dtype=dtype)
    assert calibrated.dtype == dtype
    before, after = added_error(z, nearest, scale, gram), added_error(z, calibrated, scale, gram)
    assert after < 0.6 * before, after / before


def test_is_nearest_where_slots_are_independent():
    z, gram = torch.randn(9, 40), torch.diag_embed(torch.rand(3, 40, dtype=torch.float64) + 0.1)
    q, scale = quantize_rows(z)
    assert torch.equal(gptq_round(z, scale, gram), q)


def test_blocks_of_slots_make_no_difference(monkeypatch):
    z, gram = torch.randn(6, 50), correlated(2, 50)
    _, scale = quantize_rows(z)
    q = gptq_round(z, scale, gram)
    monkeypatch.setattr("ss1_compile.quantization.rounding._SLOTS", 7)
    assert torch.equal(gptq_round(z, scale, gram), q)


def test_inactive_slots_are_rounded_to_nearest_and_values_stay_in_range():
    z, gram = 3 * torch.randn(5, 24), correlated(1, 24)
    gram[:, 4], gram[:, :, 4] = 0, 0
    q, scale = quantize_rows(z)
    calibrated = gptq_round(z, scale, gram)
    assert torch.equal(calibrated[:, 4], q[:, 4])
    assert calibrated.abs().max() <= 127
    assert torch.equal(gptq_round(z, scale, torch.zeros(1, 24, 24)), q)


def bad(**changes):
    z = torch.randn(6, 8)
    arguments = {"z": z, "scale": quantize_rows(z)[1], "gram": correlated(1, 8)}
    return arguments | changes


wrong = {
    "gram must be [J, 8, 8]": bad(gram=correlated(1, 7)),
    "4 column blocks": bad(gram=correlated(4, 8), z=torch.randn(5, 8), scale=torch.ones(5, 1)),
    "scale must be positive": bad(scale=torch.zeros(6, 1)),
    "got [5, 1]": bad(scale=torch.ones(5, 1)),
    "z is not finite": bad(z=torch.full((6, 8), float("nan"))),
    "damping must be positive": bad(damping=0.0),
    "not positive semi-definite": bad(gram=-correlated(1, 8) + 9 * torch.eye(8)),
    "3 groups do not divide": bad(scale=torch.ones(6, 3)),
}


@pytest.mark.parametrize("message", wrong)
def test_bad_arguments_are_named(message):
    with pytest.raises(QuantizationError) as error:
        gptq_round(**wrong[message], name="encoder.0")
    assert message in str(error.value)
    assert "encoder.0" in str(error.value)


def test_the_example_of_the_page_runs(capsys):
    page = Path(__file__).parents[2] / "docs" / "quantization.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(example, page.name, "exec"), names)
    assert [row.quantization for row in names["report"]] == ["int8_dynamic"] * 2
    assert "int8_dynamic" in capsys.readouterr().out
