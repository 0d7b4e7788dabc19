"""Which kernels run a layer: a table measured on the device, a cost model where it has no row.

A *lowering* is one of

==============  ==================================================================================
``library``     sketch kernel, then ``bmm`` into the strided output (``mm``/``addmm`` for J = 1)
``triton``      sketch kernel, then the Triton grouped GEMM with the bias in its epilogue
``stream``      M <= 64: sketch kernel, then z streamed once with split K
``gemv``        M = 1, rotation: one kernel
==============  ==================================================================================

The table is data (``tables/<device>.json``, written by ``python -m ss1_compile.kernels.tune``) and
holds, per layer and M bucket, the microseconds of every lowering and of the dense layer. Choosing
is a pure, cached function of shapes and the device's name, so a compiler can call it without the
device, and nothing is timed when a layer runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

NAMES = ("library", "triton", "stream", "gemv")
FEW_ROWS = 64
_TABLES = Path(__file__).parent / "tables"
_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 8192, 16384, 32768)
_override: ContextVar[str | None] = ContextVar("ss1_lowering", default=None)


@dataclass(frozen=True, slots=True)
class Layer:
    """Everything a choice depends on.

    Attributes:
        rows: M, all leading dimensions of x flattened.
        in_features: K.
        out_features: N.
        reduced_features: K_c.
        hashes: J, column blocks.
        kind: ``"rotation"`` or ``"learned"``.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        bias: whether the layer adds a bias.
        tma: whether the operands suit the Triton GEMM (16-bit, rows of whole 16-byte units).
    """

    rows: int
    in_features: int
    out_features: int
    reduced_features: int
    hashes: int
    kind: str
    dtype: str = "bfloat16"
    bias: bool = False
    tma: bool = True

    @property
    def key(self) -> str:
        """The table's key, without rows: one entry per layer."""
        bias = "+bias" if self.bias else ""
        return (
            f"{self.kind} {self.dtype} {self.in_features}->{self.out_features}"
            f" Kc={self.reduced_features} J={self.hashes}{bias}"
        )

    def candidates(self) -> tuple[str, ...]:
        """Lowerings that can run this layer."""
        if self.rows <= FEW_ROWS:
            few = ("gemv",) if self.rows == 1 and self.kind == "rotation" else ()
            return (*few, "stream", "library")
        return ("library", "triton") if self.tma else ("library",)


@dataclass(frozen=True)
class Profile:
    """A device: two ceilings for the cost model, and the measured table.

    Attributes:
        name: as ``torch.cuda.get_device_name`` gives it.
        copy_tb_s: device copy, bytes read plus bytes written.
        matmul_tflop_s: a large 16-bit matrix product through the library.
        rows: ``{layer key: {M: {lowering or "dense": microseconds}}}``.
        origin: versions and date of the measurement.
    """

    name: str
    copy_tb_s: float
    matmul_tflop_s: float
    rows: Mapping[str, Mapping[int, Mapping[str, float]]] = field(default_factory=dict, hash=False)
    origin: str = ""


@dataclass(frozen=True)
class Choice:
    """What runs, and what it is expected to cost.

    Attributes:
        lowering: one of ``NAMES``.
        microseconds: expected time of the layer.
        dense_microseconds: expected time of the dense layer.
        measured: whether both come from the table and not from the cost model.
    """

    lowering: str
    microseconds: float
    dense_microseconds: float
    measured: bool

    @property
    def speedup(self) -> float:
        """Over the dense layer; below 1 the layer is better left dense for speed."""
        return self.dense_microseconds / self.microseconds


# Used for a device without a table: an A100-class GPU, on which the order of the candidates, not
# the times, matters.
_UNKNOWN = Profile("unknown", copy_tb_s=1.4, matmul_tflop_s=250.0)


def file_name(device_name: str) -> str:
    """The table's file name for a device: ``NVIDIA H200`` to ``nvidia_h200.json``."""
    return "_".join(device_name.lower().replace("-", " ").split()) + ".json"


@lru_cache
def profile(device_name: str) -> Profile:
    """The shipped profile of a device, or a generic one where none was measured."""
    path = _TABLES / file_name(device_name)
    if not path.is_file():
        return _UNKNOWN
    raw = json.loads(path.read_text())
    rows = {
        key: MappingProxyType({int(m): MappingProxyType(us) for m, us in by_rows.items()})
        for key, by_rows in raw["rows"].items()
    }
    return Profile(
        name=raw["device"],
        copy_tb_s=raw["copy_tb_s"],
        matmul_tflop_s=raw["matmul_tflop_s"],
        rows=MappingProxyType(rows),
        origin=raw["origin"],
    )


def bucket(rows: int) -> int:
    """The smallest measured M that is at least ``rows`` (the largest one beyond)."""
    return next((m for m in _BUCKETS if rows <= m), _BUCKETS[-1])


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def dense_cost(layer: Layer, device: Profile) -> float:
    """Microseconds of the dense layer: the larger of arithmetic and traffic, plus a launch."""
    m, n, k = layer.rows, layer.out_features, layer.in_features
    traffic = (m * k + n * k + m * n) * _width(layer.dtype) / device.copy_tb_s / 1e6
    arithmetic = 2.0 * m * n * k / device.matmul_tflop_s / 1e6
    return _launch(layer) + max(arithmetic / 0.85, traffic / 0.80)


def _launch(layer: Layer) -> float:
    """Microseconds that one more kernel costs; many rows are timed with a cold L2."""
    return 2.5 if layer.rows <= FEW_ROWS else 4.0


