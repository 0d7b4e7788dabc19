"""What ``healing.py`` heals: a dense model, text to calibrate and train on, and unseen text."""

from __future__ import annotations

import html
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import quality_models
import torch
from torch import Tensor, nn

from ss1_compile.demo.data import load_articles, load_model, load_sentences, tokenize
from ss1_compile.demo.measure import embed, rank_correlation
from ss1_compile.evaluation import Output

Batch = dict[str, Tensor]
UNSEEN, CALIBRATION = 256, 512


class Subject(Protocol):
    """One model.

    Attributes:
        name: for the results.
        dense: on its device.
        exclude: patterns of layers that stay dense.
        calibration: batches to compress (and plan) with, on the device.
        training: batches to heal with, on the CPU; none of the unseen text is in them.
        output: what to match in place of the model's own output.
        unit: of ``texts``.
        texts: how many are trained on.
        aim: figure → its aim, relative to the dense model's for a perplexity.
    """

    name: str
    dense: nn.Module
    exclude: tuple[str, ...]
    calibration: list[Batch]
    training: list[Batch]
    output: Output | None
    unit: str
    texts: int

    def figures(self, model: nn.Module) -> dict[str, float]:
        """What the model is worth on unseen text; the first is the one that counts."""


def spans(bodies: Iterable[str], seed: int) -> list[str]:
    """One to five sentences that follow each other, from every sentence on, in random order."""
    generator = random.Random(seed)
    found: dict[str, None] = {}
    for body in bodies:
        sentences = [s for s in re.split(r"(?<=[.!?]) +", body) if len(s) > 20]
        for start in range(len(sentences)):
            length = generator.choice((1, 1, 2, 3, 5))
            found[" ".join(sentences[start : start + length])] = None
    texts = list(found)
    generator.shuffle(texts)
    return texts


def pooled(model: nn.Module, batch: Any) -> Tensor:
    """Sentence embeddings ``[texts, features]``, differentiable."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class MiniLM:
    """all-MiniLM-L6-v2 on news: spans of 1700 BBC articles, judged on spans of 200 others.

    Also judged on sentences from docstrings, a kind of text that none of the training is of.

    Args:
        device: to run on.
        texts: spans to train on at most; ``None`` takes all.
        batch: texts per training batch.
        seed: of the split of the articles.
        more: further plain text to train on.
    """

    name = "all-MiniLM-L6-v2"
    exclude: tuple[str, ...] = ()
    unit = "texts"

    def __init__(
        self, device: torch.device, texts: int | None, batch: int, seed: int, more: Sequence[str]
    ) -> None:
        model, tokenizer = load_model()
        self.dense: nn.Module = model.to(device)
        self.output: Output | None = pooled
        articles = load_articles(1700, 0, 200, seed=seed)
        unseen = spans((article.body for article in articles.held_out), seed)[:UNSEEN]
        held_out = set(unseen)
        mine = [" ".join(text.split()) for text in more]
        training = spans([*(article.body for article in articles.calibration), *mine], seed)
        training = [text for text in training if text not in held_out][:texts]
        self.texts = len(training)

        def batches(part: Sequence[str], size: int) -> list[Batch]:
            return tokenize(tokenizer, sorted(part, key=len), batch_size=size)

        self.training = batches(training, batch)
        self.calibration = on(device, batches(training[:CALIBRATION], 32))
        self._unseen = {
            "": on(device, batches(unseen, 32)),
            "docstring_": on(device, batches(load_sentences(UNSEEN, seed=seed), 32)),
        }
        self._dense = {kind: embed(model, part).cpu() for kind, part in self._unseen.items()}

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Cosine to the dense embeddings and rank correlation of similarities, of both texts."""
        found = {}
        for kind, part in self._unseen.items():
            mine, dense = embed(model, part).cpu(), self._dense[kind]
            found[f"{kind}cosine"] = float((mine * dense).sum(1).mean())
            found[f"{kind}rank_correlation"] = rank_correlation(mine, dense)
        return found


class SmolLM2:
    """SmolLM2-135M, blocks 2 … 27, trained on Wikipedia and BBC articles.

    Judged by the perplexity on the Wikipedia articles that ``quality_models.SmolLM2`` holds out.

    Args:
        device: to run on.
        texts: windows of 256 tokens to train on at most; ``None`` takes all.
        batch: windows per training batch.
        seed: of the order of the windows, and which of them calibrate.
        more: further plain text to train on.
    """

    unit = "windows of 256 tokens"

    def __init__(
        self, device: torch.device, texts: int | None, batch: int, seed: int, more: Sequence[str]
    ) -> None:
        self._subject = quality_models.SmolLM2(device)
        self.name, self.exclude = self._subject.name, self._subject.exclude
        self.dense, self.output = self._subject.model, None
        self.calibration = self._subject.calibration(seed)
        news = load_articles(2000, 0, 0, seed=seed).calibration
        windows = self._subject.windows_but_evaluated()
        windows += self._subject.windows(["\n".join((a.title, a.body)) for a in news])
        windows += self._subject.windows(more)
        random.Random(seed).shuffle(windows)
        windows = windows[:texts]
        self.texts = len(windows)
        stacks = [torch.stack(windows[i : i + batch]) for i in range(0, len(windows), batch)]
        self.training: list[Batch] = [{"input_ids": stack} for stack in stacks]

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Perplexity, and nats per token."""
        found = self._subject.evaluate(model)
        return {"perplexity": found["perplexity"], "nll": found["nll"]}


def on(device: torch.device, batches: list[Batch]) -> list[Batch]:
    """The batches on ``device``."""
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Documents: text and HTML files (without their markup), and all of those in folders."""
    texts = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".html"))
        for file in inside if path.is_dir() else [path]:
            text = file.read_text(encoding="utf-8", errors="replace")
            if file.suffix == ".html":
                text = html.unescape(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", text))
            texts.append(re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip())
    return texts


SUBJECTS: dict[str, type[MiniLM] | type[SmolLM2]] = {"minilm": MiniLM, "smollm2": SmolLM2}
