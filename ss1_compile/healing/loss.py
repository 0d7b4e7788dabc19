"""What healing minimises: how far outputs and hidden states are from the dense model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ss1_compile.errors import ConfigError
from ss1_compile.evaluation import Output, mask_of, tokens
from ss1_compile.experts import SS1ExpertLinear
from ss1_compile.modules import SS1Linear


def relative_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``‖student - teacher‖² / ‖teacher‖²`` over all features, float32.

    Args:
        student: ``[..., features]``.
        teacher: likewise.
        mask: bool ``[...]``, of the rows that count; ``None`` means all.
    """
    a, b = student.float(), teacher.float()
    if mask is not None:
        # not a[mask], whose size the host would wait for
        a, b = (torch.where(mask.unsqueeze(-1), t, 0.0) for t in (a, b))
    return (a - b).square().sum() / b.square().sum().clamp(min=1e-20)


def output_loss(
    student: Tensor, teacher: Tensor, logits: bool, mask: Tensor | None = None
) -> Tensor:
    """Of outputs ``[..., features]``, float32; the mean over rows.

    ``KL(softmax teacher ‖ softmax student)`` per row for logits (Hinton et al., 2015, temperature
    1); else ``1 - cosine`` plus the relative squared error.

    Args:
        student: its outputs.
        teacher: likewise.
        logits: whether they are.
        mask: bool ``[...]``, of the rows that count; ``None`` means all.
    """
    a, b = student.float(), teacher.float()
    if logits:
        rows = F.kl_div(
            a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
    else:
        rows = 1 - F.cosine_similarity(a, b, dim=-1)
    mean = rows.mean() if mask is None else torch.where(mask, rows, 0.0).sum() / mask.sum()
    return mean if logits else mean + relative_error(a, b, mask)


def label_loss(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the next token, in nats, float32.

    Args:
        logits: ``[B, T, vocabulary]``.
        ids: int64 ``[B, T]``, the text; position t is judged by the token at t + 1.
        mask: bool ``[B, T]``, of the tokens that count; ``None`` means all.
    """
    # of all positions, the last too: the compiler shares the softmax with output_loss's
    found = logits.float().log_softmax(-1)
    lost = -found.gather(-1, ids.roll(-1, 1).unsqueeze(-1)).squeeze(-1)
    length = ids.shape[1]
    counted = (torch.arange(length, device=ids.device) < length - 1).expand_as(ids)
    if mask is not None:
        counted = counted & mask & mask.roll(-1, 1)
    return torch.where(counted, lost, 0.0).sum() / counted.sum().clamp(min=1)


def distance(
    got: Tensor,
    wanted: Tensor,
    mask: Tensor | None,
    logits: bool,
    made: Sequence[Tensor],
    dense: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    weight: float,
    ids: Tensor | None = None,
    label_weight: float = 0.0,
) -> Tensor:
    """:func:`output_loss` plus ``weight`` times the mean :func:`relative_error` of hidden states.

    And plus ``label_weight`` times :func:`label_loss`.

    Args:
        got: the student's outputs ``[..., features]``.
        wanted: the teacher's.
        mask: of the rows that count.
        logits: whether they are.
        made: the student's hidden states; none leaves them out.
        dense: the teacher's.
        masks: of each hidden state.
        weight: of the hidden states.
        ids: the text, int64 ``[B, T]``; ``None`` leaves its next tokens out.
        label_weight: of the next tokens.
    """
    loss = output_loss(got, wanted, logits, mask)
    if ids is not None:
        loss = loss + label_weight * label_loss(got, ids, mask)
    return loss + weight * mean_error(made, dense, masks) if made else loss


def mean_error(
    made: Sequence[Tensor], dense: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> Tensor:
    """The mean :func:`relative_error` of some hidden states."""
    return torch.stack(
        [relative_error(a, b, mask) for a, b, mask in zip(made, dense, masks, strict=True)]
    ).mean()


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of the model that have SS1 layers.

    They are members of one ``ModuleList`` or ``Sequential``, the one with the most such members;
    none if no two members have any.
    """

    def compressed(block: nn.Module) -> bool:
        return any(isinstance(m, SS1Linear | SS1ExpertLinear) for m in block.modules())

    best: dict[str, nn.Module] = {}
    for path, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            prefix = f"{path}." if path else ""
            members = {prefix + name: child for name, child in container.named_children()}
            found = {name: child for name, child in members.items() if compressed(child)}
            if len(found) > max(1, len(best)):
                best = found
    return best


class Hidden:
    """The hidden state before and after each block, as the forward pass goes by.

    Attributes:
        before: name → first tensor argument of the last call.
        after: name → first tensor of its result.
    """

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    @contextmanager
    def watch(
        self, model: nn.Module, names: Sequence[str], replace: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Fill both while the context is open; blocks are given ``replace[name]`` as their input.

        Args:
            model: has the blocks.
            names: of the blocks.
            replace: hidden states to hand to the blocks in place of what they are called with.
        """
        with ExitStack() as stack:
            for name in names:
                block = model.get_submodule(name)
                given = None if replace is None else replace.get(name)
                before = block.register_forward_pre_hook(
                    self._before(name, given), with_kwargs=True
                )
                stack.callback(before.remove)
                stack.callback(block.register_forward_hook(self._after(name)).remove)
            yield

    def _before(self, name: str, given: Tensor | None) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            at, key = _first_tensor(args, kwargs)
            if at is None and key is None:
                return None
            self.before[name] = args[at] if at is not None else kwargs[key]
            if given is None:
                return None
            if at is not None:
                return (*args[:at], given, *args[at + 1 :]), kwargs
            return args, {**kwargs, key: given}

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if isinstance(result, tuple | list) and result:
                result = result[0]
            if isinstance(result, Tensor):
                self.after[name] = result

        return hook


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, Any]:
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return i, None
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return None, key
    return None, None


class Distillation:
    """The loss of one batch, end to end or block by block.

    Args:
        student: the compressed model.
        teacher: the dense model, in eval mode.
        hidden_weight: of the mean relative squared error of the blocks' outputs.
        output: see :func:`ss1_compile.evaluation.outputs`.
        label_weight: of the text's own next tokens, for language models.

    Attributes:
        blocks: names of the blocks whose hidden states are compared.
        distance: :func:`distance`, or its compiled form.
        mean_error: :func:`mean_error`, or its compiled form.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        hidden_weight: float,
        output: Output | None,
        label_weight: float = 0.0,
    ) -> None:
        self._student, self._teacher = student, teacher
        self._weight, self._output, self._label_weight = hidden_weight, output, label_weight
        modules = dict(teacher.named_modules())
        self.blocks = [name for name in blocks_of(student) if name in modules]
        self.distance, self.mean_error = distance, mean_error

    def end_to_end(self, batch: Any) -> Tensor:
        """Loss of the outputs, plus the weighted ones of the hidden states and the next tokens.

        Raises:
            ConfigError: next tokens of a model or of batches that have none.
        """
        names = self.blocks if self._weight else []
        dense, made = Hidden(), Hidden()
        with torch.no_grad(), dense.watch(self._teacher, names):
            wanted, mask, logits = tokens(self._teacher, batch, self._output)
        with made.watch(self._student, names):
            got, _, _ = tokens(self._student, batch, self._output)
        pairs = _pairs(made, dense, batch)
        ids = _text(batch, got, logits) if self._label_weight else None
        return self.distance(
            got, wanted, mask, logits, *pairs, self._weight, ids, self._label_weight
        )

    def block_by_block(self, batch: Any) -> Tensor:
        """Mean relative squared error of the blocks, each on the *dense* model's hidden state.

        So every block learns by itself and all of them at once; no gradient crosses a block.
        """
        dense, made = Hidden(), Hidden()
        with torch.no_grad(), dense.watch(self._teacher, self.blocks):
            tokens(self._teacher, batch, self._output)
        with made.watch(self._student, self.blocks, replace=dense.before):
            tokens(self._student, batch, self._output)
        return self.mean_error(*_pairs(made, dense, batch))


def _text(batch: Any, found: Tensor, logits: bool) -> Tensor:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not logits or not isinstance(ids, Tensor) or found.shape[:-1] != ids.shape:
        raise ConfigError(
            "label_weight needs a language model's logits [B, T, vocabulary] and batches with "
            "input_ids [B, T]; use label_weight=0"
        )
    return ids


def _pairs(
    made: Hidden, dense: Hidden, batch: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Hidden states of both models, and the mask of those that have the batch's tokens."""
    wanted = list(dense.after.values())
    ours = [made.after[name] for name in dense.after]
    return ours, wanted, [mask_of(hidden, batch) for hidden in wanted]
