"""The fused operators composed of PyTorch functions, for any device and floating dtype.

The CPU implementation, and the way out on a GPU where no kernel applies. The sketch comes from
``torch.ops.ss1.sketch``, so each device uses its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from ss1_compile.kernels import portable


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor] | None] = MappingProxyType(
    {"none": None, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "silu": F.silu}
)
"""What each activation's name means; ``gelu`` is the exact one (erf)."""


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """``LayerNorm(x)`` or ``RMSNorm(x)`` over the last dimension, times weight, plus bias."""
    shape = (x.shape[-1],)
    if not rms:
        return F.layer_norm(x, shape, weight, bias, eps)
    normed = F.rms_norm(x, shape, weight, eps)
    return normed if bias is None else normed + bias


def activate(x: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """``act(x)``, or ``act(gate)·x`` where a gate is given."""
    function = ACTIVATIONS[activation]
    activated = x if gate is None else gate
    if function is not None:
        activated = function(activated)
    return activated if gate is None else activated * x


def norm_sketch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sketch: Tensor,
    reduced_features: int,
    eps: float,
    rms: bool,
    keep_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(X̃ of the norm, x + residual, the norm)``; see :mod:`ss1_compile.kernels.fused`."""
    summed = x if residual is None else x + residual
    normed = norm(summed, weight, bias, eps, rms)
    sketched = torch.ops.ss1.sketch(normed, sketch, reduced_features)
    return (
        sketched,
        x.new_empty(0) if residual is None else summed.contiguous(),
        normed.contiguous() if keep_norm else x.new_empty(0),
    )


def activation_sketch(
    x: Tensor, gate: Tensor | None, sketch: Tensor, reduced_features: int, activation: str
) -> Tensor:
    """``X̃`` of :func:`activate`."""
    sketched: Tensor = torch.ops.ss1.sketch(activate(x, gate, activation), sketch, reduced_features)
    return sketched


def matmul(
    sketched: Tensor,
    z: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """``act(X̃ zᵀ + b) + residual``, the columns of ``z[0]``, then those of ``z[1]`` and so on."""
    sketched = sketched.contiguous()
    y = sketched.new_empty(sketched.shape[1], sum(part.shape[0] for part in z))
    columns = y.split([part.shape[0] for part in z], dim=1)
    for part, start, target in zip(z, bias, columns, strict=True):
        portable.grouped_matmul(sketched, part, start, target)
    y = activate(y, None, activation)
    return y if residual is None else y.add_(residual)


def matmul_sketch(
    sketched: Tensor,
    z: Tensor,
    bias: Tensor | None,
    z_gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    sketch: Tensor,
    reduced_features: int,
) -> Tensor:
    """The next layer's ``X̃`` of the product, which may have a gate."""
    if z_gate is None:
        y = matmul(sketched, [z], [bias], None, activation)
    else:
        both = matmul(sketched, [z_gate, z], [gate_bias, bias], None, "none")
        gate, y = both.split(z.shape[0], dim=1)
        y = activate(y, gate, activation)
    further: Tensor = torch.ops.ss1.sketch(y, sketch, reduced_features)
    return further
