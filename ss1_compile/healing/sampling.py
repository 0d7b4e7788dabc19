"""``sample_texts``: text to heal a language model with, from the model itself.

A language model's own samples follow the distribution that it has learnt, of which there is as much
as one likes and which nobody has to collect: data-free distillation (Liu et al., 2023, LLM-QAT,
section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ss1_compile.calibration.observer import Quietly
from ss1_compile.errors import ConfigError


def sample_texts(
    teacher: nn.Module,
    count: int,
    length: int,
    *,
    prompts: Tensor | None = None,
    batch: int = 32,
    temperature: float = 1.0,
    at_once: int = 512,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Batches for :func:`ss1_compile.heal`, sampled by a causal language model of transformers.

    Every text is of the full length: what would end it is never sampled.

    Args:
        teacher: the dense model, on any device; it has transformers' ``generate``.
        count: texts.
        length: tokens per text, the prompt's included.
        prompts: int64 ``[P, T]`` with ``1 <= T < length``: beginnings, of which each text takes one
            at random. ``None`` begins with a random token of the vocabulary, after the model's own
            first token where it has one.
        batch: texts per batch of the result; the last may be smaller.
        temperature: the logits are divided by it; 1 samples from what the model has learnt.
        at_once: texts that are sampled together, which decides the speed and the memory.
        seed: of the prompts and the tokens. The caller's random state is left alone.

    Returns:
        ``{"input_ids": int64 [batch, length]}`` each, on the CPU.

    Raises:
        ConfigError: a model that cannot generate, or a value out of range; it is named.
    """
    for name, value in (("count", count), ("batch", batch), ("at_once", at_once)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature must be a positive finite number, got {temperature!r}")
    model: Any = getattr(teacher, "_orig_mod", teacher)
    if not getattr(model, "can_generate", lambda: False)():
        raise ConfigError(
            f"{type(model).__name__} cannot sample texts: that takes a causal language model of "
            f"transformers, with generate()"
        )
    special = _special(model)
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    found: list[Tensor] = []
    with torch.random.fork_rng(devices), Quietly(model):
        torch.manual_seed(seed)
        beginnings = _random_tokens(model, count, special) if prompts is None else prompts
        _check_prompts(beginnings, length)
        if prompts is not None:
            beginnings = prompts[torch.randint(len(prompts), (count,))]
        for part in beginnings.split(at_once):
            found.append(_continued(model, part.to(device), length, temperature, special).cpu())
    return [{"input_ids": ids} for ids in torch.cat(found).split(batch)]


def _continued(
    model: Any, beginning: Tensor, length: int, temperature: float, special: Iterable[int]
) -> Tensor:
    """``[B, length]`` of ``[B, T]``."""
    ids: Tensor = model.generate(
        beginning,
        attention_mask=torch.ones_like(beginning),
        max_new_tokens=length - beginning.shape[1],
        min_new_tokens=length - beginning.shape[1],
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        suppress_tokens=sorted(special) or None,
        pad_token_id=0,  # nothing is padded; silences a warning where the model has none
        use_cache=True,
    )
    return ids


def _special(model: Any) -> set[int]:
    """Tokens that begin, end or pad a text."""
    configs = (model.config, model.generation_config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    values = [getattr(config, name, None) for config in configs for name in names]
    nested = [value if isinstance(value, list | tuple) else [value] for value in values]
    return {token for part in nested for token in part if token is not None and token >= 0}


def _random_tokens(model: Any, count: int, special: set[int]) -> Tensor:
    """``[count, 1 or 2]``: the model's first token, if any, and a random one."""
    allowed = torch.ones(model.get_input_embeddings().num_embeddings)
    allowed[[token for token in special if token < len(allowed)]] = 0
    ids = torch.multinomial(allowed, count, replacement=True)[:, None]
    first = model.generation_config.bos_token_id
    return ids if first is None else torch.cat([torch.full_like(ids, first), ids], 1)


def _check_prompts(prompts: Tensor, length: int) -> None:
    shape = tuple(prompts.shape)
    if prompts.dtype != torch.int64 or len(shape) != 2 or 0 in shape:
        raise ConfigError(f"prompts must be int64 [P, T], got {prompts.dtype} {list(shape)}")
    if not isinstance(length, int) or length <= shape[1]:
        raise ConfigError(
            f"length must be an integer above the {shape[1]} tokens that a text begins with, got "
            f"{length!r}"
        )
