"""From a dense weight ``W [N, K]`` to the ``z [N, K_c]`` that takes its place.

All methods work per column block j with ``S_j [K, K_c]``, the sketch as a matrix
(``Ŵ_j = z_j S_jᵀ``), which is never formed:

* ``average`` (SS1, NeurIPS 2024): ``z_j = W_j S_j (S_jᵀ S_j)⁻¹``, the signed mean of tied weights.
* ``calibrated``: ``z_j = W_j H S_j (S_jᵀ H S_j)⁻¹``, the least-squares solution of
  ``min E‖(W_j - z_j S_jᵀ) x‖²`` for the second moment H of the inputs.
* ``learned``: the same, minimised over the blocks of S_j too (:mod:`ss1_compile.learned_fit`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ss1_compile.errors import CalibrationError, ConfigError, ProjectionError
from ss1_compile.learned import LearnedStructure, Structure
from ss1_compile.learned_fit import LearnedFit
from ss1_compile.rotation_fit import RotationFit
from ss1_compile.statistics import InputStatistics
from ss1_compile.structure import SS1Structure

Method = Literal["average", "calibrated", "learned"]

_METHODS = ("average", "calibrated", "learned")
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
        sketch: the operator's sketch operand on z's device: int32 ``[J, G, c]``, or learned blocks
            ``[J, G, gsize, r]`` in z's dtype.
    """

    z: Tensor
    bias: Tensor | None
    error: float
    error_of: Literal["output", "weight"]
    method: Method
    sketch: Tensor


def project(
    weight: Tensor,
    structure: Structure,
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

    A weight that has a rotation structure already (always so at c = 1) is recovered exactly,
    whatever H is: the solve is for the correction of the average, and that is zero. One that has
    the learned structure is recovered to rounding.

    Everything stays on the weight's device. Memory beside the operands, in float64: with
    statistics at most one ``[K, K]`` (two for a learned structure), two ``[K, K_c]``, three
    ``[K_c, K_c]``, and in all cases a handful of row blocks of W of at most 256 MiB (or one row)
    each. Work: ``O(N K² + J K K_c²/c)`` for a rotation, column blocks of equal hash being solved
    together; a learned structure takes that for each of its at most 6 sweeps.

    Args:
        weight: ``[N, K]``, float16, bfloat16, float32 or float64.
        structure: fits ``[N, K]``.
        bias: ``[N]`` or ``None``, any of the same dtypes.
        statistics: of the inputs ``[K]`` of this weight.
        method: of a rotation structure; ``None`` and ``"learned"`` mean calibrated with statistics
            and average without. A learned structure is always fitted.
        damping: ridge relative to the mean of ``diag(H)``, at least 0.
        name: of the layer, for messages.

    Raises:
        ProjectionError: an operand has a wrong shape, dtype or device or is not finite, z leaves
            the range of the weight's dtype, or ``S_jᵀ H S_j`` is singular after damping.
        CalibrationError: ``"calibrated"`` without statistics.
        ConfigError: an unknown method or a negative or infinite damping.
    """
    if method not in (None, *_METHODS):
        raise ConfigError(f"{name}: method must be one of {_METHODS}, got {method!r}")
    if isinstance(structure, LearnedStructure):
        method = "learned"
    elif method in (None, "learned"):
        method = "average" if statistics is None else "calibrated"
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
    structure: Structure,
    bias: Tensor | None,
    statistics: InputStatistics | None,
    method: Method,
    damping: float,
    name: str,
) -> Projection:
    moment = None if statistics is None else _second_moment(statistics, bias is not None, weight)
    z = weight.new_empty(structure.out_features, structure.reduced_features)
    if isinstance(structure, SS1Structure):
        sketch = structure.code.to(weight.device, copy=True)
    else:
        sketch = weight.new_empty(structure.sketch_shape)
    lost = torch.zeros((), dtype=torch.float64, device=weight.device)
    whole = torch.zeros_like(lost)
    shift = lost.new_zeros(structure.out_features)
    mean = None if statistics is None else statistics.mean.to(weight.device)

    for j, rows in _blocks_by_hash(structure):
        chunks = _row_chunks(rows, structure.in_features, weight.device)
        fit: RotationFit | LearnedFit
        if isinstance(structure, SS1Structure):
            used = None if method == "average" else moment
            fit = RotationFit(sketch[j : j + 1], structure, used, damping, name)
        else:
            fit = LearnedFit(structure, moment, damping, name)
            for index in chunks:
                fit.add(weight.index_select(0, index).double())
            sketch[j] = fit.fit(weight.dtype)
        for index in chunks:
            w = weight.index_select(0, index).double()
            stored = fit.solve(w).to(weight.dtype)
            z[index] = stored
            e = w - fit.materialize(stored.double())
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
    return Projection(z, bias, math.sqrt(ratio), error_of, method, sketch)


def _blocks_by_hash(structure: Structure) -> Iterator[tuple[int, list[range]]]:
    """A column block j per distinct hash, with the rows of all blocks that have the same."""
    alike: dict[Any, list[int]] = {}
    keys: Iterable[Any] = range(structure.num_hashes)
    if isinstance(structure, SS1Structure):
        keys = map(tuple, structure.code.flatten(1).tolist())
    for j, key in enumerate(keys):
        alike.setdefault(key, []).append(j)
    width, end = structure.block_n, structure.out_features
    for blocks in alike.values():
        yield blocks[0], [range(j * width, min((j + 1) * width, end)) for j in blocks]


def _energy(rows: Tensor, moment: Tensor | None) -> Tensor:
    """``tr(R H Rᵀ)``, or ``‖R‖²`` without H."""
    return (rows.square() if moment is None else (rows @ moment).mul_(rows)).sum()


def _second_moment(statistics: InputStatistics, centred: bool, weight: Tensor) -> Tensor:
    if not centred:
        return statistics.second_moment.to(weight.device)
    return statistics.covariance().to(weight.device)


def _row_chunks(rows: list[range], columns: int, device: torch.device) -> tuple[Tensor, ...]:
    index = torch.cat([torch.arange(r.start, r.stop, device=device) for r in rows])
    chunks: tuple[Tensor, ...] = index.split(max(1, _CHUNK_ELEMENTS // columns))
    return chunks


def _check_operands(
    name: str,
    weight: Tensor,
    structure: Structure,
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
