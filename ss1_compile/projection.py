"""From a dense weight ``W [N, K]`` to the ``z [N, K_c]`` that takes its place.

Both methods work per column block j with ``S_j [K, K_c]``, the sketch as a matrix
(``Ŵ_j = z_j S_jᵀ``), which is never formed:

* ``average`` (SS1, NeurIPS 2024): ``z_j = W_j S_j (S_jᵀ S_j)⁻¹``, the signed mean of tied weights.
* ``calibrated``: ``z_j = W_j H S_j (S_jᵀ H S_j)⁻¹``, the least-squares solution of
  ``min E‖(W_j - z_j S_jᵀ) x‖²`` for the second moment H of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.errors import CalibrationError, ConfigError, ProjectionError
from ss1_compile.kernels import layout
from ss1_compile.statistics import InputStatistics
from ss1_compile.structure import SS1Structure

Method = Literal["average", "calibrated"]

_METHODS = ("average", "calibrated")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK_ELEMENTS = 2**25  # rows of W are taken in float64 copies of at most 256 MiB


@dataclass(frozen=True, eq=False)
class Projection:
    """The result of :func:`project`.

    Attributes:
        z: ``[N, K_c]``, in the weight's dtype and on its device: what the layer stores.
        bias: ``[N]``, corrected for the mean input where statistics exist; ``None`` if the layer
            has none.
        error: relative error, at least 0, measured on this z.
        error_of: ``"output"``: ``sqrt(E‖Δy‖² / E‖y - E[y]‖²)`` over the calibration inputs (not
            centred without a bias); ``"weight"``: ``‖W - Ŵ‖ / ‖W‖``.
        method: the method that made z.
    """

    z: Tensor
    bias: Tensor | None
    error: float
    error_of: Literal["output", "weight"]
    method: Method


def project(
    weight: Tensor,
    structure: SS1Structure,
    bias: Tensor | None = None,
    *,
    statistics: InputStatistics | None = None,
    method: Method | None = None,
    damping: float = 1e-3,
    name: str = "weight",
) -> Projection:
    """Project ``weight`` onto ``structure``.

    With statistics, H is ``E[x xᵀ]``, or the covariance of x if there is a bias: the bias then
    absorbs the mean error, ``b + (W - Ŵ) E[x]``, whatever the method. The calibrated solve uses
    ``H + damping · mean(diag H) · I``; the reported error ``sqrt(tr(E H Eᵀ) / tr(W H Wᵀ))``,
    ``E = W - Ŵ``, the undamped H.

    A weight that has the structure already (always so at c = 1) is recovered exactly by both
    methods, whatever H is: the solve is for the correction of the average, and that is zero.

    Everything stays on the weight's device. Memory beside the operands, in float64: with
    statistics at most one ``[K, K]``, one ``[K, K_c]`` and its transpose, two ``[K_c, K_c]``, and
    in all cases a handful of row blocks of W of at most 256 MiB (or one row) each. Work:
    ``O(N K² + J K K_c²/c)``; column blocks of equal hash are solved together.

    Args:
        weight: ``[N, K]``, float16, bfloat16, float32 or float64.
        structure: fits ``[N, K]``.
        bias: ``[N]`` or ``None``, any of the same dtypes.
        statistics: of the inputs ``[K]`` of this weight.
        method: ``None`` means calibrated with statistics and average without.
        damping: ridge relative to the mean of ``diag(H)``, at least 0.
        name: of the layer, for messages.

    Raises:
        ProjectionError: an operand has a wrong shape, dtype or device or is not finite, z leaves
            the range of the weight's dtype, or ``S_jᵀ H S_j`` is singular after damping.
        CalibrationError: ``"calibrated"`` without statistics.
        ConfigError: an unknown method or a negative or infinite damping.
    """
    if method is None:
        method = "average" if statistics is None else "calibrated"
    if method not in _METHODS:
        raise ConfigError(f"{name}: method must be one of {_METHODS}, got {method!r}")
    if not (isinstance(damping, int | float) and 0 <= damping < math.inf):
        raise ConfigError(f"{name}: damping must be a finite number of at least 0, got {damping!r}")
    if method == "calibrated" and statistics is None:
        raise CalibrationError(
            f"{name}: the calibrated projection needs input statistics; run "
            f"ss1_compile.calibrate(model, data) first, or use projection='average'"
        )
    _check_operands(name, weight, structure, bias, statistics)

    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return _project(weight, structure, bias, statistics, method, damping, name)


def _project(
    weight: Tensor,
    structure: SS1Structure,
    bias: Tensor | None,
    statistics: InputStatistics | None,
    method: Method,
    damping: float,
    name: str,
) -> Projection:
    moment = None if statistics is None else _second_moment(statistics, bias is not None, weight)
    code = structure.code.to(weight.device)
    z = weight.new_empty(structure.out_features, structure.reduced_features)
    lost = torch.zeros((), dtype=torch.float64, device=weight.device)
    whole = torch.zeros_like(lost)
    shift = lost.new_zeros(structure.out_features)
    mean = None if statistics is None else statistics.mean.to(weight.device)

    for j, rows in _blocks_by_hash(structure):
        block = _Block(code[j : j + 1], structure, name)
        for index in _row_chunks(rows, structure.in_features, weight.device):
            w = weight.index_select(0, index).double()
            z_rows = block.average(w)
            if method == "calibrated":
                assert moment is not None
                z_rows += block.correction(w - block.materialize(z_rows), moment, damping)
            stored = z_rows.to(weight.dtype)
            z[index] = stored
            e = w - block.materialize(stored.double())
            lost += _energy(e, moment)
            whole += _energy(w, moment)
            if mean is not None:
                shift[index] = e @ mean

    if not bool(torch.isfinite(z).all()):
        raise ProjectionError(
            f"{name}: z leaves the range of {weight.dtype}; convert the layer to bfloat16 or "
            f"float32, or raise damping"
        )
    if bias is not None:
        bias = bias.detach().clone() if mean is None else (bias.double() + shift).to(bias.dtype)
    ratio = (lost.clamp(min=0) / whole).item() if whole.item() > 0 else 0.0
    error_of: Literal["output", "weight"] = "weight" if moment is None else "output"
    return Projection(z, bias, math.sqrt(ratio), error_of, method)


class _Block:
    """The sketch with one hash, applied from the right: ``A S`` and ``z Sᵀ``, all float64."""

    def __init__(self, code: Tensor, structure: SS1Structure, name: str) -> None:
        self._code, self._name = code, name
        self._reduced = structure.reduced_features
        slots, signs = layout.target_slots(code, self._reduced, structure.in_features)
        self._slots, self._signs = slots[0], signs[0].double()
        # columns that are padding fall into slots too, and are not counted
        self._counts = torch.bincount(self._slots, minlength=self._reduced).double()
        self._solver: tuple[Tensor, Tensor] | None = None

    def average(self, w: Tensor) -> Tensor:
        """``W S (Sᵀ S)⁻¹ [M, K_c]``; 0 in slots without a source."""
        return self._sketch(w) / self._counts.clamp(min=1)

    def materialize(self, z: Tensor) -> Tensor:
        """``z Sᵀ [M, K]``."""
        return z.index_select(1, self._slots).mul_(self._signs)

    def correction(self, residual: Tensor, moment: Tensor, damping: float) -> Tensor:
        """``R H S (Sᵀ H S)⁻¹ [M, K_c]`` with damped H, for the residual R of the average.

        ``R S = 0``, so the ridge adds nothing to ``R H S`` in exact arithmetic.
        """
        if not bool(residual.any()):
            return residual.new_zeros(residual.shape[0], self._reduced)
        if self._solver is None:
            self._solver = self._factorize(moment, damping)
        moment_sketch, factor = self._solver
        return torch.cholesky_solve((residual @ moment_sketch).t(), factor).t()

    def _factorize(self, moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """``H S [K, K_c]`` and the lower Cholesky factor of ``Sᵀ (H + λI) S``."""
        moment_sketch = self._sketch(moment)
        gram = self._sketch(moment_sketch.t().contiguous())
        scale = moment.diagonal().mean()
        ridge = damping * scale * self._counts
        # A slot without a source has a zero row; a layer whose inputs never vary keeps the average.
        free = (self._counts == 0) | (scale <= 0)
        gram.diagonal().add_(torch.where(free, 1.0, ridge))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed) != 0:
            raise ProjectionError(
                f"{self._name}: the input statistics are singular at slot {int(failed) - 1} of "
                f"{self._reduced} with damping = {damping}; raise damping (1e-3 is usual) or "
                f"calibrate on more data"
            )
        return moment_sketch, factor

    def _sketch(self, rows: Tensor) -> Tensor:
        sketched: Tensor = torch.ops.ss1.sketch(rows, self._code, self._reduced)
        return sketched[0]


def _energy(rows: Tensor, moment: Tensor | None) -> Tensor:
    """``tr(R H Rᵀ)``, or ``‖R‖²`` without H."""
    return (rows.square() if moment is None else (rows @ moment).mul_(rows)).sum()


def _second_moment(statistics: InputStatistics, centred: bool, weight: Tensor) -> Tensor:
    if not centred:
        return statistics.second_moment.to(weight.device)
    return statistics.covariance().to(weight.device)


def _blocks_by_hash(structure: SS1Structure) -> Iterator[tuple[int, list[range]]]:
    """A column block j per distinct hash, with the rows of all blocks that have the same."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for j, code in enumerate(structure.code.flatten(1).tolist()):
        alike.setdefault(tuple(code), []).append(j)
    width, end = structure.block_n, structure.out_features
    for blocks in alike.values():
        yield blocks[0], [range(j * width, min((j + 1) * width, end)) for j in blocks]


