"""Project a weight and quantise its z: what the doors call for every layer they compress."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.calibration.statistics import InputStatistics
from ss1_compile.config import LayerQuantization
from ss1_compile.errors import CalibrationError, QuantizationError
from ss1_compile.experts import project_experts
from ss1_compile.kernels import layout, quantized_cuda
from ss1_compile.kernels.quantize import dequantize, quantize_rows
from ss1_compile.learned import Structure
from ss1_compile.modules import SS1Linear
from ss1_compile.projection.project import Projection
from ss1_compile.quantization.balancing import balance
from ss1_compile.quantization.rounding import gptq_round

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class QuantizedProjection(Projection):
    """A projection whose z is quantised; ``error`` is that of the projection alone.

    Attributes:
        z: ``[N, K_c]``, int8 or float8_e4m3fn.
        scale: float32 ``[N, groups]``.
        quantization: how z was quantised.
        quantization_error: what rounding z adds, relative to the layer with z as it was:
            ``sqrt(E‖Δy‖² / E‖y - E[y]‖²)`` over the calibration inputs (not centred without a
            bias), or ``‖ΔŴ‖ / ‖Ŵ‖`` without statistics. That of quantised activations is not in it;
            see :func:`ss1_compile.sensitivity`.
    """

    scale: Tensor
    quantization: LayerQuantization
    quantization_error: float


def project_layer(
    weight: Tensor,
    structure: Structure,
    bias: Tensor | None = None,
    *,
    quantization: LayerQuantization | None = None,
    **options: Any,
) -> Projection:
    """:func:`~ss1_compile.experts.project_experts`, then quantise z if that is asked for.

    With statistics the bias absorbs the mean error of quantisation too. A learned sketch is
    balanced before z is rounded (:mod:`ss1_compile.quantization.balancing`), unless it is given.

    Raises:
        ProjectionError: see :func:`~ss1_compile.projection.project.project`.
        QuantizationError: see :func:`check_quantizable`.
        CalibrationError: ``rounding="calibrated"`` without statistics.
    """
    if quantization is None:
        return project_experts(weight, structure, bias, **options)
    name, statistics = options.get("name", "weight"), options.get("statistics")
    check_quantizable(weight, structure, quantization, name)
    if quantization.rounding == "calibrated" and statistics is None:
        raise CalibrationError(missing_statistics(name))
    projection = project_experts(weight, structure, bias, **options)
    with torch.autocast(weight.device.type, enabled=False):
        if structure.kind == "learned" and options.get("sketch") is None:
            moment = None if statistics is None else statistics.second_moment
            blocks, (z,) = balance([projection.z], projection.sketch, moment)
            projection = replace(projection, z=z, sketch=blocks)
        return quantize_projection(projection, structure, quantization, statistics, name)


def missing_statistics(name: str) -> str:
    """The message for ``rounding="calibrated"`` of a layer without statistics."""
    return (
        f"{name}: rounding='calibrated' needs input statistics, and there are none; pass "
        f"calibration data that reach the layer (or run ss1_compile.calibrate first), or use "
        f"rounding='nearest' for it (overrides)"
    )


def check_quantizable(
    weight: Tensor, structure: Structure, quantization: LayerQuantization, name: str
) -> None:
    """Raise unless the z of a weight ``[N, K]`` can be quantised, and run where the weight is.

    Raises:
        QuantizationError: the weight is that of experts or float64, its K_c is no multiple of the
            group size, or its GPU has no float8.
    """
    if weight.dim() != 2:
        raise QuantizationError(
            f"{name}: its {len(weight)} matrices share one operator, which takes no quantised z; "
            f"leave it as it is with overrides={{{name!r}: {{'quantization': None}}}}"
        )
    if weight.dtype not in _DTYPES:
        raise QuantizationError(
            f"{name}: the weight is {weight.dtype}, and quantised layers compute in float32, "
            f"float16 or bfloat16; convert the model first (model.float())"
        )
    size, reduced = quantization.group_size, structure.reduced_features
    if size is not None and reduced % size:
        raise QuantizationError(
            f"{name}: quantization_group_size = {size} does not divide K_c = {reduced}; choose a "
            f"divisor for it (overrides), or None for one scale per row"
        )
    if not quantized_cuda.has_dtype(quantization.dtype, weight.device):
        raise QuantizationError(
            f"{name}: {quantization.method} needs a GPU of compute capability 8.9 or later, "
            f"{weight.device} is older; use 'int8_dynamic'"
        )


def layer_of(
    projection: Projection,
    structure: Structure,
    bias: nn.Parameter | None,
    trained: bool,
    dtype: torch.dtype,
) -> SS1Linear:
    """The layer that holds a projection's tensors.

    Args:
        projection: of one matrix.
        structure: its structure.
        bias: the layer's, ``[N]``.
        trained: whether z (unless it is quantised) and learned blocks require gradients.
        dtype: of the weight that was projected.
    """
    sketch = projection.sketch if structure.kind == "learned" else None
    if not isinstance(projection, QuantizedProjection):
        z = nn.Parameter(projection.z, trained)
        return SS1Linear.from_tensors(structure, z, bias, sketch)
    blocks = None if sketch is None else nn.Parameter(sketch, trained)
    return SS1Linear.from_tensors(
        structure,
        projection.z,
        bias,
        blocks,
        scale=projection.scale,
        dynamic=projection.quantization.dynamic,
        dtype=dtype,
    )


def report_of(projection: Projection) -> dict[str, Any]:
    """The fields of :class:`ss1_compile.LayerReport` that tell how z is stored."""
    bits = 8 * projection.z.element_size()
    if not isinstance(projection, QuantizedProjection):
        return {"bits": bits}
    return {
        "bits": bits,
        "quantization": projection.quantization.method,
        "quantization_error": projection.quantization_error,
    }


def quantize_projection(
    projection: Projection,
    structure: Structure,
    quantization: LayerQuantization,
    statistics: InputStatistics | None,
    name: str,
) -> QuantizedProjection:
    """Quantise the z of a projection; statistics are of the layer's inputs."""
    z, bias, sketch = projection.z, projection.bias, projection.sketch
    made = quantize_z(z, bias, sketch, structure, quantization, statistics, name)
    values = {field.name: getattr(projection, field.name) for field in fields(Projection)}
    return QuantizedProjection(
        **values | {"z": made.z, "bias": made.bias},
        scale=made.scale,
        quantization=quantization,
        quantization_error=made.error,
    )


