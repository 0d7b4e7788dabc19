"""How the demo measures quality and speed."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ss1_compile.compression.compress import compress
from ss1_compile.demo.data import Articles, Batch, encoder_layer, tokenize
from ss1_compile.errors import SS1Warning


@dataclass(frozen=True)
class Embeddings:
    """Unit-length sentence embeddings, float32 ``[documents, features]``."""

    labelled: Tensor
    held_out: Tensor
    titles: Tensor


@dataclass(frozen=True)
class Quality:
    """A compressed model against the dense one on held-out text.

    Attributes:
        cosine: mean cosine of an embedding to the dense model's.
        spearman: rank correlation of all pairwise similarities with the dense model's.
        retrieval: share of titles whose nearest body is their own.
        accuracy: share of documents whose nearest section centroid is their own section's.
    """

    cosine: float
    spearman: float
    retrieval: float
    accuracy: float


@torch.inference_mode()
def embed(model: Callable[..., Any], batches: Sequence[Batch]) -> Tensor:
    """Mean-pooled, normalised embeddings of every text in the batches."""
    rows = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        rows.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(rows), dim=-1)


class Examiner:
    """Tokenizes the documents once and scores models on them."""

    def __init__(self, articles: Articles, tokenizer: Any) -> None:
        self._sections = sorted({article.section for article in articles.labelled})
        self._labels = self._label(articles.labelled)
        self._truth = self._label(articles.held_out)
        self._batches = {
            "labelled": tokenize(tokenizer, [a.body for a in articles.labelled]),
            "held_out": tokenize(tokenizer, [a.body for a in articles.held_out]),
            "titles": tokenize(tokenizer, [a.title for a in articles.held_out]),
        }

    def _label(self, articles: Sequence[Any]) -> Tensor:
        return torch.tensor([self._sections.index(article.section) for article in articles])

    def embed(self, model: nn.Module) -> Embeddings:
        """All documents through ``model``."""
        return Embeddings(**{name: embed(model, b) for name, b in self._batches.items()})

    def score(self, model: Embeddings, dense: Embeddings) -> Quality:
        """The figures of ``model``; those of the dense model are relative to itself."""
        nearest_body = (model.titles @ model.held_out.T).argmax(1)
        centroids = torch.stack(
            [model.labelled[self._labels == i].mean(0) for i in range(len(self._sections))]
        )
        nearest_section = (model.held_out @ nn.functional.normalize(centroids).T).argmax(1)
        return Quality(
            cosine=float((model.held_out * dense.held_out).sum(1).mean()),
            spearman=rank_correlation(model.held_out, dense.held_out),
            retrieval=float((nearest_body == torch.arange(len(nearest_body))).float().mean()),
            accuracy=float((nearest_section == self._truth).float().mean()),
        )


def rank_correlation(embeddings: Tensor, reference: Tensor) -> float:
    """Spearman's rank correlation of the pairwise similarities of two sets ``[n, features]``."""
    from scipy.stats import spearmanr

    count = len(reference)
    pairs = torch.triu_indices(count, count, 1).unbind()
    similarities = [(e @ e.T)[pairs].numpy() for e in (embeddings, reference)]
    return float(spearmanr(*similarities).statistic)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖`` in float64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


class Speed:
    """Times dense ``torch.compile`` against SS1 in the same run and keeps the medians.

    Attributes:
        results: rows with ``subject``, ``reduction`` (``None`` is dense), ``median_ms`` and
            ``speedup`` over the dense row of the same subject.
    """

    def __init__(self, *, rounds: int, console: Console) -> None:
        self.results: list[dict[str, Any]] = []
        self._rounds, self._console = rounds, console

    def minilm(
        self, models: Mapping[int, nn.Module], sample: Batch
    ) -> dict[int, tuple[nn.Module, Callable[..., Any]]]:
        """Compile and time whole models on ``sample``; c → (eager, compiled). 1 is dense."""
        compiled = self._compile("MiniLM", models, lambda model: model(**sample))
        tokens = "×".join(map(str, sample["input_ids"].shape))
        self._time(
            f"MiniLM, whole model, {tokens} tokens",
            {c: partial(model, **sample) for c, model in compiled.items()},
            calls=2,
        )
        return {c: (models[c], compiled[c]) for c in models}

    def encoder_layer(self, reductions: Sequence[int]) -> None:
        """Compile and time an encoder layer in the shape of BERT-base."""
        dense = encoder_layer()
        models = {1: dense} | {c: _compressed(dense, c) for c in reductions}
        x = torch.randn(16, 128, 768)
        compiled = self._compile("BERT layer", models, lambda model: model(inputs_embeds=x))
        self._time(
            "BERT-base encoder layer, 16×128 tokens",
            {c: partial(model, inputs_embeds=x) for c, model in compiled.items()},
            calls=4,
        )

    def linears(self, reductions: Sequence[int]) -> None:
        """Time the linear layers of BERT-base alone, eagerly: there is nothing to fuse."""
        for k, n in ((768, 768), (768, 3072), (3072, 768)):
            dense = nn.Sequential(nn.Linear(k, n))
            x = torch.randn(2048, k)
            models = {1: dense} | {c: _compressed(dense, c) for c in reductions}
            self._time(
                f"linear {k} → {n}, 2048 rows",
                {c: partial(model, x) for c, model in models.items()},
                calls=8,
            )

    def _compile(
        self,
        title: str,
        models: Mapping[int, nn.Module],
        call: Callable[[Any], object],
    ) -> dict[int, Any]:
        """Compile each model and run it once."""
        torch._dynamo.reset()  # models of one class share Dynamo's cache, which is limited
        compiled: dict[int, Any] = {}
        todo = track(
            models.items(),
            description=f"compiling {title}",
            total=len(models),
            console=self._console,
            transient=True,
        )
        with torch.inference_mode():
            for c, model in todo:
                backend = "inductor" if c == 1 else "ss1"
                compiled[c] = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
                call(compiled[c])
        return compiled

    def _time(
        self, subject: str, candidates: Mapping[int, Callable[[], object]], *, calls: int
    ) -> None:
        """Add the median milliseconds of one call of each candidate.

        Every round calls each candidate ``calls`` times in turn, so that a change of the machine's
        speed during the measurement meets all of them alike. The first call of each turn is not
        counted: its caches are the previous candidate's.
        """
        times: dict[int, list[float]] = {c: [] for c in candidates}
        rounds = track(
            range(self._rounds), f"timing {subject}", console=self._console, transient=True
        )
        with torch.inference_mode():
            for _ in rounds:
                for c, call in candidates.items():
                    call()
                    for _ in range(calls):
                        start = time.perf_counter()
                        call()
                        times[c].append(time.perf_counter() - start)
        medians = {c: 1e3 * statistics.median(values) for c, values in times.items()}
        for c, milliseconds in medians.items():
            self.results.append(
                {
                    "subject": subject,
                    "reduction": None if c == 1 else c,
                    "median_ms": round(milliseconds, 3),
                    "speedup": round(medians[1] / milliseconds, 3),
                }
            )


def _compressed(dense: nn.Module, reduction: int) -> nn.Module:
    model = copy.deepcopy(dense)
    with warnings.catch_warnings():
        # Random weights: only the time matters here.
        warnings.simplefilter("ignore", SS1Warning)
        compress(model, reduction=reduction, progress=False)
    return model
