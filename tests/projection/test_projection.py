import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ss1_compile.calibration.statistics import InputStatistics
from ss1_compile.errors import CalibrationError, ConfigError, ProjectionError
from ss1_compile.kernels import reference
from ss1_compile.projection.project import Projection, project
from ss1_compile.structure import SS1Structure

ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def statistics_from(x: Tensor) -> InputStatistics:
    x = x.double()
    return InputStatistics(len(x), x.mean(0), x.t() @ x / len(x))


def dense_sketches(structure: SS1Structure) -> list[Tensor]:
    """``S_j [K, K_c]`` of every column block, from the reference's W alone: ``W = z Sᵀ``."""
    size = structure.reduced_features
    matrices = []
    for j in range(structure.num_hashes):
        rows = structure.code[j : j + 1]
        matrices.append(reference.materialize(rows, torch.eye(size), structure.in_features).t())
    return matrices


def expected_z(weight: Tensor, structure: SS1Structure, moment: Tensor | None) -> Tensor:
    blocks = []
    for w, s in zip(
        weight.double().split(structure.block_n), dense_sketches(structure), strict=True
    ):
        h = torch.eye(structure.in_features, dtype=torch.float64) if moment is None else moment
        blocks.append(w @ h @ s @ torch.linalg.pinv(s.t() @ h @ s, rtol=1e-13, hermitian=True))
    return torch.cat(blocks)


def output_error(
    weight: Tensor, z: Tensor, structure: SS1Structure, moment: Tensor | None
) -> float:
    w = weight.double()
    e = w - reference.materialize(structure.code, z, structure.in_features)
    h = torch.eye(w.shape[1], dtype=torch.float64) if moment is None else moment
    whole = torch.trace(w @ h @ w.t())
    return math.sqrt(max(0.0, torch.trace(e @ h @ e.t()).item()) / whole.item())


