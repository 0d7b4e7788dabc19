import functools
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ss1_compile.kernels import native, portable, reference
from ss1_compile.structure import SS1Structure

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if native._library() is None:
        pytest.skip("no C++ compiler")


@st.composite
def structures(draw):
    reduction = draw(st.integers(1, 9))
    block_k = draw(st.sampled_from([8, 16, 32, 64]))
    in_features = draw(st.integers(max(1, reduction), 3 * reduction * block_k))
    out_features = draw(st.integers(1, 70))
    return SS1Structure.create(
        in_features,
        out_features,
        reduction,
        num_hashes=draw(st.integers(1, 6)),
        block_k=block_k,
        hash_family=draw(st.sampled_from(["independent", "affine"])),
        seed=draw(st.integers(0, 1000)),
    )


def inputs(rows, features, dtype, kind, seed):
    """``[rows, features]`` with NaN in whatever lies beside it in memory."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "contiguous":
        return x
    guarded = torch.full((rows + 2, features + 5), float("nan"), dtype=dtype)
    guarded[1 : rows + 1, 2 : features + 2] = x
    strided = guarded[1 : rows + 1, 2 : features + 2]
    return strided if kind == "rows" else x.t().contiguous().t()


def sketch_matrix(structure):
    """``S [J, K, K_c]`` in float64, from the reference alone: W of ``z = 1`` rows, per hash."""
    identity = torch.eye(structure.reduced_features, dtype=torch.float64)
    columns = [
        reference.materialize(structure.code[j : j + 1], identity, structure.in_features).T
        for j in range(structure.num_hashes)
    ]
    return torch.stack(columns)


def assert_close(actual, expected, scale):
    tolerance = TOLERANCE[actual.dtype] * scale
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


cases = {
    "structure": structures(),
    "rows": st.integers(0, 9),
    "dtype": st.sampled_from(DTYPES),
    "kind": st.sampled_from(["contiguous", "rows", "columns"]),
    "seed": st.integers(0, 1000),
}


@settings(deadline=None, max_examples=60)
@given(**cases)
def test_sketch_and_adjoint(structure, rows, dtype, kind, seed):
    matrix = sketch_matrix(structure)
    x = inputs(rows, structure.in_features, dtype, kind, seed)
    sketched = native.sketch(x, structure.code, structure.reduced_features)
    assert sketched.dtype == dtype
    assert sketched.is_contiguous()
    assert_close(sketched, x.double() @ matrix, structure.reduction)
    assert torch.equal(sketched, portable.sketch(x, structure.code, structure.reduced_features))

    shape = (structure.num_hashes * rows, structure.reduced_features)
    g = inputs(*shape, dtype, kind, seed + 1).unflatten(0, (structure.num_hashes, rows))
    back = native.unsketch(g, structure.code, structure.in_features)
    assert_close(back, (g.double() @ matrix.mT).sum(0), structure.num_hashes)
    assert torch.equal(back, portable.unsketch(g, structure.code, structure.in_features))


@settings(deadline=None, max_examples=60)
@given(**cases, bias=st.booleans())
def test_linear(structure, rows, dtype, kind, seed, bias):
    x = inputs(rows, structure.in_features, dtype, kind, seed)
    shape = (structure.out_features, structure.reduced_features)
    z = inputs(*shape, dtype, kind, seed + 1) / structure.in_features**0.5
    b = inputs(1, structure.out_features, dtype, kind, seed + 2)[0] if bias else None
    y = native.linear(x, structure.code, z, b)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_close(y, reference.linear(x, structure.code, z, b), structure.reduction)
    assert torch.equal(y, native.linear(x, structure.code, z, b))
    torch.testing.assert_close(y, portable.linear(x, structure.code, z, b))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(1, 40)),
    groups=st.integers(1, 3),
    hashes=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["contiguous", "rows", "columns"]),
)
def test_few_rows_of_a_learned_sketch(rows, sizes, groups, hashes, dtype, kind):
    size, rank, columns = sizes
    columns *= hashes  # no empty column block
    features = max(1, groups * size - 3)  # the last group may be ragged
    blocks = torch.randn(hashes, groups, size, rank, dtype=dtype) / size**0.5
    x = inputs(rows, features, dtype, kind, 0)
    z, bias = inputs(columns, groups * rank, dtype, kind, 1), torch.randn(columns).to(dtype)
    y = native.linear(x, blocks, z, bias)
    expected = portable.linear(x.double(), blocks.double(), z.double(), bias.double())
    assert y.dtype == dtype
    assert_close(y, expected, 4 * (groups * rank) ** 0.5)


@pytest.mark.parametrize(
    ("rows", "features", "columns"),
    [(native._TILE_ROWS, 80, 24), (2 * native._TILE_ROWS + 3, 80, 24), (7, 640, 1030)],
)
def test_tiles_and_threads_change_nothing(rows, features, columns):
    structure = SS1Structure.create(features, columns, 3, block_k=16)
    x = torch.randn(rows, features)
    z, bias = torch.randn(columns, structure.reduced_features), torch.randn(columns)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sketched = native.sketch(x, structure.code, structure.reduced_features)
            results.append((sketched, native.linear(x, structure.code, z, bias)))
    finally:
        torch.set_num_threads(before)
    for sketched, y in results:
        assert torch.equal(sketched, results[0][0])
        torch.testing.assert_close(y, reference.linear(x, structure.code, z, bias).float())


@pytest.mark.parametrize("block_k", [8, 12, 20])
def test_any_code_stays_inside_its_chunk(block_k):
    """Codes that no structure allows: multiples of 1, beyond B_K, and the ends of int32."""
    groups, reduction, hashes = 2, 3, 2
    code = torch.randint(-(2**31), 2**31 - 1, (hashes, groups, reduction), dtype=torch.int32)
    code[0, 0] = torch.tensor([2**31 - 1, -(2**31), block_k])
    in_features = groups * reduction * block_k - 5
    x = inputs(4, in_features, torch.float32, "rows", 0)
    sketched = native.sketch(x, code, groups * block_k)
    assert torch.equal(sketched, portable.sketch(x, code, groups * block_k))
    assert torch.isfinite(sketched).all()

    g = inputs(hashes * 4, groups * block_k, torch.float32, "rows", 1).unflatten(0, (hashes, 4))
    back = native.unsketch(g, code, in_features)
    assert torch.equal(back, portable.unsketch(g, code, in_features))
    assert torch.isfinite(back).all()


@pytest.mark.parametrize("rows", [1, 5])
def test_nothing_beyond_the_output_is_written(rows):
    structure = SS1Structure.create(45, 8, 4, block_k=8)  # ragged: 45 of 64 features
    code = structure.code
    shape = (structure.num_hashes, rows + 2, structure.reduced_features + 3)
    guarded = torch.full(shape, 7.0)
    target = guarded[:, 1:-1, 1:-2]
    x = torch.randn(rows, 45)
    native._run(native._kernel("sketch", x.dtype), x, code, target)
    assert torch.equal(target, portable.sketch(x, code, structure.reduced_features))
    target.fill_(7.0)
    assert (guarded == 7.0).all()

    wide = torch.full((rows + 2, 45 + 4), 7.0)
    g = torch.randn(structure.num_hashes, rows, structure.reduced_features)
    native._run(native._kernel("unsketch", g.dtype), wide[1:-1, 1:-3], code, g)
    assert torch.equal(wide[1:-1, 1:-3], portable.unsketch(g, code, 45))
    wide[1:-1, 1:-3] = 7.0
    assert (wide == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    structure = SS1Structure.create(64, 8, 4, block_k=16)
    x = torch.randn(3, 64).to(dtype)
    x[0, 3], x[1, 40], x[2, 0] = float("nan"), float("inf"), torch.finfo(dtype).max
    sketched = native.sketch(x, structure.code, structure.reduced_features)
    expected = portable.sketch(x, structure.code, structure.reduced_features)
    assert torch.equal(torch.isnan(sketched), torch.isnan(expected))
    assert torch.equal(sketched.nan_to_num(), expected.nan_to_num())


def test_bfloat16_rounds_to_nearest_even():
    code = torch.zeros(1, 1, 2, dtype=torch.int32)
    bits = torch.randint(0, 2**15, (512, 16), dtype=torch.int16)
    x = bits.view(torch.bfloat16).nan_to_num().clamp(-1e30, 1e30)
    assert torch.equal(
        native.sketch(x, code, 8)[0], (x[:, :8].float() + x[:, 8:].float()).bfloat16()
    )


def test_first_use_from_many_threads(monkeypatch):
    calls = []

    def load():
        calls.append(threading.get_ident())
        return library

    library = native._library()
    monkeypatch.setattr(native, "_kernel", functools.cache(native._kernel.__wrapped__))
    monkeypatch.setattr(native, "_library", functools.cache(load))
    structure = SS1Structure.create(64, 8, 4)
    x = torch.randn(3, 64)
    expected = portable.sketch(x, structure.code, structure.reduced_features)
    results, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        results.append(native.sketch(x, structure.code, structure.reduced_features))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(calls) == 1
    assert len(results) == 8
    assert all(torch.equal(result, expected) for result in results)


SCRIPT = """
import logging, sys, torch
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(name)s %(message)s")
logging.getLogger("torch").setLevel(logging.WARNING)
import ss1_compile.kernels
from ss1_compile.kernels import native, reference
assert "torch._inductor.codecache" not in sys.modules
code = torch.tensor([[[0, ~8, 8]], [[~0, 0, ~8]]], dtype=torch.int32)
x, z = torch.randn(5, 40), torch.randn(6, 16)
for _ in range(2):
    y = torch.ops.ss1.linear(x, code, z, None)
