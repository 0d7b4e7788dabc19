"""From a dense weight ``W [N, K]`` to the ``z [N, K_c]`` that takes its place.

All methods work per column block j with ``S_j [K, K_c]``, the sketch as a matrix
(``Ŵ_j = z_j S_jᵀ``), which is never formed:

* ``average`` (SS1, NeurIPS 2024): ``z_j = W_j S_j (S_jᵀ S_j)⁻¹``, the signed mean of tied weights.
* ``calibrated``: ``z_j = W_j H S_j (S_jᵀ H S_j)⁻¹``, the least-squares solution of
  ``min E‖(W_j - z_j S_jᵀ) x‖²`` for the second moment H of the inputs.
* ``learned``: the same, minimised over the blocks of S_j too
  (:mod:`ss1_compile.projection.learned_fit`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.errors import CalibrationError, ConfigError, ProjectionError
from ss1_compile.learned import LearnedStructure, Structure
from ss1_compile.projection.fitting import (
    DAMPING,
    Chosen,
    Method,
    Weight,
    best_fit,
    choose,
    corrected,
)
from ss1_compile.projection.learned_fit import LearnedFit
from ss1_compile.projection.shortfall import owed_rows
from ss1_compile.projection.weighing import weighed_rows
from ss1_compile.structure import SS1Structure

_METHODS = ("average", "calibrated", "learned")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Projection:
    """The result of :func:`project`.

    Attributes:
        z: ``[N, K_c]``, in the weight's dtype and on its device: what the layer stores.
        bias: ``[N]``, corrected for the mean input where statistics exist; ``None`` if the layer
            has none.
        error: relative error, at least 0, measured on this z.
        error_of: ``"output"``: ``sqrt(E‖Δy‖² / E‖y - E[y]‖²)`` over the calibration inputs (not
            centred without a bias), y the dense model's output where the statistics have a drift;
            ``"weight"``: ``‖W - Ŵ‖ / ‖W‖``.
        method: the method that made z.
        sketch: the operator's sketch operand on z's device: int32 ``[J, G, c]``, or learned blocks
            ``[J, G, gsize, r]`` in z's dtype.
        damping: what was used; not used by ``"average"``.
        asymmetry: α, what was used; 0 where the inputs have not drifted.
    """

    z: Tensor
    bias: Tensor | None
    error: float
    error_of: Literal["output", "weight"]
    method: Method
    sketch: Tensor
    damping: float
    asymmetry: float


def project(
    weight: Tensor,
    structure: Structure,
    bias: Tensor | None = None,
    *,
    statistics: InputStatistics | None = None,
    method: Method | None = None,
    damping: float | Literal["auto"] = DAMPING,
    asymmetry: float | Literal["auto"] = "auto",
    sketch: Tensor | None = None,
    name: str = "weight",
) -> Projection:
    """Project ``weight`` onto ``structure``.

    With statistics, H is ``E[x xᵀ]``, or the covariance of x if there is a bias: the bias then
    absorbs the mean error, ``b + (W - Ŵ) E[x]``, whatever the method. The calibrated solve uses
    ``H + damping · mean(diag H) · I``; the reported error ``sqrt(tr(E H Eᵀ) / tr(W H Wᵀ))``,
    ``E = W - Ŵ``, the undamped H. Where the statistics have a drift (a compressed prefix has
    changed the inputs) the wanted outputs are the dense model's: ``W + α W G H⁻¹`` is projected,
    see :mod:`ss1_compile.projection.target`; and with a shortfall, what makes up for a part of it
    (:mod:`ss1_compile.projection.shortfall`), which the reported error counts as wanted.

    The blocks of a learned structure of one hash are fitted to outputs weighed by what the model
    makes of them where the statistics have gradients (:mod:`ss1_compile.projection.weighing`), and
    so is what "auto" chooses by; the reported error counts all outputs alike.

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
        damping: ridge relative to the mean of ``diag(H)``, at least 0. ``"auto"`` takes that of
            ``DAMPINGS`` with the least output error on the held-out rows of the statistics, and
            1e-3 without any.
        asymmetry: α in 0 … 1, the part of the drift that is made up for. ``"auto"`` takes that with
            the least output error on held-out rows, and ½ without any. No matter without drift.
        sketch: ``[J, G, gsize, r]``, the blocks of a learned structure if they are given and not
            to be fitted (:func:`ss1_compile.projection.shared_sketch.fit_sketch`).
        name: of the layer, for messages.

    Raises:
        StructureError: ``sketch`` does not have the structure's shape.
        ProjectionError: an operand has a wrong shape, dtype or device or is not finite, z leaves
            the range of the weight's dtype, or ``S_jᵀ H S_j`` is singular after damping.
        CalibrationError: ``"calibrated"`` without statistics.
        ConfigError: an unknown method, a negative or infinite damping, or an asymmetry out of
            range.
    """
    if method not in (None, *_METHODS):
        raise ConfigError(f"{name}: method must be one of {_METHODS}, got {method!r}")
    if isinstance(structure, LearnedStructure):
        method = "learned"
    elif method in (None, "learned"):
        method = "average" if statistics is None else "calibrated"
    if damping != "auto" and not (isinstance(damping, int | float) and 0 <= damping < math.inf):
        raise ConfigError(
            f"{name}: damping must be 'auto' or a finite number of at least 0, got {damping!r}"
        )
    if asymmetry != "auto" and not (isinstance(asymmetry, int | float) and 0 <= asymmetry <= 1):
        raise ConfigError(f"{name}: asymmetry must be 'auto' or in 0 … 1, got {asymmetry!r}")
    if method == "calibrated" and statistics is None:
        raise CalibrationError(
            f"{name}: the calibrated projection needs input statistics; run "
            f"ss1_compile.calibrate(model, data) first, or use projection='average'"
        )
    _check_operands(name, weight, structure, bias, statistics)

    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        if sketch is not None:
            structure.check_sketch(sketch)
        layer = Weight(weight, structure, bias is not None, method, name, sketch)
        chosen = None
        if sketch is None and method == "learned" and statistics is not None:
            layer, chosen = _weighed(layer, statistics, damping, asymmetry)
        chosen = chosen or choose(layer, statistics, damping, asymmetry)
        return _project(layer, bias, statistics, chosen)


def _weighed(
    layer: Weight,
    statistics: InputStatistics,
    damping: float | Literal["auto"],
    asymmetry: float | Literal["auto"],
) -> tuple[Weight, Chosen | None]:
    """The layer with blocks fitted to its weighed outputs; as it is where gradients are lacking."""
    structure, gradients = layer.structure, statistics.gradients
    if gradients is None or structure.num_hashes > 1:
        return layer, None
    rows = weighed_rows([layer.weight], [gradients], layer.target(statistics))
    if rows is None:
        return layer, None
    _, chosen, fit = best_fit([replace(layer, weight=rows)], statistics, damping, asymmetry)
    return replace(layer, blocks=fit.blocks.to(layer.weight.dtype).unsqueeze(0)), chosen


def _project(
    layer: Weight,
    bias: Tensor | None,
    statistics: InputStatistics | None,
    chosen: Chosen,
) -> Projection:
    weight, structure = layer.weight, layer.structure
    target = layer.target(statistics)
    owed = None
    if statistics is not None and layer.method != "average":
        owed = owed_rows(layer, statistics, chosen)
    z = weight.new_empty(structure.out_features, structure.reduced_features)
    if isinstance(structure, SS1Structure):
        sketch = structure.code.to(weight.device, copy=True)
    else:
        sketch = weight.new_empty(structure.sketch_shape)
    lost = torch.zeros((), dtype=torch.float64, device=weight.device)
    whole = torch.zeros_like(lost)
    shift = lost.new_zeros(structure.out_features)
    for j, fit, chunks, correction in layer.fits(target, chosen.damping, chosen.asymmetry):
        if isinstance(fit, LearnedFit):
            sketch[j] = fit.blocks.to(weight.dtype)
        for index in chunks:
            w = layer.rows(index)
            more = 0 if owed is None else owed[index]
            stored = fit.solve(corrected(w, correction) + more).to(weight.dtype)
            z[index] = stored
            e = w - fit.materialize(stored.double())
            lost += target.lost(w, e + more)
            whole += target.whole(w)
            mean_error = target.shift(w, e)
            if mean_error is not None:
                lacking = 0 if target.shortfall is None else target.shortfall.mean[index]
                shift[index] = mean_error + lacking
    if not bool(torch.isfinite(z).all()):
        raise ProjectionError(
            f"{layer.name}: z leaves the range of {weight.dtype}; convert the layer to bfloat16 or "
            f"float32, or raise damping"
        )
    if bias is not None:
        known = statistics is not None
        bias = (bias.double() + shift).to(bias.dtype) if known else bias.detach().clone()
    ratio = (lost.clamp(min=0) / whole).item() if whole.item() > 0 else 0.0
    error_of: Literal["output", "weight"] = "weight" if statistics is None else "output"
    return Projection(
        z,
        bias,
        math.sqrt(ratio),
        error_of,
        layer.method,
        sketch,
        chosen.damping,
        chosen.asymmetry,
    )


def check_finite(tensor: Tensor, what: str, name: str) -> None:
    """Raise ``ProjectionError`` unless every entry is finite; ``what`` it is, of which layer."""
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        at = (~finite).nonzero()[0].tolist()
        raise ProjectionError(
            f"{name}: {what}{at} is {tensor[tuple(at)].item()}; repair the checkpoint or "
            f"exclude the layer"
        )


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
        check_finite(tensor, what, name)
    if statistics is None:
        return
    problem = statistics.problem()
    if problem is None and statistics.in_features != structure.in_features:
        problem = f"{statistics.in_features} features, the weight has {structure.in_features}"
    if problem is not None:
        raise ProjectionError(f"{name}: input statistics: {problem}; calibrate again")