@dataclass(frozen=True, eq=False)
class QuantizedZ:
    """What :func:`quantize_z` gives; as the attributes of :class:`QuantizedProjection`.

    Attributes:
        z: quantised.
        scale: its scales.
        bias: corrected for the mean error where statistics exist.
        error: ``quantization_error``.
    """

    z: Tensor
    scale: Tensor
    bias: Tensor | None
    error: float


@torch.no_grad()
def quantize_z(
    z: Tensor,
    bias: Tensor | None,
    sketch: Tensor,
    structure: Structure,
    quantization: LayerQuantization,
    statistics: InputStatistics | None,
    name: str,
) -> QuantizedZ:
    """Quantise ``z [N, K_c]`` of a layer; statistics are of its inputs ``[K]``.

    Raises:
        QuantizationError: z is not finite.
        CalibrationError: ``rounding="calibrated"`` without statistics.
    """
    calibrated = quantization.rounding == "calibrated"
    if calibrated and statistics is None:
        raise CalibrationError(missing_statistics(name))
    groups = 1 if quantization.group_size is None else z.shape[1] // quantization.group_size
    q, scale = quantize_rows(z, groups, quantization.dtype, name=name)
    moment: Tensor | None = None
    if statistics is not None:
        moment = statistics.second_moment if bias is None else statistics.covariance()
        moment = moment.to(z.device)
    lost = torch.zeros((), dtype=torch.float64, device=z.device)
    whole = torch.zeros_like(lost)
    shift = None if bias is None or statistics is None else bias.double()
    for rows, part in _blocks(structure, sketch):
        gram = _sketched_moment(moment, structure, part)
        if calibrated:
            q[rows] = gptq_round(z[rows], scale[rows], gram[None], dtype=q.dtype, name=name)
        exact = z[rows].double()
        error = dequantize(q[rows], scale[rows], torch.float64) - exact
        lost += _energy(error, gram)
        whole += _energy(exact, gram)
        if shift is not None and statistics is not None:
            mean = statistics.mean.to(z.device, torch.float64)
            shift[rows] -= error @ _sketch(mean[None], part, structure)[0]
    if bias is not None:
        bias = bias.clone() if shift is None else shift.to(bias.dtype)
    ratio = (lost.clamp(min=0) / whole).item() if whole.item() > 0 else 0.0
    return QuantizedZ(q, scale, bias, math.sqrt(ratio))


def _blocks(structure: Structure, sketch: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of every column block and its part ``[1, …]`` of the sketch, learned in float64."""
    wide = sketch if layout.is_rotation(sketch) else sketch.double()
    for j in range(structure.num_hashes):
        start = j * structure.block_n
        yield slice(start, min(start + structure.block_n, structure.out_features)), wide[j : j + 1]


def _sketch(rows: Tensor, sketch: Tensor, structure: Structure) -> Tensor:
    """``rows S_j [M, K_c]`` of ``[M, K]``, float64."""
    sketched: Tensor = torch.ops.ss1.sketch(rows, sketch, structure.reduced_features)
    return sketched[0]


def _sketched_moment(moment: Tensor | None, structure: Structure, sketch: Tensor) -> Tensor:
    """``Γ_j = S_jᵀ H S_j [K_c, K_c]``, or, with H the identity, what there is of it.

    That is then its diagonal ``[K_c]`` for a rotation (the sources of each slot), and its diagonal
    blocks ``[G, r, r]`` for a learned sketch.
    """
    if moment is not None:
        half = _sketch(moment.double(), sketch, structure)
        return _sketch(half.t().contiguous(), sketch, structure)
    if layout.is_rotation(sketch):
        reduced = structure.reduced_features
        slots, _ = layout.target_slots(sketch, reduced, structure.in_features)
        return torch.bincount(slots[0], minlength=reduced).double()
    return sketch[0].transpose(1, 2) @ sketch[0]


def _energy(rows: Tensor, gram: Tensor) -> Tensor:
    """``tr(R Γ Rᵀ)`` for rows ``[M, K_c]`` and what :func:`_sketched_moment` gives."""
    if gram.dim() == 1:
        return rows.square().sum(0) @ gram
    if gram.dim() == 2:
        return ((rows @ gram) * rows).sum()
    grouped = rows.unflatten(1, gram.shape[:2])
    energy: Tensor = (torch.einsum("ngr,grs->ngs", grouped, gram) * grouped).sum()
    return energy
