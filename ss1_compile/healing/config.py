"""How to heal, and what healing did."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table

from ss1_compile.errors import ConfigError
from ss1_compile.report import render

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """How to heal. Frozen, validated on construction.

    Attributes:
        steps: end-to-end optimiser steps.
        seconds: train end to end for so long in place of ``steps``: the learning rate follows the
            clock. Compiling and recording count, evaluating and saving do not. A resumed run goes
            on with the time that is left; the number of steps, and so the result, varies.
        block_steps: steps block by block before them; 0 leaves them out.
        learning_rate: of AdamW, the greatest; it rises over the first 5 % of each phase and falls
            to nothing along a cosine.
        hidden_weight: of the hidden states beside the outputs; 0 leaves them out.
        label_weight: of the text's own next tokens (mean negative log-likelihood) beside the
            teacher's outputs, for language models: what is healed gets to know the text, too.
        clip: greatest norm of the gradient.
        train: ``"ss1"`` trains SS1 layers, norms and the biases of the other layers; ``"all"``
            every parameter.
        precision: of the forward pass; ``None`` means bfloat16 for models of 16 bits and on CUDA
            devices that support it, float32 elsewhere. What is trained is float32 in any case.
        gradient_checkpointing: recompute activations, through the model's own switch.
        compile: compile the blocks of both models and the loss (``torch.compile``). Pays from some
            hundred steps on, on CUDA, where the blocks are alike (planned ones are with
            ``materialize`` only). Steps are then repeatable on the same software only, and a
            resumed run ends at nearly the same weights. Where it fails, healing warns and goes on
            without.
        materialize: run layers with learned sketches as dense ones, with ``W = z Sᵀ`` made once a
            step: c times the multiplications, but for layers of some hundred features less time
            and memory traffic, and blocks are alike whatever their sketches. What is trained is
            the same; rounding differs.
        cuda_graphs: record each step in a CUDA graph, one for each of the first 16 forms of batches
            (structure, shapes, dtypes), so that small models do not wait for the host. Memory that
            recordings take, as much as the largest batch needs, is not there for evaluations. Where
            it fails, healing warns and goes on without.
        seed: of the order of the batches.
        save_every: steps between states written to the directory.
        evaluate_every: steps between evaluations; 0 evaluates before and after only.
        keep_best: end with the parameters of the best evaluation, where training went on to learn
            its text by heart. Needs ``held_out`` or a function as ``metric``.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    steps: int = 400
    seconds: float | None = None
    block_steps: int = 0
    learning_rate: float = 1e-3
    hidden_weight: float = 1.0
    label_weight: float = 0.0
    clip: float = 1.0
    train: Literal["ss1", "all"] = "ss1"
    precision: Precision | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    materialize: bool = False
    cuda_graphs: bool = False
    seed: int = 0
    save_every: int = 100
    evaluate_every: int = 0
    keep_best: bool = False

    def __post_init__(self) -> None:
        least = {"steps": 0, "block_steps": 0, "seed": 0, "save_every": 1, "evaluate_every": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise ConfigError(
                    f"{name} must be an integer of at least {smallest}, got {value!r}"
                )
        if self.seconds is None and self.steps + self.block_steps < 1:
            raise ConfigError("steps and block_steps are both 0: there is nothing to do")
        for name in ("learning_rate", "clip", "hidden_weight", "label_weight", "seconds"):
            value = getattr(self, name)
            if value is None and name == "seconds":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            least_value = 0 if name.endswith("weight") else math.ulp(0.0)
            if not number or not least_value <= value < math.inf:
                raise ConfigError(f"{name} must be a positive finite number, got {value!r}")
        switches = ("gradient_checkpointing", "compile", "materialize", "cuda_graphs", "keep_best")
        for name in switches:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.train not in ("ss1", "all"):
            raise ConfigError(f"train must be 'ss1' or 'all', got {self.train!r}")
        if self.precision not in (None, "float32", "bfloat16"):
            raise ConfigError(
                f"precision must be None, 'float32' or 'bfloat16', got {self.precision!r}"
            )


@dataclass
class Healing:
    """What :func:`ss1_compile.heal` did.

    Attributes:
        curve: a dict per ten steps and per evaluation: ``step``, ``phase`` (``"blocks"`` or
            ``"model"``), ``loss`` (mean since the last entry; ``None`` where only evaluated),
            ``seconds`` of training so far, and ``metric`` where one was evaluated.
        metric: its name, or ``None``.
        trained: numbers that were trained.
        steps: optimiser steps done, those of earlier runs included.
        kept: the step whose parameters the model has, with ``keep_best``; else ``None``.
        seconds: of training, those of earlier runs included.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    metric: str | None = None
    trained: int = 0
    steps: int = 0
    kept: int | None = None
    seconds: float = 0.0

    def to_json(self, indent: int | None = 1) -> str:
        """As a JSON document."""
        return json.dumps(asdict(self), indent=indent)

    @property
    def figures(self) -> tuple[float, float] | None:
        """The metric before and after (of what was kept); ``None`` without one."""
        found = [entry for entry in self.curve if entry.get("metric") is not None]
        if not found:
            return None
        last = next((entry for entry in found if entry["step"] == self.kept), found[-1])
        return found[0]["metric"], last["metric"]

    def __rich__(self) -> Table:
        title = f"{self.steps} steps, {self.trained / 1e6:.2f} M numbers, {self.seconds:.0f} s"
        caption = None if self.kept is None else f"kept: step {self.kept}"
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        for name in ("step", "phase", "loss", self.metric or "metric"):
            table.add_column(name, justify="left" if name == "phase" else "right")
        stride = max(1, len(self.curve) // 20)
        for i, entry in enumerate(self.curve):
            metric = entry.get("metric")
            if metric is None and i % stride:
                continue
            loss = "" if entry["loss"] is None else f"{entry['loss']:.4g}"
            cells = (str(entry["step"]), entry["phase"], loss)
            table.add_row(*cells, "" if metric is None else f"{metric:.4f}")
        return table

    def __str__(self) -> str:
        return render(self)
