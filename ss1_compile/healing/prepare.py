"""Both models as healing needs them, and Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ss1_compile.errors import ConfigError, MissingPackageError
from ss1_compile.experts import SS1ExpertLinear
from ss1_compile.healing.config import HealConfig, Precision
from ss1_compile.modules import SS1Linear


def check_trainable(model: nn.Module) -> None:
    """Refuse a model without SS1 layers, and one whose z cannot be trained.

    Raises:
        ConfigError: there are none, or one is quantised; it is named.
    """
    if not any(isinstance(m, SS1Linear | SS1ExpertLinear) for m in model.modules()):
        raise ConfigError("the model has no SS1 layers; compress it first (ss1_compile.compress)")
    for name, module in model.named_modules():
        if isinstance(module, SS1Linear) and module.quantization is not None:
            raise ConfigError(
                f"{name or 'the model'} is quantised ({module.quantization}) and its z cannot be "
                f"trained; compress without quantization, heal, then quantise "
                f"(ss1_compile.quantize)"
            )


def precision_of(model: nn.Module, config: HealConfig) -> Precision:
    """Of the forward pass.

    Raises:
        ConfigError: float32 is asked for and the model has parameters of 16 bits.
    """
    parameters = list(model.parameters())
    sixteen = any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters)
    if config.precision == "float32" and sixteen:
        raise ConfigError(
            "precision='float32' needs float32 models and these have 16 bits; convert both with "
            ".float(), or use precision='bfloat16'"
        )
    on_cuda = parameters[0].is_cuda and torch.cuda.is_bf16_supported()
    return config.precision or ("bfloat16" if sixteen or on_cuda else "float32")


@contextmanager
def prepared(
    model: nn.Module, teacher: nn.Module, config: HealConfig
) -> Iterator[dict[str, nn.Parameter]]:
    """Both models as healing needs them; yields what is trained, and undoes all but the values."""
    parameters = dict(model.named_parameters())
    wished = {name: p.requires_grad for name, p in parameters.items()}
    dtypes = {name: p.dtype for name, p in parameters.items()}
    modes = [(m, m.training) for one in (model, teacher) for m in one.modules()]
    trained = {n: p for n, p in parameters.items() if config.train == "all" or _is_small(model, n)}
    caching = _caching(model, teacher)
    switched = False
    try:
        for one in caching:
            one.use_cache = False
        for name, p in parameters.items():
            p.requires_grad_(name in trained)
            if p.dtype in (torch.float16, torch.bfloat16):
                p.data = p.data.float()
        model.eval()
        teacher.eval()
        if config.gradient_checkpointing:
            _switch_checkpointing(model)
            switched = True
        yield trained
    finally:
        if switched:
            model.gradient_checkpointing_disable()  # type: ignore[operator]
        for one in caching:
            one.use_cache = True
        for module, mode in modes:
            module.training = mode
        for name, p in parameters.items():
            p.grad = None
            p.data = p.data.to(dtypes[name])
            p.requires_grad_(wished[name])


def _caching(*models: nn.Module) -> list[Any]:
    """The configurations by which models fill a cache of keys and values, which nothing reads."""
    modules = (module for model in models for module in model.modules())
    configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
    return [c for c in configs.values() if getattr(c, "use_cache", None) is True]


def _switch_checkpointing(model: nn.Module) -> None:
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise ConfigError(
            f"{type(model).__name__} has no gradient_checkpointing_enable(); use "
            f"gradient_checkpointing=False"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    for module in model.modules():
        # Transformers checkpoints in training mode only; the layers' dropouts stay in eval mode
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def _is_small(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to an SS1 layer or a norm, or is a bias."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, SS1Linear | SS1ExpertLinear) or attribute.endswith("bias"):
        return True
    if any(isinstance(model.get_submodule(p), SS1Linear) for p in _parents(owner)):
        return True
    return type(module).__name__.endswith("Norm")


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


@contextmanager
def make_accelerator(precision: Precision, device: torch.device) -> Iterator[Any]:
    """Accelerate's autocast, backward and clipping, in one process, on the model's device."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingPackageError(
            "healing needs accelerate: pip install 'ss1-compile[heal]'"
        ) from error
    mixed = "bf16" if precision == "bfloat16" else "no"
    # Its state is global: one that the caller has is left alone
    own = not AcceleratorState._shared_state
    try:
        yield Accelerator(mixed_precision=mixed if own else None, cpu=device.type == "cpu")
    finally:
        if own:
            AcceleratorState._reset_state(reset_partial_state=True)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with all of its tensors on ``device``; the host does not wait for CUDA."""
    from accelerate.utils import recursively_apply, send_to_device

    on_cuda = device.type == "cuda"
    if on_cuda:
        batch = recursively_apply(lambda t: t if t.is_cuda else t.pin_memory(), batch)
    return send_to_device(batch, device, non_blocking=on_cuda)