def _row_chunks(rows: list[range], columns: int, device: torch.device) -> tuple[Tensor, ...]:
    index = torch.cat([torch.arange(r.start, r.stop, device=device) for r in rows])
    chunks: tuple[Tensor, ...] = index.split(max(1, _CHUNK_ELEMENTS // columns))
    return chunks


def _check_operands(
    name: str,
    weight: Tensor,
    structure: SS1Structure,
    bias: Tensor | None,
    statistics: InputStatistics | None,
) -> None:
    shape = [structure.out_features, structure.in_features]
    for what, tensor, wanted in (("weight", weight, shape), ("bias", bias, shape[:1])):
        if tensor is None and what == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise ProjectionError(f"{name}: {what} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise ProjectionError(
                f"{name}: {what} is {tensor.dtype}; convert it to one of "
                f"{', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}"
            )
        if list(tensor.shape) != wanted:
            raise ProjectionError(
                f"{name}: {what} is {list(tensor.shape)}, the structure needs {wanted}"
                + ("; transpose it" if list(tensor.shape) == wanted[::-1] != wanted else "")
            )
        if tensor.is_meta:
            raise ProjectionError(f"{name}: {what} is on the meta device; load its values first")
        if tensor.device != weight.device:
            raise ProjectionError(
                f"{name}: {what} is on {tensor.device}, the weight on {weight.device}; move one"
            )
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            at = (~finite).nonzero()[0].tolist()
            raise ProjectionError(
                f"{name}: {what}{at} is {tensor[tuple(at)].item()}; repair the checkpoint or "
                f"exclude the layer"
            )
    if statistics is None:
        return
    problem = statistics.problem()
    if problem is None and statistics.in_features != structure.in_features:
        problem = f"{statistics.in_features} features, the weight has {structure.in_features}"
    if problem is not None:
        raise ProjectionError(f"{name}: input statistics: {problem}; calibrate again")
