"""Whole models on a GPU, dense against SS1, both compiled, in one run.

    python benchmarks/models.py                       # results/models.json
    python benchmarks/models.py --match bert-large   # measure these, keep the others of the file
    python benchmarks/models.py --smoke               # tiny models, to see that all of it runs

Random weights from the published sizes, bfloat16, no gradients. Dense is compiled with
``max-autotune-no-cudagraphs`` and by default (the faster counts), SS1 with ``backend="ss1"``;
transformer blocks are compiled one by one (equal blocks share a graph) in both. Timed are launched
calls, and replays of one CUDA graph of the same call: what launching costs is the difference.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import harness
import torch
from compiled import Case, Choose, Variant, measure
from decoding import Decoder
from rich.console import Console
from rich.table import Table
from torch import nn

BERT_LAYERS = (1, 6, 8, 9, *range(15, 25))
"""The projected layers of the paper's BERT-large, counted from 1."""


def everywhere(pattern: str, c: int, layers: tuple[int, ...] | None = None) -> Choose:
    """``c`` for names that match ``pattern``, whose group 1 is the layer, in ``layers``."""
    compiled = re.compile(pattern)

    def choose(name: str) -> int | None:
        match = compiled.search(name)
        if match is None or (layers is not None and int(match[1]) not in layers):
            return None
        return c

    return choose


def on_gpu(make: Callable[[], nn.Module]) -> nn.Module:
    """A frozen bfloat16 module on the GPU, in eval mode, of a fixed seed."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(dtype)


def _ids(vocabulary: int, batch: int, length: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randint(vocabulary, (batch, length), device="cuda"),)


def _pixels(batch: int, size: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(batch, 3, size, size, device="cuda", dtype=torch.bfloat16),)


def bert_cases(smoke: bool) -> Iterator[Case]:
    """BERT-large, 128 tokens: the paper's 14 layers at c = 8, and all encoder linears at c = 4."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    sizes["intermediate_size"] = 4096
    if smoke:
        sizes.update(hidden_size=128, num_hidden_layers=2, num_attention_heads=2)
        sizes["intermediate_size"] = 512
    config = BertConfig(**sizes, attn_implementation="sdpa")
    paper = everywhere(r"encoder\.layer\.(\d+)\.", 8, tuple(i - 1 for i in BERT_LAYERS))
    every = everywhere(r"encoder\.layer\.(\d+)\.", 4)
    variants = (
        Variant("14 layers of the paper, c = 8", paper),
        Variant("all encoder linears, c = 4", every),
    )
    for batch in (8, 16, 32, 64, 128):
        yield Case(
            model="bert-large",
            size=f"{batch} x 128",
            build=lambda: on_gpu(lambda: BertModel(config, add_pooling_layer=False)),
            inputs=_ids(30522, batch, 128),
            variants=variants,
            blocks=lambda m: m.encoder.layer,
            profiled=["dense", *(v.label for v in variants)] if batch == 128 else [],
            extra={"batch": batch},
        )


def gpt2_cases(smoke: bool) -> Iterator[Case]:
    """GPT-2 small, medium, large, 1024 tokens: the FFNs at c = 2, 4, 8."""
    from transformers import GPT2Config, GPT2LMHeadModel

    for name, width, layers, heads, batch in (
        ("s", 768, 12, 12, 32),
        ("m", 1024, 24, 16, 16),
        ("l", 1280, 36, 20, 16),
    ):
        if smoke:
            width, layers, heads, batch = 128, 2, 2, 2
        config = GPT2Config(
            n_embd=width, n_layer=layers, n_head=heads, attn_implementation="sdpa", use_cache=False
        )
        yield Case(
            model=f"gpt2-{name}",
            size=f"{batch} x 1024",
            build=lambda config=config: on_gpu(lambda: GPT2LMHeadModel(config)),
            inputs=_ids(50257, batch, 1024),
            variants=[
                Variant(f"FFN, c = {c}", everywhere(r"\.h\.(\d+)\.mlp\.", c)) for c in (2, 4, 8)
            ],
            blocks=lambda m: m.transformer.h,
        )