def cost(layer: Layer, lowering: str, device: Profile) -> float:
    """Microseconds that the cost model expects of ``lowering``.

    The factors are the fractions of the two ceilings that the kernels reach on an H200: 0.88 of
    copy bandwidth for a sketch, 0.70 for a stream of z, 0.80 for the traffic of a GEMM, 0.85 of a
    large product's rate.
    """
    m, n, k, kc, j = (
        layer.rows,
        layer.out_features,
        layer.in_features,
        layer.reduced_features,
        layer.hashes,
    )
    width, bandwidth = _width(layer.dtype), device.copy_tb_s * 1e6
    sketched = j * m * kc * width
    weights = n * kc * width
    output = m * n * width
    if lowering == "gemv":
        return _launch(layer) + weights / bandwidth / 0.75 + n / 4096
    sketching = _launch(layer) - 1.0 + (m * k * width + sketched) / bandwidth / 0.88
    if lowering == "stream":
        return _launch(layer) + sketching + (weights + sketched + output) / bandwidth / 0.70
    arithmetic = 2.0 * m * n * kc / device.matmul_tflop_s / 1e6
    traffic = (sketched + weights + output) / bandwidth / 0.80
    product = 1.0 + _launch(layer) + max(arithmetic / 0.85, traffic)
    if lowering == "triton":
        return sketching + 0.5 + 1.04 * product
    if layer.bias and j > 1:
        product += 1.5 + 2 * output / bandwidth
    if layer.out_features % j:
        product += 4.0 * j
    return sketching + product


@lru_cache(maxsize=4096)
def choose_product(layer: Layer, passes: float, device_name: str) -> str:
    """The lowering of a product ``X̃ zᵀ`` whose sketch is there already.

    Args:
        layer: its sizes; the kind of sketch and K are not looked at.
        passes: how often M·N values are read or written by what the library's product leaves to
            a further kernel: activation, residual, and for J > 1 the bias.
        device_name: as ``torch.cuda.get_device_name`` gives it.

    Returns:
        ``"stream"`` for few rows, else ``"triton"`` or ``"library"``. With the table's row for
        these sizes the two differ by what they differ there, sketch included.
    """
    if layer.rows <= FEW_ROWS:
        return "stream"
    if not layer.tma:
        return "library"
    device = profile(device_name)
    plain = replace(layer, bias=layer.bias and passes == 0)
    difference = _measured_difference(plain, device_name)
    if difference is None:
        difference = cost(plain, "triton", device) - cost(plain, "library", device)
    output = layer.rows * layer.out_features * _width(layer.dtype)
    further = passes * output / device.copy_tb_s / 1e6 + (_launch(layer) - 1.0 if passes else 0.0)
    return "triton" if difference < further else "library"


def _measured_difference(layer: Layer, device_name: str) -> float | None:
    """Microseconds of ``triton`` over ``library`` in the table, whatever the sketch's kind."""
    dtype = "float32" if layer.dtype == "float32" else "bfloat16"
    bias = "+bias" if layer.bias else ""
    end = f"->{layer.out_features} Kc={layer.reduced_features} J={layer.hashes}{bias}"
    for key, by_rows in profile(device_name).rows.items():
        _, known_dtype, sizes = key.split(" ", 2)
        if known_dtype == dtype and sizes.endswith(end):
            row = by_rows.get(bucket(layer.rows), {})
            if "triton" in row and "library" in row:
                return row["triton"] - row["library"]
    return None


def expected(layer: Layer, device_name: str) -> Choice:
    """The best lowering and whether it beats the dense layer; see :class:`Choice`."""
    return _expected(layer, device_name, bucket(layer.rows))


@lru_cache(maxsize=4096)
def _expected(layer: Layer, device_name: str, rows_bucket: int) -> Choice:
    device = profile(device_name)
    candidates = layer.candidates()
    # float16 has bfloat16's sizes and rates
    known_as = replace(layer, dtype="bfloat16") if layer.dtype == "float16" else layer
    row = device.rows.get(known_as.key, {}).get(rows_bucket)
    if row is not None:
        known = {name: row[name] for name in candidates if name in row}
        if known:
            best = min(known, key=known.__getitem__)
            return Choice(best, known[best], row["dense"], measured=True)
    costs = {name: cost(layer, name, device) for name in candidates}
    best = min(costs, key=costs.__getitem__)
    return Choice(best, costs[best], dense_cost(layer, device), measured=False)


def choose(layer: Layer, device_name: str) -> str:
    """The lowering to run: the override if it can run this layer, else the expected best."""
    return _choose(layer, device_name, _override.get())


@lru_cache(maxsize=4096)
def _choose(layer: Layer, device_name: str, forced: str | None) -> str:
    if forced is not None and forced in layer.candidates():
        return forced
    return expected(layer, device_name).lowering


def beats_dense(layer: Layer, device_name: str) -> bool:
    """Whether some lowering is expected to be faster than the dense layer."""
    return expected(layer, device_name).speedup > 1.0


@contextmanager
def override(name: str | None) -> Iterator[None]:
    """Run every layer that can with the lowering ``name`` inside the ``with`` block.

    Raises:
        ValueError: for a name that is not a lowering.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"no lowering {name!r}; choose from {', '.join(NAMES)}")
    token = _override.set(name)
    _tell()
    try:
        yield
    finally:
        _override.reset(token)
        _tell()


def forced() -> str | None:
    """The lowering that :func:`override` has put in force here, if any."""
    return _override.get()


_followers: list[Callable[[str | None], object]] = []


def follow(told: Callable[[str | None], object]) -> None:
    """Tell ``told`` which override is in force, now and where a thread enters or leaves one."""
    _followers.append(told)
    told(_override.get())


def _tell() -> None:
    for told in _followers:
        told(_override.get())
