"""Heal MiniLM after compression, and watch the cosine and the rank correlation on unseen text.

    python benchmarks/healing.py --device cuda --steps 4000           the full run, on a GPU
    python benchmarks/healing.py --device cpu --steps 60 --texts 640  a few minutes' proof

The row of the same device and reduction in results/healing.json is replaced. Training text, the
planner's and the calibration's, and the 256 texts of the figures are disjoint.
"""

from __future__ import annotations

import argparse
import copy
import platform
import re
from typing import Any

import harness
import torch
from torch import nn

import ss1_compile
from ss1_compile.demo.data import load_articles, load_model, load_sentences, tokenize
from ss1_compile.demo.measure import embed, rank_correlation

NAME = "healing"
CALIBRATION, UNSEEN = 512, 256


def texts(count: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Calibration, training and unseen texts: docstrings' sentences, then news in their place."""
    every = load_sentences(3000, seed=seed)
    unseen, rest = every[:UNSEEN], every[UNSEEN:]
    calibration, training = rest[:CALIBRATION], rest[CALIBRATION:]
    articles = load_articles(1800, 0, 200, seed=seed)
    news = [
        part
        for article in articles.calibration
        for part in re.split(r"(?<=[.!?]) ", article.body)
        if 40 < len(part) < 300
    ]
    return calibration, (training + news)[:count], unseen


def pooled(model: nn.Module, batch: Any) -> torch.Tensor:
    """Sentence embeddings ``[texts, features]``, differentiable."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def measure(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    dense, tokenizer = load_model()
    dense = dense.to(device)
    calibration, training, unseen = (
        [
            {name: tensor.to(device) for name, tensor in batch.items()}
            for batch in tokenize(tokenizer, sorted(part, key=len), batch_size=32)
        ]
        for part in texts(arguments.texts, arguments.seed)
    )
    config = ss1_compile.SS1Config(
        projection="learned", reduction=arguments.reduction, warn_error=10.0
    )
    if arguments.plan:
        target = 1 / arguments.reduction
        plan = ss1_compile.plan(dense, calibration, target, config=config, output=pooled)
        config = plan.config
    model = copy.deepcopy(dense)
    ss1_compile.compress(model, config, calibration, sequential=arguments.sequential)
    reference = embed(dense, unseen)
    figures: list[dict[str, float]] = []

    def cosine(healed: nn.Module) -> float:
        embeddings = embed(healed, unseen)
        mean = float((embeddings * reference).sum(1).mean())
        rank = rank_correlation(embeddings.cpu(), reference.cpu())
        figures.append({"cosine": round(mean, 4), "spearman": round(rank, 4)})
        print(figures[-1], flush=True)
        return mean

    result = ss1_compile.heal(
        model,
        dense,
        training,
        steps=arguments.steps,
        block_steps=arguments.block_steps,
        learning_rate=arguments.learning_rate,
        evaluate_every=max(1, arguments.steps // arguments.evaluations),
        seed=arguments.seed,
        output=pooled,
        metric=cosine,
    )
    print(result)
    names = ("device", "reduction", "plan", "sequential", "texts", "steps", "block_steps")
    row: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    row |= {"learning_rate": arguments.learning_rate, "seed": arguments.seed}
    row["on"] = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    row |= {"torch": torch.__version__, "seconds": round(result.seconds, 1)}
    row |= {"before": figures[0], "after": figures[-1], "curve": result.curve}
    try:
        rows = harness.read(NAME)["rows"]
    except FileNotFoundError:
        rows = []
    key = ("device", "reduction", "plan", "seed")
    rows = [r for r in rows if any(r[k] != row[k] for k in key)]
    print(harness.write(NAME, {"rows": [*rows, row]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reduction", type=float, default=4)
    parser.add_argument("--plan", action="store_true", help="planned c's of equal cost")
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--texts", type=int, default=20000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--block-steps", type=int, default=0)
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    measure(parser.parse_args())
