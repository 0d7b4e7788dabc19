"""Input statistics: what the calibrated projection knows about the inputs of a linear layer."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ss1_compile.calibration import statistics_file
from ss1_compile.calibration.gradients import GradientMoments
from ss1_compile.calibration.input_statistics import InputStatistics
from ss1_compile.calibration.moments import InputKey, SharedMoments, input_key
from ss1_compile.calibration.observer import (
    Forward,
    LinearObserver,
    Quietly,
    attention_mask,
    is_candidate,
    parameter_names,
    run_batch,
)
from ss1_compile.errors import CalibrationError

__all__ = ["InputStatistics", "Statistics", "calibrate", "execution_groups", "statistics_of"]

_LONG = 8  # batches from which a progress bar is worth its lines

_of_weight: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_versions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of the weights when their statistics were bound."""


def statistics_of(weight: Tensor) -> InputStatistics | None:
    """The statistics bound to this very parameter object, or ``None``.

    They say what the inputs are like, so in-place changes of the weight do not touch them, but for
    the gradients, which go through the weight as it was: these are dropped then. All of it is
    dropped with the weight.
    """
    found: InputStatistics | None = _of_weight.get(weight)
    if found is not None and found.gradients is not None and _versions[weight] != _version(weight):
        found = _of_weight[weight] = replace(found, gradients=None)
    return found


def rebind(weight: Tensor, statistics: InputStatistics | None) -> None:
    """Tie ``statistics`` to this very parameter object; ``None`` unties what it has."""
    if statistics is None:
        _of_weight.pop(weight, None)
    else:
        _of_weight[weight] = statistics
        _versions[weight] = _version(weight)


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


