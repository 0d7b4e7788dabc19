"""Balanced sketches: the same function, slots alike, less lost to rounding, sharing kept."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ss1_compile
from ss1_compile import SS1Linear
from ss1_compile.kernels import portable
from ss1_compile.kernels.layout import block_n
from ss1_compile.kernels.quantize import dequantize, quantize_activations, quantize_rows
from ss1_compile.quantization.balancing import balance, balancing, hartley


def output(x, sketch, z):
    """The layer's output ``[M, N]`` in float64."""
    sketched = portable.sketch(x.double(), sketch.double(), z.shape[1])
    width = block_n(len(z), len(sketch))
    parts = z.double().split(width)
    return torch.cat([s @ part.t() for s, part in zip(sketched, parts, strict=True)], 1)


def unbalanced(groups=3, size=16, rank=8, rows=24, features=None):
    """x with an outlying direction, and a sketch whose slots differ a hundredfold in energy."""
    features = features or groups * size
    levels = torch.logspace(-1, 1, rank)
    sketch = torch.randn(1, groups, size, rank) * levels
    z = torch.randn(rows, groups, rank) / levels
    x = torch.randn(400, features)
    x += 5 * torch.randn(400, 1) * torch.nn.functional.normalize(torch.randn(features), dim=0)
    return x, sketch, z.flatten(1)


def moment(x):
    return x.double().t() @ x.double() / len(x)


@settings(deadline=None, max_examples=15)
@given(
    hashes=st.integers(1, 3),
    groups=st.integers(1, 4),
    size=st.integers(1, 12),
    rank=st.integers(1, 12),
    missing=st.integers(0, 5),
    known=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_function_stays(hashes, groups, size, rank, missing, known, seed):
    torch.manual_seed(seed)
    rank, features = min(rank, size), groups * size - min(missing, size - 1)
    sketch = torch.randn(hashes, groups, size, rank, dtype=torch.float64)
    x = torch.randn(40, features, dtype=torch.float64)
    zs = [torch.randn(hashes * n, groups * rank, dtype=torch.float64) for n in (5, 9)]
    balanced, made = balance(zs, sketch, moment(x) if known else None)
    for z, new in zip(zs, made, strict=True):
        y = output(x, sketch, z)
        torch.testing.assert_close(output(x, balanced, new), y, rtol=0, atol=1e-7 * y.abs().max())


@pytest.mark.parametrize("size", [1, 2, 7, 24, 64, 96])
def test_hartley_is_orthogonal_with_small_entries(size):
    matrix = hartley(size)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64))
    assert matrix.abs().max() <= (2 / size) ** 0.5 + 1e-12


def test_rows_of_the_sketch_and_of_z_become_alike():
    x, sketch, z = unbalanced()
    balanced, (made,) = balance([z], sketch.double(), moment(x))
    half = portable.sketch(moment(x), balanced, made.shape[1])[0]
    inner = portable.sketch(half.t().contiguous(), balanced, made.shape[1])[0]
    outer = made.t() @ made
    for g in range(3):
        at = slice(8 * g, 8 * g + 8)
        c, gram = inner[at, at], outer[at, at]
        # to the ridge, 1e-6 of the mean energy, where the least is 1e-4 of it
        torch.testing.assert_close(
            c, gram * (c.trace() / gram.trace()), rtol=0, atol=2e-2 * c.max()
        )
        assert c.diagonal().max() < 4 * c.diagonal().min()


