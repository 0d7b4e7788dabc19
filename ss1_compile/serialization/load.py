"""Load compressed models.

:mod:`ss1_compile.serialization.checkpoint` has the format. What is loaded is not trusted: all of it
is checked before the first use, and a model is changed only when nothing can fail any more.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ss1_compile.compression.settled import settle
from ss1_compile.compression.stand_ins import stand_ins
from ss1_compile.errors import CheckpointError
from ss1_compile.experts import ExpertLinear, SS1ExpertLinear
from ss1_compile.learned import LearnedStructure, Structure
from ss1_compile.modules import SS1Linear, put_layer
from ss1_compile.serialization.checkpoint import (
    CONFIG_FILE,
    TENSORS_FILE,
    read_config,
    read_tensors,
)
from ss1_compile.serialization.layer import SavedLayer, check_layer, dtype_name, show

_COMPRESSED = (SS1Linear, SS1ExpertLinear)


@dataclass(frozen=True)
class _Slot:
    """A place for a tensor: ``owner.attribute``, stored as ``name``.

    ``expected`` has the shape it must have; ``origin`` is the skeleton's tensor whose device and
    ``requires_grad`` it takes over.
    """

    owner: nn.Module
    attribute: str
    name: str
    expected: Tensor
    origin: Tensor
    is_parameter: bool


def load(
    model: nn.Module, directory: str | Path, *, device: torch.device | str | None = None
) -> nn.Module:
    """Load a saved model into a dense skeleton of the same architecture.

    The layers that were compressed are replaced by SS1 layers and every tensor is assigned, as
    ``load_state_dict(assign=True)`` does, with the stored dtype. Tensors that were shared are
    shared again. No dense weight is allocated if the skeleton is on ``meta``.

    Args:
        model: the skeleton, usually built under ``torch.device("meta")``; materialised weights are
            dropped. Changed in place; keeps its train/eval modes and each ``requires_grad``
            (``z`` takes that of the weight it replaces). Unchanged if loading fails.
        directory: what :func:`save` wrote.
        device: where the tensors go; ``None`` means where the skeleton's are, the CPU for ``meta``.

    Returns:
        ``model``; the new layer if ``model`` itself is a linear layer.

    Raises:
        CheckpointError: a file is missing, truncated, altered, of a newer format, or does not fit
            the skeleton; the message names the file, the layer or tensor, and the value.
    """
    saved = read_config(directory)
    path = Path(directory) / TENSORS_FILE
    tensors, aliases = read_tensors(path, saved.tensors_sha256)
    with stand_ins(model, saved.layers) as inside:
        modules = dict(model.named_modules(remove_duplicate=False))
        replaced: dict[int, SS1Linear | SS1ExpertLinear] = {}
        for name, layer in saved.layers.items():
            old = modules.get(name)
            if old is None:
                raise CheckpointError(
                    f"{CONFIG_FILE}: the model has no layer {show(name)}; load into a model of the "
                    f"architecture that was saved"
                )
            _check_fits(name, layer, old)
            keys = [f"{name}.{part}" if name else part for part in ("z", "bias", "sketch", "scale")]
            parts = [tensors.get(aliases.get(key, key)) for key in keys]
            structure = check_layer(str(path), name, layer, *parts)
            if id(old) not in replaced:
                replaced[id(old)] = _skeleton(structure, layer).train(old.training)
        slots = _slots(modules, saved.layers, replaced)
        _check_slots(path, slots, tensors, aliases)
        values = _place(slots, tensors, aliases, None if device is None else torch.device(device))
        _assign(slots, values)
        for name in saved.layers:
            if name:
                put_layer(model, name, replaced[id(modules[name])])
        inside.keep()
        settle(model)
    return replaced.get(id(model), model)


def _skeleton(structure: Structure, layer: SavedLayer) -> SS1Linear | SS1ExpertLinear:
    """A layer of the saved sizes on ``meta``."""
    if layer.experts is None:
        linear = SS1Linear(structure, layer.bias, device="meta", dtype=layer.torch_dtype)
        if layer.quantization_groups is None:
            return linear
        scales = (layer.out_features, layer.quantization_groups)
        return SS1Linear.from_tensors(
            structure,
            torch.empty(layer.z_shape, device="meta", dtype=layer.z_dtype),
            linear.bias,
            linear.sketch if layer.kind == "learned" else None,
            scale=torch.empty(scales, device="meta"),
            dynamic=layer.quantization != "int8_weight_only",
            dtype=layer.torch_dtype,
        )
    z = nn.Parameter(torch.empty(layer.z_shape, device="meta"))
    blocks = None
    if isinstance(structure, LearnedStructure):
        blocks = torch.empty(structure.sketch_shape, device="meta")
    return SS1ExpertLinear(structure, z, blocks)


def _check_fits(name: str, layer: SavedLayer, old: nn.Module) -> None:
    """Raise unless ``old`` is a linear layer, or SS1 layer, of the saved sizes."""
    sizes = _linear_sizes(old)
    if sizes is None:
        raise CheckpointError(
            f"{CONFIG_FILE}: layer {name!r} is a {type(old).__name__} in the model, not a plain "
            f"nn.Linear, Conv1D or SS1Linear"
        )
    experts = None
    if isinstance(old, ExpertLinear | SS1ExpertLinear):
        experts = (old.z if isinstance(old, SS1ExpertLinear) else old.weight).shape[0]
    if experts != layer.experts:
        raise CheckpointError(
            f"{CONFIG_FILE}: layer {name!r} has experts = {layer.experts}; in the model there are "
            f"{experts}"
        )
    if sizes != (layer.in_features, layer.out_features):
        raise CheckpointError(
            f"{CONFIG_FILE}: layer {name!r} has in_features, out_features = {layer.in_features}, "
            f"{layer.out_features}; in the model they are {sizes[0]}, {sizes[1]}"
        )
    if layer.bias != (old.bias is not None):
        has = "a" if layer.bias else "no"
        raise CheckpointError(f"{CONFIG_FILE}: layer {name!r} has {has} bias, unlike the model's")


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """``(K, N)`` of a layer that an ``SS1Linear`` may replace, ``None`` for any other module."""
    if isinstance(module, _COMPRESSED):
        return module.in_features, module.out_features
    if isinstance(module, ExpertLinear):
        n, k = module.matrices.shape[1:]
        return k, n
    # Parametrised and weight-normed layers hold other parameters or submodules.
    if set(module._parameters) != {"weight", "bias"} or module._modules or module._buffers:
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and isinstance(module, transformers.Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def _slots(
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, SavedLayer],
    replaced: Mapping[int, SS1Linear | SS1ExpertLinear],
) -> list[_Slot]:
    """Every place of the skeleton and of its new layers that needs a tensor."""
    slots = []
    for path, old in modules.items():
        if path not in layers and (id(old) in replaced or isinstance(old, _COMPRESSED)):
            raise CheckpointError(
                f"{CONFIG_FILE}: layer {path!r} is not listed, but in the model it is an SS1 layer "
                f"or shared with a layer that is listed"
            )
        owner = replaced.get(id(old), old)
        for table in (owner._parameters, owner._buffers):
            for attribute, expected in table.items():
                if expected is not None:
                    name = f"{path}.{attribute}" if path else attribute
                    origin = expected if owner is old else _origin(old, attribute)
                    is_parameter = table is owner._parameters
                    slots.append(_Slot(owner, attribute, name, expected, origin, is_parameter))
    return slots


def _origin(old: nn.Module, attribute: str) -> Any:
    """The tensor of a replaced layer whose part z, bias or sketch of the new one takes over."""
    if attribute == "bias":
        return old.bias
    return old.z if isinstance(old, _COMPRESSED) else old.weight


def _check_slots(
    path: Path, slots: list[_Slot], tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> None:
    """Raise unless slots and stored tensors correspond one to one, in shape and kind of dtype."""
    wanted = {slot.name for slot in slots}
    stored = tensors.keys() | aliases.keys()
    for problem, names in (("lacks", wanted - stored), ("has unknown", stored - wanted)):
        if names:
            raise CheckpointError(f"{path} {problem} tensors: {_some(names)}")
    sources: dict[tuple[int, str], _Slot] = {}
    for slot in slots:
        tensor = tensors[aliases.get(slot.name, slot.name)]
        if is_lazy(slot.expected) or tensor.shape != slot.expected.shape:
            shape = "no shape yet" if is_lazy(slot.expected) else list(slot.expected.shape)
            raise CheckpointError(
                f"{path}: {slot.name} is {list(tensor.shape)}; in the model it is {shape}"
            )
        floating = tensor.is_floating_point() and slot.expected.is_floating_point()
        if tensor.dtype != slot.expected.dtype and not floating:
            raise CheckpointError(
                f"{path}: {slot.name} is {dtype_name(tensor.dtype)}; in the model it is "
                f"{dtype_name(slot.expected.dtype)}"
            )
        first = sources.setdefault((id(slot.owner), slot.attribute), slot)
        if aliases.get(first.name, first.name) != aliases.get(slot.name, slot.name):
            raise CheckpointError(
                f"{path}: {first.name} and {slot.name} differ, but the model shares one module"
            )


def _some(names: set[str]) -> str:
    listed = ", ".join(sorted(names)[:5])
    return listed if len(names) <= 5 else f"{listed}, … ({len(names)} in all)"


def _place(
    slots: list[_Slot],
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    device: torch.device | None,
) -> list[Tensor]:
    """Copy each tensor to its device: one tensor, and one parameter, per stored name."""
    copies: dict[Any, Tensor] = {}
    parameters: dict[Any, nn.Parameter] = {}
    values: list[Tensor] = []
    for slot in slots:
        stored = aliases.get(slot.name, slot.name)
        target = torch.device("cpu") if slot.origin.is_meta else slot.origin.device
        target = target if device is None else device
        key = (stored, target)
        if key not in copies:
            copies[key] = tensors[stored].to(target, copy=True)
        if not slot.is_parameter:
            values.append(copies[key])
            continue
        trainable = (*key, slot.origin.requires_grad)
        if trainable not in parameters:
            parameters[trainable] = nn.Parameter(copies[key], slot.origin.requires_grad)
        values.append(parameters[trainable])
    return values


def _assign(slots: list[_Slot], values: list[Tensor]) -> None:
    """Set every slot, through ``setattr`` because some modules (``nn.LSTM``) keep a second list."""
    earlier = [getattr(slot.owner, slot.attribute) for slot in slots]
    try:
        for slot, value in zip(slots, values, strict=True):
            setattr(slot.owner, slot.attribute, value)
    except BaseException:
        for slot, value in zip(slots, earlier, strict=True):
            setattr(slot.owner, slot.attribute, value)
        raise