torch.testing.assert_close(y.double(), reference.linear(x, code, z), rtol=1e-5, atol=1e-5)
print("compiled", native._library() is not None)
"""


def test_without_compiler(tmp_path):
    """The same results, one debug line, and nothing compiled at import."""
    environment = {**os.environ, "CXX": "no-such-c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "compiled False" in run.stdout
    lines = [line for line in run.stdout.splitlines() if "portable CPU kernels" in line]
    assert len(lines) == 1


def test_switched_off(monkeypatch, caplog):
    monkeypatch.setenv("SS1_COMPILE_NATIVE", "0")
    for cached in (native._library, native._kernel):
        monkeypatch.setattr(native, cached.__name__, functools.cache(cached.__wrapped__))
    structure = SS1Structure.create(45, 7, 4, block_k=8)
    x, z = torch.randn(5, 45), torch.randn(7, structure.reduced_features)
    with caplog.at_level("DEBUG", logger=native.logger.name):
        for _ in range(2):
            y = torch.ops.ss1.linear(x, structure.code, z, None)
    assert native._library() is None
    assert [record.getMessage() for record in caplog.records] == [
        "SS1_COMPILE_NATIVE=0: the portable CPU kernels are used"
    ]
    assert torch.equal(y, portable.linear(x, structure.code, z, None))