def test_product_of_energies_is_least():
    """``tr(Aᵀ C A) tr(A⁻¹ Z A⁻ᵀ)`` against many other A."""
    mixing = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    c, z = mixing @ mixing.mT + 0.01 * torch.eye(6)

    def energy(a):
        back = torch.linalg.inv(a)
        return torch.trace(a.t() @ c[0] @ a) * torch.trace(back @ z[0] @ back.t())

    (best,) = balancing(c, z)
    least = energy(best)
    for step in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(10):
            other = best @ (torch.eye(6) + step * torch.randn(6, 6)).double()
            assert energy(other) >= least * (1 - 1e-4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("known", [False, True])
def test_less_is_lost(dtype, known):
    x, sketch, z = unbalanced()
    y = output(x, sketch, z)

    def error(sketch, z):
        sketched = portable.sketch(x, sketch.float(), z.shape[1])
        q, scale = quantize_activations(sketched, dtype)
        rows = dequantize(*quantize_rows(z.float(), 1, dtype), torch.float64)
        made = (q[0].double() * scale[0].double().unsqueeze(1)) @ rows.t()
        return ((made - y).norm() / y.norm()).item()

    balanced, (made,) = balance([z], sketch, moment(x) if known else None)
    assert balanced.dtype == torch.float32
    # float8 has its own exponent for every value: only the directions matter to it
    most = {torch.int8: 0.6, torch.float8_e4m3fn: 1.0}[dtype]
    assert error(balanced, made) < most * error(sketch, z)


def test_idle_slots_and_groups_are_left_finite():
    x, sketch, z = unbalanced()
    sketch[0, 0] = 0
    z[:, 8:16] = 0
    sketch[0, 2, :, 3] = 0
    z[:, 20] = z[:, 21]
    balanced, (made,) = balance([z], sketch, moment(x))
    assert torch.equal(balanced[0, :2], sketch[0, :2])
    y = output(x, sketch, z)
    torch.testing.assert_close(output(x, balanced, made), y, rtol=0, atol=1e-4 * y.abs().max())
    z[0, 0] = torch.nan
    same, (other,) = balance([z], sketch, moment(x))
    assert torch.equal(same, sketch)
    assert torch.equal(other.isnan(), z.isnan())


class Attention(nn.Module):
    """q, k and v read one input."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, n) for n in (64, 64, 32))
        self.out = nn.Linear(160, 48)

    def forward(self, x):
        return self.out(torch.cat([self.q(x), self.k(x), self.v(x)], -1))


def learned(data, **options):
    torch.manual_seed(0)
    model = Attention().eval()
    options = {
        "reduction": 2,
        "projection": "learned",
        "warn_error": 2,
        "progress": False,
    } | options
    ss1_compile.compress(model, calibration=data, **options)
    return model


def batches():
    mixing = torch.randn(12, 64)
    return [torch.randn(64, 12) @ mixing + 0.3 * torch.randn(64, 64) for _ in range(4)]


def spoil(model, data):
    """Stretch the slots of every sketch, and z to match: the same function, harder to round."""
    for names in (("q", "k", "v"), ("out",)):
        layers = [model.get_submodule(name) for name in names]
        groups, rank = layers[0].sketch.shape[1], layers[0].sketch.shape[3]
        levels = torch.logspace(-1.5, 1.5, rank)
        with torch.no_grad():
            layers[0].sketch *= levels
            for layer in layers:
                layer.z /= levels.repeat(groups)
    return model


@pytest.mark.parametrize("method", ["int8_weight_only", "int8_dynamic"])
def test_layers_go_on_sharing_a_sketch(method, tmp_path):
    data = batches()
    plain = spoil(learned(data), data)
    x = torch.cat(data)
    with torch.no_grad():
        y = plain(x)
        made = copy.deepcopy(plain)
        ss1_compile.quantize(made, quantization=method, calibration=data)
        assert made.q.sketch is made.k.sketch is made.v.sketch
        assert isinstance(made.q.sketch, nn.Parameter)
        assert not torch.equal(made.q.sketch, plain.q.sketch)
        error = ((made(x) - y).norm() / y.norm()).item()
        assert error < 0.02
        # with a reader that keeps its z, the sketch has to stay
        kept = copy.deepcopy(plain)
        ss1_compile.quantize(
            kept, quantization=method, calibration=data, overrides={"k": {"quantization": None}}
        )
        assert kept.q.sketch is kept.k.sketch
        assert torch.equal(kept.q.sketch, plain.q.sketch)
        assert ((kept(x) - y).norm() / y.norm()).item() > 2 * error
    ss1_compile.save(made, tmp_path / "made")
    loaded = Attention().eval()
    ss1_compile.load(loaded, tmp_path / "made")
    assert loaded.q.sketch is loaded.k.sketch
    with torch.no_grad():
        assert torch.equal(loaded(x), made(x))


def test_compress_balances_what_it_quantises():
    data = batches()
    plain, made = learned(data), learned(data, quantization="int8_dynamic")
    x = torch.cat(data)
    assert made.q.sketch is made.k.sketch is made.v.sketch
    for name in ("q", "k", "v"):
        layer, exact = made.get_submodule(name), plain.get_submodule(name)
        assert isinstance(layer, SS1Linear)
        assert not torch.equal(layer.sketch, exact.sketch)
        with torch.no_grad():
            y = exact(x) - exact.bias
            error = (layer(x) - exact(x)).norm() / y.norm()
        assert error < 0.015, (name, error)
