"""``heal``: distil the dense model into the compressed one, for minutes and without labels.

First, if asked for, block by block: every block learns to do what the dense one does, on the dense
model's hidden states. Then end to end: outputs and hidden states of the whole model. Only what a
compressed model has little of is trained: z, learned sketches, biases and norms.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ss1_compile.errors import CalibrationError, ConfigError, TrainingError
from ss1_compile.evaluation import Evaluation, Output
from ss1_compile.healing.best import Best, best_of
from ss1_compile.healing.compiled import compiled_if_it_works
from ss1_compile.healing.config import HealConfig, Healing
from ss1_compile.healing.graphs import Graphs, as_recorded
from ss1_compile.healing.loss import Distillation
from ss1_compile.healing.materialized import Materialized
from ss1_compile.healing.prepare import (
    check_trainable,
    make_accelerator,
    precision_of,
    prepared,
    to_device,
)
from ss1_compile.healing.schedule import bar, is_over, rate, spent
from ss1_compile.healing.state import HealingState, read_state, write_state
from ss1_compile.healing.update import Update
from ss1_compile.option_checks import reject_unknown_keys


def heal(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    config: HealConfig | None = None,
    *,
    held_out: Iterable[Any] | None = None,
    metric: str | Callable[[nn.Module], float] = "cosine",
    more_is_better: bool | None = None,
    output: Output | None = None,
    directory: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Healing:
    """Train ``model``, in place, to compute what ``teacher`` does.

    The same seed, data, model and device give the same result, also when a run was interrupted and
    resumed (not with ``seconds``, which the clock ends). Dropout is off. Parameters of 16-bit
    models are float32 while they train and are converted back at the end.

    Args:
        model: compressed (:func:`ss1_compile.compress`), on the device to train on.
        teacher: the dense model, on the same device; it is not changed.
        data: batches, on any device, as in :func:`ss1_compile.calibrate`; all are kept, and run
            through in a new order each time.
        config: how; or pass the fields of :class:`HealConfig` as keywords.
        held_out: batches to evaluate on before, after and every ``evaluate_every`` steps.
        metric: ``"cosine"`` of the outputs to the teacher's, ``"perplexity"``, or a function of the
            model; for ``held_out``, or a function also without.
        more_is_better: of a metric that is a function; ``keep_best`` needs to know.
        output: ``output(model, batch)``: what to match in place of the model's ``logits``,
            ``last_hidden_state`` or first tensor. Differentiable.
        directory: where the state is written, as safetensors; if there is one of the same run, it
            is resumed.
        progress: show a progress bar with the loss and the time left.
        **options: fields of :class:`HealConfig`, in place of ``config``.

    Raises:
        ConfigError: bad options, no SS1 layers, quantised ones, no repeated blocks for
            ``block_steps``, a model without gradient checkpointing, nothing to evaluate for
            ``keep_best``.
        CalibrationError: no batches.
        TrainingError: the loss is not finite.
        CheckpointError: the directory has the state of another run.
        MissingPackageError: accelerate is not installed.
    """
    if config is not None and options:
        raise ConfigError(f"pass either config or options, not both ({', '.join(options)})")
    config = HealConfig(**_known(options)) if config is None else config
    model, teacher = (getattr(m, "_orig_mod", m) for m in (model, teacher))
    check_trainable(model)
    batches = list(data)
    if not batches:
        raise CalibrationError("there are no batches to heal with")
    evaluation = None
    if held_out is not None or callable(metric):
        evaluation = Evaluation(metric, teacher, held_out or (), output)
    best = best_of(metric, more_is_better, evaluation) if config.keep_best else None
    loss_of = Distillation(model, teacher, config.hidden_weight, output, config.label_weight)
    if config.block_steps and not loss_of.blocks:
        raise ConfigError(
            "block_steps needs a ModuleList or Sequential with SS1 layers in several members, "
            "which this model has not; use block_steps=0"
        )
    device = next(model.parameters()).device
    if config.cuda_graphs and device.type != "cuda":
        raise ConfigError(f"cuda_graphs needs the model on a CUDA device, and it is on {device}")
    run = _Run((model, teacher), config, batches, loss_of, evaluation, best, directory)
    with prepared(model, teacher, config) as trained:
        run.train(trained, progress)
    return run.result


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    reject_unknown_keys(options, [field.name for field in fields(HealConfig)])
    return dict(options)


class _Run:
    """One healing, from its first step or from a state on disk."""

    def __init__(
        self,
        models: tuple[nn.Module, nn.Module],
        config: HealConfig,
        batches: list[Any],
        loss_of: Distillation,
        evaluation: Evaluation | None,
        best: Best | None,
        directory: str | Path | None,
    ) -> None:
        self.models, self.model = models, models[0]
        self.config, self.batches = config, batches
        self.device = next(self.model.parameters()).device
        self.loss_of, self.evaluation, self.best = loss_of, evaluation, best
        self.directory = None if directory is None else Path(directory)
        self.precision = precision_of(self.model, config)
        self._dense_form = Materialized(self.model, loss_of.blocks) if config.materialize else None
        self.sixteen = any(p.element_size() == 2 for p in self.model.parameters())
        self._started = 0.0
        self.result = Healing(metric=None if evaluation is None else evaluation.name)

    def train(self, trained: dict[str, nn.Parameter], progress: bool) -> None:
        """All steps that are still to be done."""
        config = self.config
        device = self.device
        update = Update(trained.values(), config, device)
        with ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            accelerator = stack.enter_context(make_accelerator(self.precision, device))
            self._resume(trained, update.optimizer)
            if config.cuda_graphs:
                update.prepare()
            result = self.result
            result.trained = sum(p.numel() for p in trained.values())
            if result.steps == 0:
                self._evaluate("blocks" if config.block_steps else "model", accelerator, trained)
            self._started = time.perf_counter() - result.seconds
            if config.compile and not self._over(result.steps):
                stack.enter_context(self._compiled(accelerator))
                update.clear()
            steps = {phase: self._step(phase, update, accelerator) for phase in ("blocks", "model")}
            losses: list[Tensor] = []
            shown = stack.enter_context(bar(progress))
            task = shown.add_task("healing", total=self._progress[1], loss="")
            over = self._over(result.steps)
            while not over:
                step = result.steps
                update.set_rate(rate(config, step, self._spent))
                phase = self._phase(step)
                losses.append(steps[phase](self.batches[self._at(step)]))
                result.steps = step + 1
                self._tick()
                over = self._over(result.steps)  # once a step: the clock goes on
                last = over or result.steps == config.block_steps
                if len(losses) == 10 or last:
                    self._note(phase, losses)
                    shown.update(task, loss=f"loss {result.curve[-1]['loss']:.4g}")
                    losses = []
                every = config.evaluate_every
                with self._paused():
                    if last or (every and result.steps % every == 0):
                        self._evaluate(phase, accelerator, trained)
                    if self.directory and (last or result.steps % config.save_every == 0):
                        self._save(trained, update.optimizer)
                shown.update(task, completed=self._progress[0])
            if self.best is not None:
                self.best.put_back(trained)
                result.kept = self.best.step

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Time that is no training."""
        self._tick()
        yield
        self._started = time.perf_counter() - self.result.seconds

    def _tick(self) -> None:
        self.result.seconds = time.perf_counter() - self._started

    @property
    def _spent(self) -> float:
        return spent(self.result.curve, self.result.seconds)

    @property
    def _progress(self) -> tuple[float, float]:
        """What is done, and of how much: steps, or seconds end to end."""
        config, steps = self.config, self.result.steps
        if config.seconds is None:
            return steps, config.block_steps + config.steps
        return min(self._spent, config.seconds), config.seconds

    def _over(self, step: int) -> bool:
        return is_over(self.config, step, self._spent)

    def _phase(self, step: int) -> str:
        return "blocks" if step < self.config.block_steps else "model"

    def _step(self, phase: str, update: Update, accelerator: Any) -> Callable[[Any], Tensor]:
        """``step(batch)``: train on a batch; its loss before that."""
        move = partial(to_device, device=self.device)
        passes = partial(self._backward, phase, accelerator)
        if self.config.cuda_graphs:
            return Graphs(passes, update, move)

        def step(batch: Any) -> Tensor:
            loss = passes(move(batch))
            update()
            return loss

        return step

    def _backward(self, phase: str, accelerator: Any, batch: Any) -> Tensor:
        """The loss of a batch, whose gradients are added to the parameters'."""
        blocks = phase == "blocks"
        form = self._dense_form
        # to the end of the backward pass, which may run the blocks again
        with nullcontext() if form is None else form.in_place():
            with accelerator.autocast():
                if form is not None:
                    form.make_weights()
                loss = (self.loss_of.block_by_block if blocks else self.loss_of.end_to_end)(batch)
            accelerator.backward(loss)
            return loss.detach()

    def _compiled(self, accelerator: Any) -> ExitStack:
        """Compile, with a try on the first batch of each phase that is to come."""
        config, done = self.config, self.result.steps
        first = [done] if done >= config.block_steps else [done, config.block_steps]

        def trial() -> None:
            with as_recorded() if config.cuda_graphs else nullcontext():
                for step in first:
                    if not self._over(step):
                        batch = to_device(self.batches[self._at(step)], self.device)
                        self._backward(self._phase(step), accelerator, batch)

        return compiled_if_it_works(self.models, self.loss_of, trial)

    def _at(self, step: int) -> int:
        """The batch of a step: all batches in a new order each time through."""
        epoch, index = divmod(step, len(self.batches))
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + epoch)
        return int(torch.randperm(len(self.batches), generator=generator)[index])

    def _note(self, phase: str, losses: list[Tensor]) -> None:
        loss = float(torch.stack(losses).mean())  # waits for CUDA
        self._tick()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.result.steps}; lower learning_rate "
                f"({self.config.learning_rate}), or use precision='float32'"
            )
        entry = {"step": self.result.steps, "phase": phase, "loss": loss}
        self.result.curve.append({**entry, "seconds": round(self.result.seconds, 2)})

    def _evaluate(self, phase: str, accelerator: Any, trained: Mapping[str, nn.Parameter]) -> None:
        if self.evaluation is None:
            return
        # Parameters of 16-bit models are float32 meanwhile, their inputs are not
        # else the blocks would be compiled without gradients, too, for a few batches
        force = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        with force, accelerator.autocast() if self.sixteen else nullcontext():
            figure, curve = self.evaluation(self.model), self.result.curve
        if not curve or curve[-1]["step"] != self.result.steps:
            entry = {"step": self.result.steps, "phase": phase, "loss": None}
            curve.append({**entry, "seconds": round(self.result.seconds, 2)})
        curve[-1]["metric"] = figure
        if self.best is not None:
            self.best.offer(figure, self.result.steps, trained)

    def _save(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        assert self.directory is not None
        state = HealingState(asdict(self.config), len(self.batches), asdict(self.result))
        kept = {} if self.best is None else self.best.values
        write_state(self.directory, state, trained, optimizer, kept)

    def _resume(self, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        if self.directory is None:
            return
        wanted = HealingState(asdict(self.config), len(self.batches), {})
        found = read_state(self.directory, wanted, trained, optimizer)
        if found is not None:
            state, kept = found
            self.result = Healing(**{**state.result, "metric": self.result.metric})
            if self.best is not None:
                self.best.resume(self.result.curve, kept)
