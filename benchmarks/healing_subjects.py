"""What ``healing.py`` heals: a dense model, text to calibrate and train on, and unseen text."""

from __future__ import annotations

import copy
import functools
import html
import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import quality_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ss1_compile
from ss1_compile.demo.data import MAX_TOKENS, load_articles, load_model, load_sentences
from ss1_compile.demo.measure import embed, rank_correlation
from ss1_compile.evaluation import Output

Batch = dict[str, Tensor]
UNSEEN, CALIBRATION = 256, 512
PADDED_TO = 16
PROMPT, AT_ONCE = 16, 4096


@dataclass(frozen=True)
class Options:
    """What to train on.

    Attributes:
        texts: at most so many; ``None`` takes all.
        batch: texts per batch.
        seed: of splits and orders.
        more: further plain text.
        cuts: how often articles are cut into spans, each time elsewhere.
        sampled: texts that a language model samples itself.
        directory: where these are kept.
    """

    texts: int | None
    batch: int
    seed: int
    more: Sequence[str] = ()
    cuts: int = 1
    sampled: int = 0
    directory: Path = Path("out/healing")


class Subject(Protocol):
    """One model.

    Attributes:
        name: for the results.
        dense: on its device.
        exclude: patterns of layers that stay dense.
        calibration: batches to compress (and plan) with, on the device.
        training: batches to heal with, on the device; none of the unseen text is in them.
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


@functools.cache
def sentences(body: str) -> list[str]:
    """Its sentences of more than 20 characters; every cut of the articles asks for them again."""
    return [s for s in re.split(r"(?<=[.!?]) +", body) if len(s) > 20]


def spans(bodies: Iterable[str], seed: int) -> list[str]:
    """One to five sentences that follow each other, from every sentence on, in random order."""
    generator = random.Random(seed)
    found: dict[str, None] = {}
    for body in bodies:
        parts = sentences(body)
        for start in range(len(parts)):
            length = generator.choice((1, 1, 2, 3, 5))
            found[" ".join(parts[start : start + length])] = None
    texts = list(found)
    generator.shuffle(texts)
    return texts


def all_spans(
    bodies: Sequence[str],
    further: Sequence[str],
    options: Options,
    unwanted: Sequence[str] = (),
) -> list[str]:
    """The spans of so many cuts of ``bodies`` and one of ``further``, in random order.

    Each once, and none of the unwanted.
    """
    cut = [text for i in range(options.cuts) for text in spans(bodies, options.seed + 1000 * i)]
    left = set(unwanted)
    found = [t for t in dict.fromkeys(cut + spans(further, options.seed)) if t not in left]
    random.Random(options.seed).shuffle(found)
    return found[: options.texts]


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
        options: ``texts`` (spans to train on at most; ``None`` takes all), ``batch`` (texts per
            training batch), ``seed`` (of the split of the articles), ``more`` (further plain text
            to train on), ``cuts`` (how often the articles are cut into spans), ``sampled`` (windows
            that SmolLM2 samples, which begin as windows of the articles do).
    """

    name = "all-MiniLM-L6-v2"
    exclude: tuple[str, ...] = ()
    unit = "texts"

    def __init__(self, device: torch.device, options: Options) -> None:
        seed, batch = options.seed, options.batch
        model, tokenizer = load_model()
        self.dense: nn.Module = model.to(device)
        self.output: Output | None = pooled
        articles = load_articles(1700, 0, 200, seed=seed)
        unseen = spans((article.body for article in articles.held_out), seed)[:UNSEEN]
        bodies = [article.body for article in articles.calibration]
        further = [" ".join(text.split()) for text in options.more]
        if options.sampled:
            further += sampled_news(device, bodies, options)
        training = all_spans(bodies, further, options, unwanted=unseen)

        def batches(part: Sequence[str], size: int, multiple: int = 1) -> list[Batch]:
            return tokenized(tokenizer, sorted(part, key=len), size, multiple)

        self.training = on(device, whole(batches(training, batch, PADDED_TO), batch))
        self.texts = batch * len(self.training)
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
        options: ``texts`` (windows of 256 tokens to train on at most; ``None`` takes all),
            ``batch`` (windows per training batch), ``seed`` (of the order of the windows, and
            which of them calibrate), ``more`` (further plain text to train on), ``cuts`` (how often
            the Wikipedia articles are cut into windows, each time elsewhere), ``sampled`` (windows
            that the model samples, which begin as some of the others do).
    """

    unit = "windows of 256 tokens"

    def __init__(self, device: torch.device, options: Options) -> None:
        seed, batch = options.seed, options.batch
        self._subject = quality_models.SmolLM2(device)
        self.name, self.exclude = self._subject.name, self._subject.exclude
        self.dense, self.output = self._subject.model, None
        self.calibration = self._subject.calibration(seed)
        news = load_articles(2000, 0, 0, seed=seed).calibration
        windows = self._subject.windows_but_evaluated(options.cuts)
        windows += self._subject.windows(["\n".join((a.title, a.body)) for a in news])
        windows += self._subject.windows(options.more)
        if options.sampled:
            windows += sampled_windows(self._subject, windows, options)
        random.Random(seed).shuffle(windows)
        windows = windows[: options.texts]
        stacks = [torch.stack(windows[i : i + batch]) for i in range(0, len(windows), batch)]
        batches = whole([{"input_ids": stack} for stack in stacks], batch)
        self.training: list[Batch] = on(device, batches)
        self.texts = batch * len(self.training)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Perplexity, and nats per token."""
        found = self._subject.evaluate(model)
        return {"perplexity": found["perplexity"], "nll": found["nll"]}