class Statistics(Mapping[str, InputStatistics]):
    """Input statistics by the qualified name of the parameter, in order of execution.

    Weights that read the same input have the same moments (``of_inputs``), and unless they have
    gradients of their own the same :class:`InputStatistics` object.

    Attributes:
        unreached: names of matrices that no calibration input went through as a linear's weight,
            or that were used both as W and as Wᵀ, so that one set of statistics cannot serve.
        unweighed: why there are no gradients although they were asked for, or ``None``.
    """

    def __init__(
        self,
        entries: Mapping[str, InputStatistics],
        unreached: Iterable[str] = (),
        unweighed: str | None = None,
    ) -> None:
        self._entries = dict(entries)
        self.unreached: tuple[str, ...] = tuple(unreached)
        self.unweighed = unweighed

    def __getitem__(self, name: str) -> InputStatistics:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Statistics(weights={len(self)}, unreached={len(self.unreached)})"

    def bind(self, model: nn.Module) -> None:
        """Tie the entries to the model's weights, where every door finds them.

        Raises:
            CalibrationError: entries that the model has no parameter for, or of another size; then
                nothing is bound.
        """
        weights = parameter_names(model)
        missing = [name for name in self if name not in weights]
        misfits = [
            f"{name} (weight {list(weights[name].shape)}, statistics of {entry.in_features})"
            for name, entry in self.items()
            if name in weights and not _may_have(weights[name], entry.in_features)
        ]
        if missing or misfits:
            raise CalibrationError(
                "the statistics are of another model: "
                + "; ".join(
                    f"{what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
                    for what, names in (("no parameter called", missing), ("misfits", misfits))
                    if names
                )
            )
        for name, entry in self.items():
            rebind(weights[name], entry)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; :meth:`load` reads it. Held-out rows are not marked in it."""
        statistics_file.write(path, self, self.unreached)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Statistics:
        """Read and validate what :meth:`save` wrote. Binds nothing.

        Raises:
            CalibrationError: not such a file, truncated, of another version, or an entry with a
                wrong shape or dtype, a count under 1, values that are not finite, or a second
                moment that is not symmetric; the message names the entry.
            FileNotFoundError: there is no such file.
        """
        return cls(*statistics_file.read(path, device))


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    names: Collection[str] | None = None,
    forward: Forward | None = None,
    held_out: bool = False,
    weigh_outputs: bool = False,
    progress: bool = True,
) -> Statistics:
    """Run ``model`` over ``data`` and collect the input statistics of its linear weights.

    Covers ``nn.Linear``, Hugging Face's ``Conv1D``, ``nn.MultiheadAttention``, 1×1 convolutions,
    and ``F.linear``, ``addmm``, ``mm``, ``matmul``, ``@``, ``einsum``, ``bmm`` and ``grouped_mm``
    on a parameter or its transpose. The experts of one parameter have statistics in common. The
    model runs in eval mode (restored afterwards),
    without gradients and eagerly even if it is compiled. The result is bound to the model's
    weights (:func:`statistics_of`).

    Memory: ``8·K²`` bytes per distinct input, on the device of that input; restrict ``names`` to
    a block at a time where that is too much.

    Args:
        model: any module.
        data: batches, on the model's device. A mapping is passed as keyword arguments, a tuple or
            list as positional ones, a tensor as the one argument. Where a batch is a mapping with
            a 2-D ``"attention_mask"`` ``[B, T]``, the rows of inputs ``[B, T, ...]`` and
            ``[B·T, K]`` where it is 0 are left out: padding is not data.
        names: qualified names of the parameters to collect for; ``None`` means all.
        forward: ``forward(model, batch)`` in place of the call described above.
        held_out: also set the statistics of every fourth batch apart (of the second, if there are
            fewer than four), for ``damping="auto"``. Takes twice the memory.
        weigh_outputs: also collect the gradients by which learned sketches weigh the outputs of
            their layers (:mod:`ss1_compile.calibration.gradients`), of the weights as they are:
            another forward and a backward pass per batch, ``8·K²`` bytes per weight, and what
            autograd keeps of one batch. A model that does not allow it goes without;
            ``unweighed`` of the result says why.
        progress: show a progress bar if there are many batches.

    Raises:
        CalibrationError: no batches, a batch of an unknown kind, an unknown name, an input that is
            not finite (the layer is named), or no linear weight reached.
    """
    if isinstance(data, Tensor | Mapping | str):
        raise CalibrationError(
            f"data must be an iterable of batches, got one {type(data).__name__}; wrap it in a list"
        )
    weights, aliases = _select(model, names)
    kept, apart = SharedMoments(), SharedMoments()
    moments = kept
    summed: dict[str, int] = {}
    both_ways: set[str] = set()

    def on_input(name: str, dim: int, x: Tensor) -> None:
        if summed.setdefault(name, dim) != dim:
            both_ways.add(name)
        elif name not in both_ways:
            moments.add(name, x)

    total = len(data) if isinstance(data, Sized) else None
    batches = track(
        data,
        "calibrating",
        total=total,
        console=Console(stderr=True),
        transient=True,
        disable=not progress or (total is not None and total < _LONG),
    )
    empty = True
    gradients = GradientMoments(model, weights) if weigh_outputs else None
    with Quietly(model):
        for index, batch in enumerate(batches):
            empty = False
            moments = apart if held_out and is_held_out(index, total) else kept
            moments.start(attention_mask(batch))
            with LinearObserver(weights, on_input):
                run_batch(model, batch, forward)
            moments.finish()
            if gradients is not None:
                gradients.add(batch, forward)
    if empty:
        raise CalibrationError("the calibration data is empty; pass at least one batch")
    entries = with_held_out(*(_entries(part, both_ways, aliases) for part in (kept, apart)))
    if not entries and weights:
        raise CalibrationError(
            f"no calibration input reached a linear weight (of {len(weights)} looked for: "
            f"{', '.join(list(weights)[:3])} …); pass forward= if the model needs another call"
        )
    unreached = [n for n in _listed(model, names, weights, aliases) if n not in entries]
    if gradients is not None:
        entries = _with_gradients(entries, gradients.finish(), aliases)
    statistics = Statistics(entries, unreached, gradients.problem if gradients else None)
    statistics.bind(model)
    return statistics


def execution_groups(
    model: nn.Module, batch: Any, weights: Collection[str], forward: Forward | None = None
) -> list[list[str]]:
    """The parameters called ``weights`` in order of first execution, grouped by equal input tensor.

    For sequential calibration: the input of a group depends on the groups before it alone. Weights
    that the batch does not reach are in no group; a tied weight has the first of its given names.

    Raises:
        CalibrationError: an unknown name, or a batch of an unknown kind.
    """
    selected, _ = _select(model, weights)
    groups: list[list[str]] = []
    group_of: dict[InputKey, list[str]] = {}
    seen: set[str] = set()

    def on_input(name: str, dim: int, x: Tensor) -> None:
        if name in seen:
            return
        seen.add(name)
        key = input_key(x)
        group = group_of.get(key) if key is not None else None
        if group is None:
            group = []
            groups.append(group)
            if key is not None:
                group_of[key] = group
        group.append(name)

    with Quietly(model), LinearObserver(selected, on_input):
        run_batch(model, batch, forward)
    return groups


def _select(
    model: nn.Module, names: Collection[str] | None
) -> tuple[dict[str, nn.Parameter], dict[str, list[str]]]:
    """The distinct weights by their first name, and for each first name all wanted names."""
    parameters = parameter_names(model)
    wanted = list(parameters) if names is None else list(names)
    first: dict[int, str] = {}
    weights: dict[str, nn.Parameter] = {}
    aliases: dict[str, list[str]] = {}
    for name in wanted:
        if name not in parameters:
            matrices = [n for n, p in parameters.items() if is_candidate(p)]
            near = difflib.get_close_matches(name, matrices, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CalibrationError(f"the model has no parameter called {name!r}{hint}")
        parameter = parameters[name]
        if not is_candidate(parameter):
            if names is not None:
                raise CalibrationError(f"{name!r} is not a floating matrix with values")
            continue
        canonical = first.setdefault(id(parameter), name)
        weights[canonical] = parameter
        aliases.setdefault(canonical, []).append(name)
    return weights, aliases


def _listed(
    model: nn.Module,
    names: Collection[str] | None,
    weights: Mapping[str, nn.Parameter],
    aliases: Mapping[str, list[str]],
) -> list[str]:
    """The names that should have been reached; embedding tables are not linears."""
    tables: set[int] = set()
    if names is None:
        embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
        tables = {id(m.weight) for m in embeddings}
    return [
        name
        for key, weight in weights.items()
        if id(weight) not in tables and (weight.dim() == 2 or names is not None)
        for name in aliases[key]
    ]


def _entries(
    moments: SharedMoments, skipped: Collection[str], aliases: Mapping[str, list[str]]
) -> dict[str, InputStatistics]:
    made: dict[int, InputStatistics] = {}
    entries: dict[str, InputStatistics] = {}
    for name in moments:
        found = moments[name]
        if name in skipped or found.count == 0:
            continue
        if id(found) not in made:
            made[id(found)] = found.finish()
        for alias in aliases[name]:
            entries[alias] = made[id(found)]
    return entries


def _with_gradients(
    entries: Mapping[str, InputStatistics],
    gradients: Mapping[str, Tensor],
    aliases: Mapping[str, list[str]],
) -> dict[str, InputStatistics]:
    """The entries with the gradients of the weights they are of; aliases share theirs."""
    found = dict(entries)
    for name, moment in gradients.items():
        if name in entries:
            entry = replace(entries[name], gradients=moment)
            found |= dict.fromkeys(aliases[name], entry)
    return found


def with_held_out(
    kept: Mapping[str, InputStatistics], apart: Mapping[str, InputStatistics]
) -> dict[str, InputStatistics]:
    """All rows, with those that were set apart as the held-out ones; shared as both are shared."""
    made: dict[tuple[int, int], InputStatistics] = {}
    entries: dict[str, InputStatistics] = {}
    for name in (*kept, *(name for name in apart if name not in kept)):
        if name not in apart or name not in kept:
            entries[name] = kept.get(name) or apart[name]
            continue
        key = id(kept[name]), id(apart[name])
        if key not in made:
            made[key] = kept[name].combine(apart[name])
            made[key].held_out = apart[name]
        entries[name] = made[key]
    return entries


def is_held_out(index: int, total: int | None) -> bool:
    """Whether a batch is one to choose by: every fourth, or of fewer than four the second."""
    return index % 4 == 3 if total is None or total >= 4 else index == 1


def _may_have(weight: Tensor, in_features: int) -> bool:
    """Whether ``in_features`` can be K; an einsum may sum over several dimensions at once."""
    if weight.dim() == 2:
        return in_features in weight.shape
    return weight.numel() % in_features == 0
