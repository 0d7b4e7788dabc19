"""See the inputs of every linear whose weight is a parameter, however the model spells it.

One ``TorchFunctionMode`` for ``nn.Linear``, Hugging Face's ``Conv1D`` and functional code alike:
hooks on modules would miss ``x @ self.weight.T``. Weights are recognised by their memory, so that
``.t()``, ``.T``, ``.detach()`` and whole-tensor views of a parameter are the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ss1_compile.errors import CalibrationError

Forward = Callable[[nn.Module, Any], Any]
MemoryKey = tuple[torch.device, int, tuple[int, ...], tuple[int, ...]]

# function -> (position, keyword) of the input, those of the weight, whether the weight is [N, K]
_OPERANDS: dict[Any, tuple[tuple[int, str], tuple[int, str], bool]] = {
    torch.nn.functional.linear: ((0, "input"), (1, "weight"), True),
    torch.addmm: ((1, "mat1"), (2, "mat2"), False),
    torch.Tensor.addmm: ((1, "mat1"), (2, "mat2"), False),
    torch.mm: ((0, "input"), (1, "mat2"), False),
    torch.Tensor.mm: ((0, "input"), (1, "mat2"), False),
    torch.matmul: ((0, "input"), (1, "other"), False),
    torch.Tensor.matmul: ((0, "input"), (1, "other"), False),
    torch.Tensor.__matmul__: ((0, "input"), (1, "other"), False),
}


def is_candidate(parameter: Tensor) -> bool:
    """Whether ``parameter`` can be a linear's weight: a floating matrix with values."""
    return (
        not torch.nn.parameter.is_lazy(parameter)
        and parameter.dim() == 2
        and parameter.is_floating_point()
        and not parameter.is_meta
        and parameter.numel() > 0
    )


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every qualified name of every parameter, tied ones under each of their names.

    A model wrapped by ``torch.compile`` has the names of the model inside.
    """
    inner = getattr(model, "_orig_mod", model)
    return dict(inner.named_parameters(remove_duplicate=False))


class LinearObserver(TorchFunctionMode):
    """Call ``on_input(name, dim, x)`` before each linear on one of ``weights``.

    ``dim`` is the dimension of the weight that is summed over (1 for the ``[N, K]`` of
    ``nn.Linear``, 0 for the ``[K, N]`` of ``Conv1D``); ``x`` is ``[..., weight.shape[dim]]``.

    Functions that are opaque to function modes hide the linears inside them:
    ``F.multi_head_attention_forward`` (``nn.MultiheadAttention``), recurrent layers, scripted code.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], on_input: Callable[[str, int, Tensor], None]
    ) -> None:
        super().__init__()
        self._on_input = on_input
        self._by_memory: dict[MemoryKey, tuple[str, bool]] = {}
        for name, weight in weights.items():
            self._by_memory.setdefault(_memory_key(weight.t()), (name, True))
            self._by_memory[_memory_key(weight)] = (name, False)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operands = _OPERANDS.get(func)
        if operands is not None:
            (x_at, x_name), (weight_at, weight_name), rows_are_outputs = operands
            x = args[x_at] if len(args) > x_at else kwargs.get(x_name)
            weight = args[weight_at] if len(args) > weight_at else kwargs.get(weight_name)
            if isinstance(x, Tensor) and isinstance(weight, Tensor):
                self._observe(x, weight, rows_are_outputs)
        return func(*args, **kwargs)

    def _observe(self, x: Tensor, weight: Tensor, rows_are_outputs: bool) -> None:
        if weight.dim() != 2 or x.dim() < 1 or _memory_key(x) in self._by_memory:
            return
        found = self._by_memory.get(_memory_key(weight))
        summed = 1 if rows_are_outputs else 0
        if found is None or x.shape[-1] != weight.shape[summed]:
            return
        name, transposed = found
        self._on_input(name, 1 - summed if transposed else summed, x)


def _memory_key(tensor: Tensor) -> MemoryKey:
    """Where a tensor lies. Strides of dimensions of size 1 are arbitrary and left out."""
    sizes = tuple(tensor.shape)
    strides = tuple(s if n > 1 else 0 for n, s in zip(sizes, tensor.stride(), strict=True))
    return tensor.device, tensor.data_ptr(), sizes, strides


class Quietly:
    """Eval mode, no gradients and no compiled code inside; all as before afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._training = [(module, module.training) for module in self._model.modules()]
        self._no_grad = torch.no_grad()
        self._eager = torch.compiler.set_stance("force_eager")
        self._model.eval()
        self._no_grad.__enter__()
        self._eager.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._eager.__exit__(*error)
        self._no_grad.__exit__(*error)
        for module, training in self._training:
            module.training = training


def run_batch(model: nn.Module, batch: Any, forward: Forward | None) -> None:
    """Call the model as :func:`ss1_compile.statistics.calibrate` says.

    Raises:
        CalibrationError: a batch of an unknown kind.
    """
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    elif isinstance(batch, Tensor):
        model(batch)
    else:
        raise CalibrationError(
            f"a batch is a {type(batch).__name__}, not a mapping, tuple, list or tensor; "
            f"pass forward=lambda model, batch: ..."
        )


def attention_mask(batch: Any) -> Tensor | None:
    """The bool ``[B, T]`` mask of a batch that has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
