"""``SS1MultiheadAttention``: ``nn.MultiheadAttention`` with its projections as four modules.

``nn.MultiheadAttention`` multiplies by its weights inside one function, where no layer can be
replaced. Here they are linear layers of their own, so that they are calibrated, compressed,
reported and saved like any other.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ss1_compile.calibration.statistics import rebind, statistics_of
from ss1_compile.errors import StructureError


class SS1MultiheadAttention(nn.Module):
    """Takes the place of ``nn.MultiheadAttention``: the same arguments and results.

    The state dict has ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` (``.z``, ``.sketch`` and
    ``.bias`` of each where it is SS1, ``.weight`` and ``.bias`` where it is dense) and, where the
    original has them, ``bias_k`` and ``bias_v``.

    Attributes:
        q_proj: ``[..., embed_dim]`` → ``[..., embed_dim]``.
        k_proj: ``[..., kdim]`` → ``[..., embed_dim]``.
        v_proj: ``[..., vdim]`` → ``[..., embed_dim]``.
        out_proj: ``[..., embed_dim]`` → ``[..., embed_dim]``.
        bias_k: parameter ``[1, 1, embed_dim]``, a further key of every sequence, or ``None``.
        bias_v: parameter ``[1, 1, embed_dim]``, its value, or ``None``.
    """

    # nn.TransformerEncoder and its layers read these, and take them as the reason not to hand the
    # weights to one fused operator.
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """Take over the parameters of ``attention``; dense, and sharing their memory."""
        super().__init__()
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        bias: nn.Parameter | None = attention.in_proj_bias
        biases = [None] * 3 if bias is None else bias.chunk(3)
        packed = cast("nn.Parameter | None", attention.in_proj_weight)
        if packed is not None:
            weights = list(packed.chunk(3))
        else:
            weights = [getattr(attention, f"{letter}_proj_weight") for letter in "qkv"]
        for letter, weight, bias_part in zip("qkv", weights, biases, strict=True):
            setattr(self, f"{letter}_proj", _linear(weight, packed, bias_part, bias))
        self.out_proj: nn.Module = attention.out_proj
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, cast("nn.Parameter | None", getattr(attention, name)))
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``.

        Args:
            query: ``[B, L, embed_dim]`` (``[L, B, embed_dim]`` unless ``batch_first``), or
                ``[L, embed_dim]``; key and value likewise.
            key: ``[B, S, kdim]``.
            value: ``[B, S, vdim]``.
            key_padding_mask: ``[B, S]`` or ``[S]``; bool (``True``: ignore the key) or added.
            need_weights: whether to return the attention weights.
            attn_mask: ``[L, S]`` or ``[B · num_heads, L, S]``; bool (``True``: ignore) or added.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: a hint that ``attn_mask`` is the causal mask.

        Returns:
            The output, shaped like ``query``; and the weights ``[B, L, S]`` (with the heads:
            ``[B, num_heads, L, S]``; without B if the query has none) or ``None``.

        Raises:
            StructureError: key and value differ in length or batch, or ``is_causal`` without mask.
        """
        if is_causal and attn_mask is None:
            raise StructureError("is_causal=True is a hint about attn_mask, which is None; pass it")
        if key.shape[:-1] != value.shape[:-1]:
            raise StructureError(
                f"key and value must have equal batch and length, got {list(key.shape)} and "
                f"{list(value.shape)}"
            )
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        batch_first = self.batch_first or not batched
        q = self._heads(self.q_proj(query), batch_first)
        k = self._heads(self._extended(self.k_proj(key), self.bias_k, batch_first), batch_first)
        v = self._heads(self._extended(self.v_proj(value), self.bias_v, batch_first), batch_first)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
            y = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, hinted)
        y = (y.transpose(1, 2) if batch_first else y.permute(2, 0, 1, 3)).flatten(2)
        out: Tensor = self.out_proj(y)
        return out if batched else out.squeeze(0), weights

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """``[B, num_heads, L, head_dim]`` of ``[B, L, embed_dim]`` or ``[L, B, embed_dim]``."""
        x = x.unflatten(-1, (self.num_heads, self.embed_dim // self.num_heads))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    @staticmethod
    def _extended(x: Tensor, bias: Tensor | None, batch_first: bool) -> Tensor:
        """``x`` with ``bias`` after the last position of every sequence."""
        if bias is None:
            return x
        batch, length = (0, 1) if batch_first else (1, 0)
        sizes = [1, 1, -1]
        sizes[batch] = x.shape[batch]
        return torch.cat([x, bias.expand(sizes)], dim=length)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor
    ) -> Tensor | None:
        """What is added to the scores ``[B, num_heads, L, S]``, of a shape that broadcasts."""
        added: Tensor | None = None
        if attn_mask is not None:
            added = _additive(attn_mask, q.dtype)
            added = added[None, None] if added.dim() == 2 else added.unflatten(0, q.shape[:2])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None]
            added = padding if added is None else added + padding
        further = int(self.bias_k is not None) + int(self.add_zero_attn)
        return F.pad(added, (0, further)) if added is not None and further else added

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def _linear(
    weight: Tensor, packed: nn.Parameter | None, bias: Tensor | None, whole: nn.Parameter | None
) -> nn.Linear:
    """A linear layer on parts of parameters, with their statistics and ``requires_grad``."""
    n, k = weight.shape
    layer = nn.Linear(k, n, bias is not None, device="meta")
    if packed is None and isinstance(weight, nn.Parameter):
        layer.weight = weight
    elif packed is not None:
        layer.weight = nn.Parameter(weight.detach(), packed.requires_grad)
        rebind(layer.weight, statistics_of(packed))
    if bias is not None and whole is not None:
        layer.bias = nn.Parameter(bias.detach(), whole.requires_grad)
    return layer


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
