"""See the inputs of every linear whose weight is a parameter, however the model spells it.

One ``TorchFunctionMode`` for ``nn.Linear``, Hugging Face's ``Conv1D`` and functional code alike:
hooks on modules would miss ``x @ self.weight.T``. Weights are recognised by their memory, so that
``.t()``, ``.T``, ``.detach()`` and whole-tensor views of a parameter are the parameter.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ss1_compile.errors import CalibrationError
from ss1_compile.passes.einsum import read_einsum, tensordot_equation

Forward = Callable[[nn.Module, Any], Any]
MemoryKey = tuple[torch.device, int, tuple[int, ...], tuple[int, ...]]
_MOST_MATRICES = 1024  # of one parameter, that are recognised one by one

# function -> (position, keyword) of the input, those of the weight, whether the weight is [N, K]
_OPERANDS: dict[Any, tuple[tuple[int, str], tuple[int, str], bool]] = {
    F.linear: ((0, "input"), (1, "weight"), True),
    torch.addmm: ((1, "mat1"), (2, "mat2"), False),
    torch.Tensor.addmm: ((1, "mat1"), (2, "mat2"), False),
    torch.mm: ((0, "input"), (1, "mat2"), False),
    torch.Tensor.mm: ((0, "input"), (1, "mat2"), False),
    torch.matmul: ((0, "input"), (1, "other"), False),
    torch.Tensor.matmul: ((0, "input"), (1, "other"), False),
    torch.Tensor.__matmul__: ((0, "input"), (1, "other"), False),
    torch.linalg.matmul: ((0, "input"), (1, "other"), False),
    torch.inner: ((0, "input"), (1, "other"), True),
    torch.Tensor.inner: ((0, "input"), (1, "other"), True),
    torch.mv: ((1, "vec"), (0, "input"), True),
    torch.Tensor.mv: ((1, "vec"), (0, "input"), True),
    torch.addmv: ((2, "vec"), (1, "mat"), True),
    torch.Tensor.addmv: ((2, "vec"), (1, "mat"), True),
    torch.bmm: ((0, "input"), (1, "mat2"), False),
    torch.Tensor.bmm: ((0, "input"), (1, "mat2"), False),
    torch.baddbmm: ((1, "batch1"), (2, "batch2"), False),
    torch.Tensor.baddbmm: ((1, "batch1"), (2, "batch2"), False),
    torch._grouped_mm: ((0, "self"), (1, "mat2"), False),
}
if hasattr(F, "grouped_mm"):  # newer than the oldest supported torch
    _OPERANDS[F.grouped_mm] = ((0, "mat_a"), (1, "mat_b"), False)
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}  # → spatial dimensions
_CONVOLUTIONS |= {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}

# Function modes do not see the products inside this one. A copy of it that takes no notice of modes
# at its beginning shows them its parts.
_ATTENTION = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    F.multi_head_attention_forward.__name__,
    F.multi_head_attention_forward.__defaults__,
)


def is_candidate(parameter: Tensor) -> bool:
    """Whether ``parameter`` can be a linear's weight: floating, at least 2-D, with values."""
    return (
        not torch.nn.parameter.is_lazy(parameter)
        and parameter.dim() >= 2
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

    ``dim`` is the dimension of the weight that is summed over, counted from the end (-1 for the
    ``[N, K]`` of ``nn.Linear``, -2 for the ``[K, N]`` of ``Conv1D``; for an einsum, that of the
    first index that is summed); ``x`` is ``[..., K]``. A weight of experts ``[E, N, K]``, or one of
    its matrices, stands for all of them. ``on_output(name, dim, y)``, if given, is called after
    each but an einsum or a convolution, and what it returns takes the place of ``y [..., N]``.

    Recurrent layers and scripted code hide the linears inside them.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        on_input: Callable[[str, int, Tensor], None],
        on_output: Callable[[str, int, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._on_input, self._on_output = on_input, on_output
        self._by_memory: dict[MemoryKey, tuple[str, bool]] = {}
        for transposed in (True, False):  # a matrix of one row is both, and counts as itself
            for name, weight in weights.items():
                for view in _views(weight):
                    view = view.mT if transposed else view
                    self._by_memory[_memory_key(view)] = (name, transposed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        overriding: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _ATTENTION(*args, **kwargs)
        if func in (torch.einsum, torch.functional.einsum):
            self._observe_einsum(*args)
        elif func is torch.tensordot:
            self._observe_tensordot(*args, **kwargs)
        elif func in _CONVOLUTIONS:
            names = ("input", "weight", "bias", "stride")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self._observe_convolution(given, _CONVOLUTIONS[func])
        elif func in _OPERANDS or _is_grouped_product(func):
            (x_at, x_name), (weight_at, weight_name), rows_are_outputs = _OPERANDS.get(
                func, ((0, "input"), (1, "weight"), False)
            )
            x = args[x_at] if len(args) > x_at else kwargs.get(x_name)
            weight = args[weight_at] if len(args) > weight_at else kwargs.get(weight_name)
            if isinstance(x, Tensor) and isinstance(weight, Tensor):
                seen = self._observe(x, weight, rows_are_outputs)
                if seen is not None and self._on_output is not None:
                    return self._on_output(*seen, func(*args, **kwargs))
        return func(*args, **kwargs)

    def _observe(self, x: Tensor, weight: Tensor, rows_are_outputs: bool) -> tuple[str, int] | None:
        if weight.dim() not in (2, 3) or x.dim() < 1 or _memory_key(x) in self._by_memory:
            return None
        found = self._by_memory.get(_memory_key(weight))
        summed = -1 if rows_are_outputs else -2
        if found is None or x.shape[-1] != weight.shape[summed]:
            return None
        name, transposed = found
        dim = -3 - summed if transposed else summed
        self._on_input(name, dim, x)
        return name, dim

    def _observe_einsum(self, equation: Any, *operands: Any) -> None:
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if len(operands) != 2 or not isinstance(equation, str):
            return
        for x_at, (x, weight) in enumerate((operands, operands[::-1])):
            name, transposed = self._by_memory.get(_memory_key(weight), ("", False))
            read = read_einsum(equation, x_at, x.dim(), weight.dim())
            if name and read is not None and not (transposed and weight.dim() > 2):
                order = [read.x.index(i) for i in read.batch + read.rows + read.summed]
                x = x.permute(order).flatten(-len(read.summed))
                summed = read.weight.index(read.summed[0]) - weight.dim()
                self._on_input(name, -3 - summed if transposed else summed, x)
                return

    def _observe_tensordot(self, a: Tensor, b: Tensor, dims: Any = 2, **_: Any) -> None:
        if isinstance(dims, Tensor):
            dims = dims.tolist()
        equation = tensordot_equation(dims, a.dim(), b.dim())
        if equation is not None:
            self._observe_einsum(equation, a, b)

    def _observe_convolution(self, given: Mapping[str, Any], spatial: int) -> None:
        x, weight, stride = given["input"], given["weight"], given.get("stride", 1)
        if any(size != 1 for size in weight.shape[2:]):
            return
        strides = [stride] * spatial if isinstance(stride, int) else list(stride)
        strides = strides * (spatial // len(strides))
        x = x[(..., *(slice(None, None, step) for step in strides))]
        self._observe(x.movedim(-1 - spatial, -1), weight.flatten(1), True)


def _views(weight: Tensor) -> list[Tensor]:
    """The matrices and stacks of matrices that ``weight`` may be used as."""
    if weight.dim() == 3 and weight.shape[0] <= _MOST_MATRICES:
        views = [weight, *weight.detach().unbind()]
    else:
        views = [weight]
    if weight.dim() > 2 and all(size == 1 for size in weight.shape[2:]):
        views.append(weight.detach().flatten(1))  # a 1×1 convolution's
    return views


def _is_grouped_product(func: Any) -> bool:
    """Whether ``func`` is the product that Transformers registers for experts."""
    return getattr(func, "__name__", "").partition(".")[0] == "grouped_mm_fallback"


def _memory_key(tensor: Tensor) -> MemoryKey:
    """Where a tensor lies. Strides of dimensions of size 1 are arbitrary and left out."""
    sizes = tuple(tensor.shape)
    strides = tuple(s if n > 1 else 0 for n, s in zip(sizes, tensor.stride(), strict=True))
    return tensor.device, tensor.data_ptr(), sizes, strides


class Quietly:
    """Eval mode, no gradients, no compiled code and no caches of keys and values inside.

    All is as before afterwards. Hugging Face's models fill a cache unless their configuration says
    otherwise; nothing here would read it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._training = [(module, module.training) for module in self._model.modules()]
        configs = {id(c): c for m in self._model.modules() if (c := getattr(m, "config", None))}
        self._caching = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
        for config in self._caching:
            config.use_cache = False
        self._no_grad = torch.no_grad()
        self._eager = torch.compiler.set_stance("force_eager")
        self._model.eval()
        self._no_grad.__enter__()
        self._eager.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._eager.__exit__(*error)
        self._no_grad.__exit__(*error)
        for config in self._caching:
            config.use_cache = True
        for module, training in self._training:
            module.training = training


def run_batch(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """Call the model as :func:`ss1_compile.calibration.statistics.calibrate` says; its result.

    Raises:
        CalibrationError: a batch of an unknown kind.
    """
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise CalibrationError(
        f"a batch is a {type(batch).__name__}, not a mapping, tuple, list or tensor; "
        f"pass forward=lambda model, batch: ..."
    )


def attention_mask(batch: Any) -> Tensor | None:
    """The bool ``[B, T]`` mask of a batch that has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