def inputs(rows: int, features: int, seed: int) -> Tensor:
    """Correlated inputs with unequal scales and a mean, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    scales = torch.rand(features, generator=generator, dtype=torch.float64) + 0.1
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64) @ mixing
    return x * scales / features**0.5 + 0.3 * scales


def weights(out_features: int, in_features: int, seed: int) -> Tensor:
    return torch.randn(
        out_features, in_features, generator=torch.Generator().manual_seed(seed + 99)
    )


@st.composite
def cases(draw):
    reduction = draw(st.integers(1, 6))
    in_features = draw(st.integers(max(8, reduction), 90))
    structure = SS1Structure.create(
        in_features,
        draw(st.integers(1, 24)),
        reduction,
        num_hashes=draw(st.sampled_from([None, 1, 2, 3, 5])),
        block_k=draw(st.sampled_from([8, 16, 32])),
        hash_family=draw(st.sampled_from(["independent", "affine"])),
        signed=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )
    return structure, draw(st.sampled_from(list(ROUNDING))), draw(st.integers(0, 10**6))


@settings(deadline=None, max_examples=25)
@given(cases(), st.booleans(), st.sampled_from(["average", "calibrated"]))
def test_both_methods_against_explicit_matrices(case, biased, method):
    structure, dtype, seed = case
    n, k = structure.out_features, structure.in_features
    weight = weights(n, k, seed).to(dtype)
    bias = weights(n, 1, seed + 1)[:, 0].to(dtype) if biased else None
    x = inputs(3 * k, k, seed)
    statistics = statistics_from(x)
    found = project(weight, structure, bias, statistics=statistics, method=method, damping=1e-3)

    h = statistics.second_moment
    if biased:
        h = (x - x.mean(0)).t() @ (x - x.mean(0)) / len(x)
    damped = h + 1e-3 * h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    wanted = expected_z(weight, structure, damped if method == "calibrated" else None)
    assert found.z.dtype == dtype
    assert found.z.shape == (n, structure.reduced_features)
    scale = wanted.abs().max().item()
    torch.testing.assert_close(
        found.z.double(), wanted, rtol=0, atol=max(1e-9, ROUNDING[dtype]) * scale
    )
    assert found.method == method
    assert found.error_of == "output"
    assert found.error == pytest.approx(output_error(weight, found.z, structure, h), abs=1e-7)
    if biased:
        e = weight.double() - reference.materialize(structure.code, found.z, k)
        torch.testing.assert_close(
            found.bias.double(),
            bias.double() + e @ x.mean(0),
            rtol=ROUNDING[dtype],
            atol=ROUNDING[dtype],
        )
        assert found.bias.dtype == dtype
    else:
        assert found.bias is None


@settings(deadline=None, max_examples=25)
@given(cases(), st.booleans())
def test_average_without_statistics_is_the_signed_mean_of_real_sources(case, biased):
    structure, dtype, seed = case
    weight = weights(structure.out_features, structure.in_features, seed).to(dtype)
    bias = weights(structure.out_features, 1, seed)[:, 0].to(dtype) if biased else None
    found = project(weight, structure, bias)
    wanted = expected_z(weight, structure, None)
    torch.testing.assert_close(found.z.double(), wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert (found.error_of, found.method) == ("weight", "average")
    assert found.error == pytest.approx(output_error(weight, found.z, structure, None), abs=1e-7)
    if bias is None:
        assert found.bias is None
    else:
        assert torch.equal(found.bias, bias)
        assert found.bias.data_ptr() != bias.data_ptr()


def test_slots_that_only_padding_falls_into_are_zero():
    structure = SS1Structure.create(65, 4, 2, block_k=32, num_hashes=2)
    # K = 65: the second supergroup has one real column, so 31 of its 32 slots are empty
    empty = torch.cat([(s.abs().sum(0) == 0).expand(2, -1) for s in dense_sketches(structure)])
    assert empty.sum() == 4 * 31
    statistics = statistics_from(inputs(200, 65, 0))
    for method in ("average", "calibrated"):
        z = project(weights(4, 65, 0), structure, statistics=statistics, method=method).z
        assert (z[empty] == 0).all()
        assert (z[~empty] != 0).all()


@settings(deadline=None, max_examples=30)
@given(cases(), st.booleans(), st.booleans(), st.sampled_from([0.0, 1e-12, 1e-3]))
def test_a_weight_with_the_structure_is_recovered_even_if_h_is_singular(
    case, biased, average, damping
):
    structure, dtype, seed = case
    z = weights(structure.out_features, structure.reduced_features, seed).to(dtype)
    empty = torch.cat(
        [
            (s.abs().sum(0) == 0).expand(rows.shape[0], -1)
            for s, rows in zip(dense_sketches(structure), z.split(structure.block_n), strict=True)
        ]
    )
    z[empty] = 0
    bias = weights(structure.out_features, 1, seed)[:, 0].to(dtype) if biased else None
    few = statistics_from(inputs(3, structure.in_features, seed))
    method = "average" if average else "calibrated"
    found = project(
        structure.materialize(z), structure, bias, statistics=few, method=method, damping=damping
    )
    assert torch.equal(found.z, z)
    assert found.error == 0.0
    if bias is not None:
        assert torch.equal(found.bias, bias)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("calibrated", [False, True])
def test_reduction_one_is_lossless(dtype, calibrated):
    structure = SS1Structure.create(72, 20, 1, num_hashes=3)
    weight, bias = weights(20, 72, 0).to(dtype), weights(20, 1, 1)[:, 0].to(dtype)
    statistics = statistics_from(inputs(10, 72, 0)) if calibrated else None
    found = project(weight, structure, bias, statistics=statistics)
    assert torch.equal(structure.materialize(found.z), weight)
    assert torch.equal(found.bias, bias)
    assert found.error == 0.0


@settings(deadline=None, max_examples=25)
@given(cases(), st.booleans())
def test_calibrated_is_optimal_and_never_behind_average(case, biased):
    structure, _, seed = case
    n, k = structure.out_features, structure.in_features
    weight = weights(n, k, seed).double()
    bias = weight.new_zeros(n) if biased else None
    x = inputs(3 * k, k, seed)
    statistics = statistics_from(x)
    h = statistics.covariance() if biased else statistics.second_moment
    best = project(weight, structure, bias, statistics=statistics, damping=0.0)
    average = project(weight, structure, bias, statistics=statistics, method="average")
    assert best.error <= average.error + 1e-9
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-4, 1e-2):
        step = torch.randn(best.z.shape, generator=generator, dtype=torch.float64)
        assert output_error(weight, best.z + size * step, structure, h) >= best.error - 1e-9
    damped = project(weight, structure, bias, statistics=statistics, damping=1e-2)
    assert best.error - 1e-9 <= damped.error <= average.error + 1e-9


@pytest.mark.parametrize("method", ["average", "calibrated"])
def test_bias_correction_makes_the_mean_output_error_vanish(method):
    structure = SS1Structure.create(48, 30, 3)
    weight, bias = weights(30, 48, 3).double(), weights(30, 1, 4)[:, 0].double()
    x = inputs(500, 48, 3)
    found = project(weight, structure, bias, statistics=statistics_from(x), method=method)
    y = x @ weight.t() + bias
    y_hat = reference.linear(x, structure.code, found.z, found.bias)
    assert (y - y_hat).mean(0).abs().max() < 1e-12
    error = (y - y_hat).norm() / (y - y.mean(0)).norm()
    assert found.error == pytest.approx(error.item(), rel=1e-9)


def test_equal_hashes_and_row_chunks_change_nothing(monkeypatch):
    structure = SS1Structure.create(64, 50, 2, num_hashes=1)
    code = structure.code.expand(5, -1, -1).contiguous()
    code[2] = SS1Structure.create(64, 50, 2, num_hashes=1, seed=1).code[0]
    mixed = SS1Structure.from_code(64, 50, structure.block_k, code)
    weight, statistics = weights(50, 64, 0).double(), statistics_from(inputs(200, 64, 0))
    wanted = expected_z(weight, mixed, statistics.second_moment)
    calls = []
    plain = torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda matrix: calls.append(1) or plain(matrix)
    )
    monkeypatch.setattr("ss1_compile.projection.fitting._CHUNK_ELEMENTS", 64 * 7)
    found = project(weight, mixed, statistics=statistics, damping=0.0)
    torch.testing.assert_close(found.z, wanted, rtol=1e-9, atol=1e-9)
    assert len(calls) == 2


def test_zero_weights_and_inputs_that_never_vary():
    structure = SS1Structure.create(32, 16, 4)
    statistics = statistics_from(inputs(100, 32, 0))
    zero = project(torch.zeros(16, 32), structure, torch.zeros(16), statistics=statistics)
    assert zero.error == 0.0
    assert not zero.z.any()
    weight = weights(16, 32, 0)
    constant = statistics_from(torch.ones(10, 32))
    found = project(weight, structure, torch.zeros(16), statistics=constant)
    torch.testing.assert_close(found.z, project(weight, structure).z)
    assert found.error == 0.0  # the corrected bias carries the whole, constant, output
    e = weight.double() - structure.materialize(found.z).double()
    torch.testing.assert_close(found.bias, e.sum(1).float())


def test_operands_may_be_views_and_are_left_alone():
    structure = SS1Structure.create(32, 24, 2)
    stored = weights(32, 24, 0).requires_grad_()
    before = stored.detach().clone()
    found = project(stored.t(), structure)
    assert torch.equal(stored, before)
    assert not found.z.requires_grad
    torch.testing.assert_close(found.z, project(before.t().contiguous(), structure).z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(project(before.t(), structure).z, found.z)


def bad(**changes):
    good = {
        "weight": weights(16, 32, 0),
        "structure": SS1Structure.create(32, 16, 2),
        "bias": torch.zeros(16),
        "statistics": statistics_from(inputs(64, 32, 0)),
        "name": "block.3.query",
    }
    return good | changes


def poisoned(tensor: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


NAN, INF = float("nan"), float("inf")
SINGULAR = InputStatistics(5, torch.zeros(32).double(), -torch.eye(32).double())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"weight": poisoned(weights(16, 32, 0), (3, 4), NAN)},
            ProjectionError,
            r"\[3, 4\] is nan",
        ),
        ({"weight": poisoned(weights(16, 32, 0), (0, 0), -INF)}, ProjectionError, "is -inf"),
        ({"weight": weights(32, 16, 0)}, ProjectionError, r"\[32, 16\].*transpose"),
        ({"weight": weights(16, 31, 0)}, ProjectionError, r"needs \[16, 32\]"),
        ({"weight": torch.zeros(16, 32, dtype=torch.int8)}, ProjectionError, "torch.int8; convert"),
        ({"weight": torch.zeros(16, 32, dtype=torch.complex64)}, ProjectionError, "complex64"),
        ({"weight": torch.zeros(16, 32, dtype=torch.float8_e4m3fn)}, ProjectionError, "float8"),
        ({"weight": torch.zeros(16, 32, device="meta")}, ProjectionError, "meta"),
        ({"weight": [[1.0]]}, ProjectionError, "weight must be a tensor, got list"),
        ({"bias": torch.zeros(15)}, ProjectionError, r"bias is \[15\]"),
        ({"bias": poisoned(torch.zeros(16), (2,), INF)}, ProjectionError, r"bias\[2\] is inf"),
        ({"bias": torch.zeros(16, dtype=torch.int64)}, ProjectionError, "bias is torch.int64"),
        ({"bias": torch.zeros(16, device="meta")}, ProjectionError, "bias is on the meta device"),
        ({"statistics": statistics_from(inputs(64, 31, 0))}, ProjectionError, "31 features"),
        (
            {"statistics": statistics_from(poisoned(inputs(64, 32, 0), (0, 0), NAN))},
            ProjectionError,
            "mean is not finite; calibrate again",
        ),
        (
            {"statistics": InputStatistics(0, torch.zeros(32).double(), torch.eye(32).double())},
            ProjectionError,
            "count is 0",
        ),
        (
            {"statistics": InputStatistics(3, torch.zeros(32), torch.eye(32))},
            ProjectionError,
            "mean must be a float64",
        ),
        ({"statistics": SINGULAR, "bias": None}, ProjectionError, "singular at slot"),
        ({"statistics": None, "method": "calibrated"}, CalibrationError, "calibrate"),
        ({"method": "median"}, ConfigError, "median"),
        ({"damping": -1.0}, ConfigError, "damping"),
        ({"damping": NAN}, ConfigError, "damping"),
    ],
)
def test_bad_input_is_named(changes, error, words):
    arguments = bad(**changes)
    with pytest.raises(error, match=words) as caught:
        project(**arguments)
    assert "block.3.query" in str(caught.value)


def test_singular_statistics_ask_for_damping():
    x = inputs(4, 32, 0)
    arguments = bad(statistics=statistics_from(x - x), bias=None)
    assert isinstance(project(**arguments), Projection)  # nothing comes in: the average
    direction = inputs(1, 32, 1)[0]
    broken = InputStatistics(9, torch.zeros(32).double(), torch.outer(direction, direction))
    with pytest.raises(ProjectionError, match=r"block\.3\.query.*raise damping"):
        project(**bad(statistics=broken, damping=0.0))
    assert project(**bad(statistics=broken, damping=1e-3)).error < 1


def test_half_precision_overflow_is_named():
    # A feature that hardly varies is tied to one that does, with opposite, huge weights
    structure = SS1Structure.create(16, 8, 2, block_k=8, num_hashes=1, signed=False)
    base = torch.full((8, 16), 6e4, dtype=torch.float16)
    h = torch.eye(16, dtype=torch.float64)
    slots = dense_sketches(structure)[0].argmax(1)
    a, b = (slots == 0).nonzero().flatten().tolist()
    base[:, b] = -6e4
    h[b, b], h[a, b], h[b, a] = 0.4, -0.6, -0.6
    statistics = InputStatistics(9, torch.zeros(16, dtype=torch.float64), h)
    with pytest.raises(ProjectionError, match=r"mlp: z leaves the range.*bfloat16"):
        project(base, structure, statistics=statistics, damping=0.0, name="mlp")
    assert torch.isfinite(
        project(base.bfloat16(), structure, statistics=statistics, damping=0.0).z
    ).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    structure = SS1Structure.create(320, 130, 4)
    weight, bias = weights(130, 320, 0).to(dtype), weights(130, 1, 0)[:, 0].to(dtype)
    statistics = statistics_from(inputs(900, 320, 0))
    cpu = project(weight, structure, bias, statistics=statistics)
    cuda = project(weight.cuda(), structure, bias.cuda(), statistics=statistics)
    assert cuda.z.is_cuda
    assert cuda.bias.is_cuda
    assert cuda.error == pytest.approx(cpu.error, rel=1e-6)
    torch.testing.assert_close(cuda.z.cpu(), cpu.z)
    torch.testing.assert_close(cuda.bias.cpu(), cpu.bias)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("n", "k"), [(14336, 4096), (4096, 14336)])
def test_llama_sizes_take_seconds_and_bounded_memory(n, k):
    structure = SS1Structure.create(k, n, 4)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2 * k, k, device="cuda", dtype=torch.float64)
    statistics = InputStatistics(2 * k, x.mean(0), x.t() @ x / len(x))
    del x
    project(weight, structure, statistics=statistics)  # loads the libraries
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    found = project(weight, structure, statistics=statistics)
    end.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(end) / 1000
    extra = torch.cuda.max_memory_allocated() - held
    print(f"{n}x{k}: {seconds:.2f} s, {extra / 2**30:.2f} GiB, error {found.error:.4f}")
    assert seconds < 30
    assert extra < 8 * (k * k + 4 * k * structure.reduced_features) + 8 * 2**28
