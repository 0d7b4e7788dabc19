"""Parameters that may be a linear layer's weight although no linear module holds them.

``compress`` replaces modules. Experts in one 3-D parameter, a fused attention's ``in_proj_weight``
or an LSTM's weights are out of its reach, and its report says so instead of being silent.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ss1_compile.config import SS1Config
from ss1_compile.report import LayerReport, tensor_bytes

_NO_PRODUCT = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    parametrize.ParametrizationList,
)
"""Modules whose matrices are no factor of a product, or are reported under another name."""


@dataclass(frozen=True)
class BareParameter:
    """A parameter that stays dense.

    Attributes:
        row: its row of the report.
        by_choice: whether the configuration leaves it dense anyway.
    """

    row: LayerReport
    by_choice: bool


def bare_parameters(
    model: nn.Module, config: SS1Config, reported: Collection[nn.Module]
) -> list[BareParameter]:
    """The matrices of ``model`` that none of the modules in ``reported`` holds, in model order.

    Left out are those of modules that certainly multiply no activations by them, as a linear layer
    does: embeddings, norms, convolutions larger than 1×1; and 3-D ones of leading size 1, which
    are position embeddings.
    """
    known = {id(module) for module in reported}
    seen = {id(p) for module in reported for p in module.parameters(recurse=False)}
    found: list[BareParameter] = []
    for module in model.modules():
        if id(module) in known or isinstance(module, _NO_PRODUCT):
            seen.update(id(p) for p in module.parameters(recurse=False))
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not _may_be_weight(module, parameter):
                continue
            seen.add(id(parameter))
            qualified = f"{name}.{attribute}" if name else attribute
            found.append(_bare(qualified.removesuffix(".weight"), module, parameter, config))
    return found


def _may_be_weight(module: nn.Module, parameter: nn.Parameter) -> bool:
    if is_lazy(parameter) or parameter.dim() < 2 or not parameter.is_floating_point():
        return False
    if isinstance(module, _ConvNd):
        return all(size == 1 for size in parameter.shape[2:])
    return parameter.dim() == 2 or parameter.shape[0] > 1


def _bare(
    name: str, module: nn.Module, parameter: nn.Parameter, config: SS1Config
) -> BareParameter:
    kind = type(module).__name__
    shape: tuple[int, int] | None
    if isinstance(module, _ConvNd):
        n, k = parameter.shape[:2]
        reason = f"a 1×1 convolution is no linear module, and compress replaces those; {_OTHER}"
    else:
        k, n = parameter.shape[-2:]
        if isinstance(module, nn.MultiheadAttention):
            reason = f"{kind} reads its weight directly in a fused operator; {_OTHER}"
        elif isinstance(module, nn.RNNBase):
            reason = f"{kind} multiplies by it inside one operator"
        else:
            reason = f"{kind} holds it outside any linear module; {_OTHER}"
    if parameter.dim() > 2 and not isinstance(module, _ConvNd):
        k = n = max(parameter.shape)  # which of its dimensions are features is unknown
        shape = None
    else:
        shape = (n, k)
    choice = config.reduction_for(name, k, n)
    size = tensor_bytes([parameter])
    row = LayerReport(
        name=name,
        op=kind,
        shape=shape,
        bytes_before=size,
        bytes_after=size,
        reason=choice if isinstance(choice, str) else reason,
    )
    return BareParameter(row, isinstance(choice, str))


_OTHER = "backend='ss1' and compress_exported look at the products themselves"
