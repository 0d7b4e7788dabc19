"""The linear layers of a model that ``compress`` may replace, and why it leaves others alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ss1_compile.calibration.statistics import statistics_of
from ss1_compile.config import SS1Config
from ss1_compile.errors import ConfigError
from ss1_compile.experts import ExpertLinear
from ss1_compile.learned import Structure
from ss1_compile.report import LayerReport, tensor_bytes


@dataclass
class Layer:
    """One linear module, perhaps registered under several names, and what becomes of it."""

    module: nn.Module
    names: list[str]
    structure: Structure | None = None
    reason: str | None = None
    by_choice: bool = False
    """Whether the configuration asked for it to stay dense."""
    given: bool = False
    """Whether the structure was given for this layer, and not made from the configuration."""
    row: LayerReport | None = None
    replacement: nn.Module | None = field(default=None, repr=False)

    @property
    def is_transposed(self) -> bool:
        """Whether the module holds its weight as ``[K, N]``."""
        return _is_conv1d(self.module)

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def weight(self) -> nn.Parameter:
        """The dense weight, as the module holds it."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The dense bias, if there is one."""
        return cast("nn.Parameter | None", self.module.bias)

    @property
    def weight_name(self) -> str:
        """The qualified name of the weight."""
        return f"{self.name}.weight"

    @property
    def matrices(self) -> Tensor:
        """``[N, K]``, or ``[E, N, K]`` of experts."""
        if isinstance(self.module, ExpertLinear):
            return self.module.matrices
        return self.weight.t() if _is_conv1d(self.module) else self.weight

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        rows, columns = self.matrices.shape[-2:]
        return int(rows), int(columns)

    def row_as_it_is(self) -> LayerReport:
        """Its row of the report, as long as it is dense."""
        size = tensor_bytes([self.weight, self.bias])
        return LayerReport(
            name=self.name,
            op=type(self.module).__name__,
            shape=self.shape if self.weight.dim() in (2, 3) else None,
            bytes_before=size,
            bytes_after=size,
            reason=self.reason,
        )


def find_layers(
    model: nn.Module,
    config: SS1Config,
    structures: Mapping[str, Structure],
    *,
    calibrated: bool = False,
) -> list[Layer]:
    """Every linear module of ``model``, once, with its structure or the reason why it stays dense.

    Args:
        model: any module.
        config: says what to compress.
        structures: qualified name → structure, for layers that do not follow ``config``.
        calibrated: whether there will be statistics of the inputs; those that are bound to weights
            already count anyway.

    Raises:
        ConfigError: ``structures`` does not fit the model, or the model is itself a linear module.
    """
    by_module: dict[int, Layer] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False):
            owner = f"{name}.{attribute}" if name else attribute
            if owner not in owners.setdefault(id(parameter), []):
                owners[id(parameter)].append(owner)
        if _is_linear_like(module):
            if not name:
                raise ConfigError(
                    f"the model is itself a {type(module).__name__}; wrap it in nn.Sequential so "
                    f"that it can be replaced"
                )
            by_module.setdefault(id(module), Layer(module, [])).names.append(name)
    unknown = set(structures) - {name for layer in by_module.values() for name in layer.names}
    if unknown:
        raise ConfigError(f"structures names no linear layer of the model: {sorted(unknown)}")
    layers = list(by_module.values())
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in layers:
        reason = _unhandled(layer, modules)
        if reason is None:
            own = {f"{name}.weight" for name in layer.names}
            tied = [o for o in owners[id(layer.weight)] if o not in own]
            if tied:
                reason = f"the weight is tied to {tied[0]}"
        if reason is not None:
            layer.reason = reason
            continue
        n, k = layer.shape
        structure: Structure | str
        given = next((structures[name] for name in layer.names if name in structures), None)
        known = calibrated or statistics_of(layer.weight) is not None
        known &= not isinstance(layer.module, ExpertLinear)
        structure = given or config.structure_for(layer.name, k, n, calibrated=known)
        if isinstance(structure, str):
            layer.reason, layer.by_choice = structure, True
        elif (structure.out_features, structure.in_features) != (n, k):
            raise ConfigError(
                f"{layer.name}: its structure is for {structure.out_features} × "
                f"{structure.in_features} and its weight is {n} × {k}"
            )
        else:
            layer.structure, layer.given = structure, given is not None
    return layers


def _is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's ``Conv1D`` (GPT-2): a linear layer whose weight is ``[K, N]``."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _computes_linear(module: nn.Linear) -> bool:
    """Whether ``forward`` is that of ``nn.Linear``, or known to compute the same (Falcon's)."""
    kind = type(module)
    falcon = (kind.__name__, kind.__module__.rpartition(".")[2]) == (
        "FalconLinear",
        "modeling_falcon",
    )
    return falcon or kind.forward is nn.Linear.forward


def _is_linear_like(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | ExpertLinear) or _is_conv1d(module)


def _unhandled(layer: Layer, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the module cannot be swapped, or ``None`` if it can."""
    module = layer.module
    if isinstance(module, nn.Linear) and not _computes_linear(module):
        return f"{type(module).__name__} overrides forward"
    if "forward" in vars(module):
        return "its forward was replaced (by accelerate, say): compress before dispatching"
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "the weight is parametrised (weight norm, LoRA, ...): merge it first"
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)):
        return "the module has hooks, which a replacement would lose"
    dims = 3 if isinstance(module, ExpertLinear) else 2
    if layer.weight.dim() != dims or not layer.weight.is_floating_point():
        return f"the weight is {layer.weight.dtype} {list(layer.weight.shape)}"
    for name in layer.names:
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            return f"{type(parent).__name__} reads its weight directly in a fused operator"
    return None