def sampled_windows(
    subject: quality_models.SmolLM2, windows: Sequence[Tensor], options: Options
) -> list[Tensor]:
    """Windows that the language model samples, each beginning as one of ``windows`` does.

    From a file if they are there already.
    """
    path = options.directory / f"sampled-{options.sampled}-{options.seed}.safetensors"
    if not path.is_file():
        batches = ss1_compile.sample_texts(
            copy.deepcopy(subject.model).bfloat16(),
            options.sampled,
            subject.window,
            prompts=torch.stack([window[:PROMPT] for window in windows]),
            at_once=AT_ONCE,
            seed=options.seed,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"input_ids": torch.cat([b["input_ids"] for b in batches])}, path)
    return list(load_file(path)["input_ids"])


def sampled_news(device: torch.device, bodies: Sequence[str], options: Options) -> list[str]:
    """What SmolLM2 makes of the beginnings of windows of news, as text."""
    subject = quality_models.SmolLM2(device)
    windows = sampled_windows(subject, subject.windows(bodies), options)
    texts = subject.texts(windows)
    return [" ".join(text.split()) for text in texts]


def whole(batches: list[Batch], size: int) -> list[Batch]:
    """Those of ``size`` texts: another size would be compiled once more for one batch.

    The only batch stays, whatever its size.
    """
    return [b for b in batches if len(b["input_ids"]) == size] or batches[:1]


def tokenized(tokenizer: Any, texts: Sequence[str], size: int, multiple: int = 1) -> list[Batch]:
    """Batches of ``size`` texts in their order, at most ``MAX_TOKENS`` tokens of each.

    Args:
        tokenizer: a fast one of Transformers, whose Rust part is called for thousands of texts at
            once. Transformers' own call makes Python's integers of the padding and the mask, too.
        texts: any.
        size: texts per batch; the last has what is left.
        multiple: every batch is padded to a multiple of so many tokens.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 ``[texts, tokens]``.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(MAX_TOKENS)
    counts: list[int] = []
    parts = [np.empty(0, np.int64)]
    for start in range(0, len(texts), AT_ONCE):
        encoded = backend.encode_batch_fast(list(texts[start : start + AT_ONCE]))
        rows = [encoding.ids for encoding in encoded]
        counts += map(len, rows)
        parts.append(np.fromiter(itertools.chain.from_iterable(rows), np.int64))
    tokens = torch.from_numpy(np.concatenate(parts))
    found: list[Batch] = []
    for start in range(0, len(counts), size):
        mine = torch.tensor(counts[start : start + size])
        width = -(-int(mine.max()) // multiple) * multiple
        mask = torch.arange(width) < mine[:, None]
        ids = torch.full(mask.shape, tokenizer.pad_token_id)
        ids[mask], tokens = tokens.split([total := int(mine.sum()), len(tokens) - total])
        found.append({"input_ids": ids, "attention_mask": mask.long()})
    return found


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
            lines = (" ".join(line.split()) for line in text.splitlines())
            texts.append("\n".join(line for line in lines if line))
    return texts


SUBJECTS: dict[str, type[MiniLM] | type[SmolLM2]] = {"minilm": MiniLM, "smollm2": SmolLM2}