class _Prefill(nn.Module):
    """A causal model that returns the logits of the last position only, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, use_cache=False, logits_to_keep=1).logits
        return logits


def llama_cases(smoke: bool) -> Iterator[Case]:
    """Llama-3-8B shapes: prefill of 8192 tokens, and one token with a KV cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    if smoke:
        sizes |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
    config = LlamaConfig(**sizes, attn_implementation="sdpa", max_position_embeddings=8192)
    last = tuple(range(18, 28)) if not smoke else (1,)
    variants = (
        Variant("layers 18-27, c = 8", everywhere(r"layers\.(\d+)\.", 8, last)),
        Variant("all layers, c = 4", everywhere(r"layers\.(\d+)\.", 4)),
    )
    length = 8192 if not smoke else 64
    yield Case(
        model="llama-3-8b",
        size=f"prefill {length}",
        build=lambda: on_gpu(lambda: _Prefill(LlamaForCausalLM(config))),
        inputs=_ids(sizes["vocab_size"], 1, length),
        variants=variants,
        blocks=lambda m: m.model.model.layers,
        tokens=length,
    )
    for batch in (1, 16):
        yield Case(
            model="llama-3-8b decode",
            size=f"batch {batch}, 2048 cached",
            build=lambda: on_gpu(
                lambda: Decoder(
                    layers=sizes["num_hidden_layers"],
                    width=sizes["hidden_size"],
                    inner=sizes["intermediate_size"],
                    heads=sizes["num_attention_heads"],
                    kv_heads=sizes["num_key_value_heads"],
                    vocabulary=sizes["vocab_size"],
                )
            ),
            inputs=lambda batch=batch: Decoder.inputs(
                batch, 2048, sizes["num_hidden_layers"], sizes["num_key_value_heads"],
                sizes["hidden_size"] // sizes["num_attention_heads"],
            ),
            variants=variants,
            blocks=lambda m: m.layers,
            tokens=batch,
        )  # fmt: skip


def vision_cases(smoke: bool) -> Iterator[Case]:
    """ViT-B and ViT-L of transformers and MLP-Mixer-L of timm, 224 pixels."""
    from transformers import ViTConfig, ViTModel

    for name, width, layers, heads in (("b", 768, 12, 12), ("l", 1024, 24, 16)):
        if smoke:
            width, layers, heads = 128, 2, 2
        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            attn_implementation="sdpa",
        )
        batch = 128 if not smoke else 2
        yield Case(
            model=f"vit-{name}",
            size=f"{batch} x 224²",
            build=lambda config=config: on_gpu(lambda: ViTModel(config, add_pooling_layer=False)),
            inputs=_pixels(batch, 224),
            variants=[
                Variant(f"all encoder linears, c = {c}", everywhere(r"layers?\.(\d+)\.", c))
                for c in (4, 8)
            ],
            blocks=_vit_layers,
        )
    import timm

    batch = 256 if not smoke else 2
    yield Case(
        model="mixer-l",
        size=f"{batch} x 224²",
        build=lambda: on_gpu(
            lambda: timm.create_model("mixer_l16_224" if not smoke else "mixer_s32_224")
        ),
        inputs=_pixels(batch, 224),
        variants=[
            Variant(f"channel MLPs, c = {c}", everywhere(r"blocks\.(\d+)\.mlp_channels", c))
            for c in (4, 8)
        ],
        blocks=lambda m: m.blocks,
    )


def _vit_layers(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if type(m).__name__ == "ViTLayer")


def dlrm_cases(smoke: bool) -> Iterator[Case]:
    """The top MLP of DLRM (MLPerf sizes), where the last layer, to one output, stays dense."""

    def top() -> nn.Module:
        widths = (480, 1024, 1024, 512, 256, 1)
        layers: list[nn.Module] = []
        for k, n in itertools.pairwise(widths):
            layers += [nn.Linear(k, n), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    for batch in (2048, 32768) if not smoke else (8,):
        yield Case(
            model="dlrm top MLP",
            size=f"batch {batch}",
            build=lambda: on_gpu(top),
            inputs=lambda batch=batch: (
                torch.randn(batch, 480, device="cuda", dtype=torch.bfloat16),
            ),
            variants=[Variant(f"first four linears, c = {c}", everywhere(r"^([0246])$", c))
                      for c in (2, 4)],
        )  # fmt: skip


FAMILIES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "bert": bert_cases,
    "llama": llama_cases,
    "gpt2": gpt2_cases,
    "vision": vision_cases,
    "dlrm": dlrm_cases,
}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    columns = ("model", "size", "variant", "kind", "ms", "speedup", "graph_ms", "graph_speedup")
    columns += ("peak_mb", "weights_mb", "first_call_s")
    table = Table(*columns)
    for row in rows:
        table.add_row(*("" if row.get(c) is None else str(row[c]) for c in columns))
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--match", default="", help="only cases whose 'model, size' has this regex")
    parser.add_argument("--variants", default="", help="only variants whose label has this regex")
    parser.add_argument("--smoke", action="store_true", help="tiny models; writes no results")
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement")
    options = parser.parse_args()
    result: dict[str, Any] = {"rows": []}
    if not options.smoke and (harness.RESULTS / "models.json").is_file():
        result = harness.read("models")
    result["environment"] = harness.environment()
    for cases in FAMILIES.values():
        for case in cases(options.smoke):
            if not re.search(options.match, f"{case.model}, {case.size}"):
                continue
            wanted = [v for v in case.variants if re.search(options.variants, v.label)]
            rows = measure(replace(case, variants=wanted), options.seconds)
            show(rows)
            here = (case.model, case.size)
            kept = [row for row in result["rows"] if (row["model"], row["size"]) != here]
            result["rows"] = kept + rows
            if not options.smoke:
                harness.write("models", result)


if __name__ == "__main__":
    main()
