"""``quantize``: quantise the SS1 layers of a model that is compressed already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.calibration.moments import SharedMoments
from ss1_compile.calibration.observer import Forward, Quietly, attention_mask, run_batch
from ss1_compile.config import LayerQuantization, SS1Config
from ss1_compile.errors import CalibrationError, ConfigError, QuantizationError
from ss1_compile.experts import SS1ExpertLinear
from ss1_compile.modules import SS1Linear, put_layer
from ss1_compile.quantization.balancing import balance
from ss1_compile.quantization.projection import check_quantizable, quantize_z
from ss1_compile.report import LayerReport, Report, tensor_bytes


def quantize(
    model: nn.Module,
    config: SS1Config | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
    **options: Any,
) -> Report:
    """Quantise the z of the SS1 layers of ``model``, in place, for inference.

    For models that were trained or healed after :func:`ss1_compile.compress`, or loaded: a
    quantised z is frozen, so quantisation comes last. ``compress`` itself quantises with the same
    options. The model is unchanged if anything fails.

    Args:
        model: with SS1 layers; dense and quantised ones stay as they are.
        config: ``quantization``, ``quantization_group_size``, ``rounding``, ``include``,
            ``exclude`` and ``overrides`` are used; or pass them as keywords.
        calibration: batches, as in :func:`ss1_compile.calibrate`, for ``rounding="calibrated"``;
            with them biases absorb the mean error of rounding, too, and learned sketches are
            balanced for these inputs (:mod:`ss1_compile.quantization.balancing`). Statistics
            collected on the dense model do not fit: layers behind others read other inputs now.
        forward: ``forward(model, batch)`` in place of calling the model.
        **options: fields of :class:`SS1Config`, in place of ``config``.

    Returns:
        A row per SS1 layer. Its ``error`` is ``None``: projection was not at work here.

    Raises:
        ConfigError: bad options, no quantization among them, or no SS1 layer to quantise.
        QuantizationError: a layer cannot be quantised (experts, float64, a group size that does
            not divide K_c, a GPU without float8); it is named.
        CalibrationError: ``rounding="calibrated"`` and a layer has no calibration inputs, or the
            calibration data are not finite.
    """
    if config is not None and options:
        raise ConfigError(f"pass either config or options, not both ({', '.join(options)})")
    config = config or SS1Config.from_dict(options)
    if not config.quantizations:
        raise ConfigError("quantize needs a quantization, 'int8_dynamic' say")
    chosen, names = _choose(model, config)
    if not chosen:
        raise ConfigError(
            f"{type(model).__name__} has no SS1 layer that is to be quantised and is not; compress "
            f"it first (ss1_compile.compress)"
        )
    statistics: dict[str, InputStatistics] = {}
    layers = {name: layer for name, (layer, _) in chosen.items()}
    if calibration is not None:
        statistics = _collect(model, layers, calibration, forward)
    balanced = _balance(model, layers, statistics)
    made = {
        n: _quantize(n, *chosen[n], statistics.get(n), *balanced.get(n, (None, None)))
        for n in chosen
    }
    for name, (layer, _) in made.items():
        for alias in names[id(chosen[name][0])]:
            put_layer(model, alias, layer)
    return Report([row for _, row in made.values()])


def _choose(
    model: nn.Module, config: SS1Config
) -> tuple[dict[str, tuple[SS1Linear, LayerQuantization]], dict[int, list[str]]]:
    """The layers by their first name, and all names of each by its id."""
    chosen: dict[str, tuple[SS1Linear, LayerQuantization]] = {}
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, SS1Linear | SS1ExpertLinear):
            continue
        aliases = names.setdefault(id(module), [])
        aliases.append(name)
        quantization = config.quantization_for(name)
        left = isinstance(config.reduction_for(name, module.in_features, module.out_features), str)
        if len(aliases) > 1 or left or quantization is None:
            continue
        if not name:
            raise ConfigError("the model is itself an SS1 layer; wrap it in nn.Sequential")
        if isinstance(module, SS1ExpertLinear):
            check_quantizable(module.z, module.structure, quantization, name)
        elif module.scale is None:
            if module.z.is_meta:
                raise QuantizationError(f"{name} is on the meta device and has no values to round")
            check_quantizable(module.z, module.structure, quantization, name)
            chosen[name] = module, quantization
    return chosen, names


def _collect(
    model: nn.Module,
    layers: dict[str, SS1Linear],
    batches: Iterable[Any],
    forward: Forward | None,
) -> dict[str, InputStatistics]:
    """The statistics of the layers' inputs."""
    moments = SharedMoments()

    def counting(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            moments.add(name, args[0])

        return hook

    handles = [layer.register_forward_pre_hook(counting(name)) for name, layer in layers.items()]
    seen = False
    try:
        with Quietly(model):
            for batch in batches:
                seen = True
                moments.start(attention_mask(batch))
                run_batch(model, batch, forward)
                moments.finish()
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise CalibrationError("the calibration data is empty; pass at least one batch")
    finished: dict[int, InputStatistics] = {}
    for name in moments:
        shared = moments[name]
        if id(shared) not in finished:
            finished[id(shared)] = shared.finish()
    return {name: finished[id(moments[name])] for name in moments}


def _balance(
    model: nn.Module, layers: dict[str, SS1Linear], statistics: dict[str, InputStatistics]
) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Balanced learned sketches and the z for them, float64, by name.

    Layers that share a sketch go on sharing one. It stays as it is where a layer that is not among
    ``layers`` reads it too.
    """
    sharing: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if layer.block_k is None:
            sharing.setdefault(id(layer.sketch), []).append(name)
    readers: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            readers.setdefault(id(parameter), set()).add(id(module))
    balanced: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for key, names in sharing.items():
        if readers[key] != {id(layers[name]) for name in names}:
            continue
        known = {id(statistics[n]): statistics[n] for n in names if n in statistics}
        total = sum(found.count for found in known.values())
        moments = [found.second_moment * (found.count / total) for found in known.values()]
        moment = torch.stack(moments).sum(0) if moments else None
        old = layers[names[0]].sketch
        blocks, zs = balance([layers[name].z for name in names], old, moment)
        sketch = nn.Parameter(blocks, old.requires_grad)
        balanced |= {name: (sketch, z) for name, z in zip(names, zs, strict=True)}
    return balanced


def _quantize(
    name: str,
    layer: SS1Linear,
    quantization: LayerQuantization,
    statistics: InputStatistics | None,
    sketch: nn.Parameter | None,
    z: Tensor | None,
) -> tuple[SS1Linear, LayerReport]:
    """The quantised layer and its row; with another sketch and the z for it, if they are given."""
    structure, bias = layer.structure, layer.bias
    learned = structure.kind == "learned"
    used = layer.sketch if sketch is None else sketch
    with torch.autocast(layer.z.device.type, enabled=False):
        made = quantize_z(
            layer.z.detach() if z is None else z,
            None if bias is None else bias.detach(),
            used.detach(),
            structure,
            quantization,
            statistics,
            name,
        )
    new_bias = None
    if bias is not None and made.bias is not None:
        new_bias = nn.Parameter(made.bias, bias.requires_grad)
    quantized = SS1Linear.from_tensors(
        structure,
        made.z,
        new_bias,
        used if learned else None,
        scale=made.scale,
        dynamic=quantization.dynamic,
        dtype=layer.dtype,
    ).train(layer.training)
    held: list[Tensor | None] = [quantized.z, quantized.scale, new_bias, quantized.sketch]
    return quantized, LayerReport(
        name=name,
        op=type(layer).__name__,
        shape=(layer.out_features, layer.in_features),
        bytes_before=tensor_bytes([layer.z, bias, layer.sketch]),
        bytes_after=tensor_bytes(held),
        reduction=layer.reduction,
        error_of="weight" if statistics is None else "output",
        quantization=quantization.method,
        bits=8,
        quantization_error=made.error,
    )
