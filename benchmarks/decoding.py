"""A plain Llama-style decoder for one step with a key-value cache, whose blocks share one graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, position: Tensor, cache: Tensor) -> Tensor:
        batch = x.shape[0]
        q, k, v = (
            layer(x).view(batch, 1, -1, self.head).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = rotary[0], rotary[1]
        q, k = (t * cos + torch.cat((-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]), -1)
                * sin for t in (q, k))  # fmt: skip
        cache[0].index_copy_(2, position, k)
        cache[1].index_copy_(2, position, v)
        y = F.scaled_dot_product_attention(q, cache[0], cache[1], enable_gqa=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, 1, -1))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = _Attention(width, heads, kv_heads)
        self.output_norm = nn.RMSNorm(width, eps=1e-5)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, position: Tensor, cache: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x), rotary, position, cache)
        y = self.output_norm(x)
        out: Tensor = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return out


class Decoder(nn.Module):
    """One step: ids ``[B, 1]`` and a cache ``[layers, 2, B, kv_heads, length, head]`` to logits."""

    def __init__(
        self, layers: int, width: int, inner: int, heads: int, kv_heads: int, vocabulary: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_Block(width, inner, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, rotary: Tensor, position: Tensor, caches: Any) -> Tensor:
        """The logits ``[B, 1, vocabulary]``; every cache gets its new key and value in place."""
        x = self.embedding(ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotary, position, cache)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @staticmethod
    def inputs(batch: int, length: int, layers: int, kv_heads: int, head: int) -> tuple[Any, ...]:
        """Random arguments of a step that fills the last place of the cache."""
        like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        angle = torch.randn(head, device="cuda")
        rotary = torch.stack((angle.cos(), angle.sin())).to(torch.bfloat16)
        caches = [torch.randn(2, batch, kv_heads, length, head, **like) for _ in range(layers)]
        return (
            torch.randint(1000, (batch, 1), device="cuda"),
            rotary,
            torch.tensor([length - 1], device="cuda"),
            caches,
        )
