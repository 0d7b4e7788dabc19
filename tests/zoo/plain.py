"""Models in plain PyTorch, each for a way of spelling a linear layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D, T, B = 64, 12, 2


class Mixer(nn.Module):
    """MLP-Mixer: linears over tokens and over channels."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.tokens = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
            self.channels = nn.Sequential(nn.Linear(D, 128), nn.GELU(), nn.Linear(128, D))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class DLRM(nn.Module):
    """Recommendation: embedding bags, two MLPs, dot products between the features."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(50, 32, mode="sum") for _ in range(4))
        self.bottom = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(42, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        first = self.bottom(dense)
        pairs = zip(self.bags, sparse.unbind(), strict=True)
        features = torch.stack([first, *(bag(ids) for bag, ids in pairs)], 1)
        dots = torch.bmm(features, features.transpose(1, 2))
        i, j = torch.tril_indices(5, 5, -1)
        return self.top(torch.cat([first, dots[:, i, j]], 1))


class Encoder(nn.Module):
    """``nn.TransformerEncoder``: fused operators in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Seq2Seq(nn.Module):
    """``nn.Transformer``."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(D, 4, 2, 2, 128, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.transformer(source, target)


class Attention(nn.Module):
    """``nn.MultiheadAttention`` as self-attention and with keys of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(D, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(D, 4, kdim=96, vdim=96, batch_first=True)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.self_attention(x, x, x, need_weights=False)[0]
        return self.out(x + self.cross(x, memory, memory, need_weights=False)[0])


class LoRALinear(nn.Module):
    """The wrapped layer of the low-rank adapter libraries."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def lora() -> nn.Module:
    return nn.Sequential(LoRALinear(nn.Linear(D, 128), 8), nn.GELU(), nn.Linear(128, D))


def weight_norm() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(D, 128))
    return nn.Sequential(normed, nn.GELU(), nn.Linear(128, D))


class TiedHead(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, D)
        self.body = nn.Sequential(nn.Linear(D, 128), nn.GELU(), nn.Linear(128, D))
        self.head = nn.Linear(D, 97, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


class Checkpointed(nn.Module):
    """Blocks under ``torch.utils.checkpoint``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 128), nn.GELU(), nn.Linear(128, D)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


class Conditional(nn.Module):
    """Linears in the branches of ``torch.cond``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.yes, self.no = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return torch.cond(h.sum() > 0, lambda h: self.yes(h), lambda h: self.no(h), (h,))


class FusedQKV(nn.Module):
    """One weight for q, k and v, cut up before use; the output product written ``@``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * D, D) / 8)
        self.out = nn.Parameter(torch.randn(D, D) / 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w) for w in self.qkv.chunk(3))
        return F.scaled_dot_product_attention(q, k, v) @ self.out


class Einsum(nn.Module):
    """Linears written as einsum, with and without a split into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(D, 128) / 8)
        self.down = nn.Parameter(torch.randn(D, 128) / 11)
        self.heads = nn.Parameter(torch.randn(D, 4, 32) / 8)
        self.merge = nn.Parameter(torch.randn(4, 32, D) / 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("btd,df->btf", x, self.up))
        x = x + torch.einsum("btf,df->btd", h, self.down)
        h = torch.einsum("btd,dhk->bthk", x, self.heads)
        return torch.einsum("bthk,hkd->btd", h, self.merge)


class Pointwise(nn.Module):
    """Linears written as convolutions of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Sequential(nn.Conv1d(D, 128, 1), nn.GELU(), nn.Conv1d(128, D, 1))
        self.image = nn.Sequential(nn.Conv2d(D, 128, 1), nn.GELU(), nn.Conv2d(128, D, 1))
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        x = self.image(x.unsqueeze(-1)).squeeze(-1)
        return self.out(x.transpose(1, 2))


class BatchedExperts(nn.Module):
    """Experts as one 3-D weight and a batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, D, 128) / 8)
        self.down = nn.Parameter(torch.randn(4, 128, D) / 11)
        self.router = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.router(x).repeat(2, 1, 1)
        return torch.bmm(F.gelu(torch.bmm(h, self.up)), self.down)


class ScaledAddmm(nn.Module):
    """``addmm`` with factors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, 128) / 8)
        self.bias = nn.Parameter(torch.randn(128))
        self.out = nn.Linear(128, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.addmm(self.bias, x, self.weight, beta=0.5, alpha=2.0))


class Recurrent(nn.Module):
    """``nn.LSTM``, whose linears are inside one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(D, D, batch_first=True)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])


def tokens(*names: str, width: int = D, length: int = T) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(B, length, width) for name in names}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "mlp-mixer": (Mixer, tokens("x", length=32)),
    "dlrm": (
        DLRM,
        lambda: {"dense": torch.randn(B, 32), "sparse": torch.randint(50, (4, B, 3))},
    ),
    "nn.TransformerEncoder": (Encoder, tokens("x")),
    "nn.Transformer": (Seq2Seq, tokens("source", "target")),
    "nn.MultiheadAttention": (
        Attention,
        lambda: {"x": torch.randn(B, T, D), "memory": torch.randn(B, 5, 96)},
    ),
    "lora": (lora, lambda: {"input": torch.randn(B, T, D)}),
    "weight-norm": (weight_norm, lambda: {"input": torch.randn(B, T, D)}),
    "tied head": (TiedHead, lambda: {"ids": torch.randint(97, (B, T))}),
    "checkpointed": (Checkpointed, tokens("x")),
    "torch.cond": (Conditional, tokens("x")),
    "fused qkv": (FusedQKV, tokens("x")),
    "einsum": (Einsum, tokens("x")),
    "1×1 convolution": (Pointwise, lambda: {"x": torch.randn(B, D, T)}),
    "batched experts": (BatchedExperts, tokens("x")),
    "scaled addmm": (ScaledAddmm, lambda: {"x": torch.randn(T, D)}),
    "nn.LSTM": (Recurrent, tokens("x")),
}
