"""Run the layers of the blocks with their dense weights while a model is healed.

A step runs thousands of tokens through a layer of some hundred features. One product with
``W = z Sᵀ``, which is made once a step, then takes less time than the two with the sketch and z and
their gradients; and blocks of one form, whatever their sketches are like, share one compilation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ss1_compile.modules import SS1Linear


class DenseForm(nn.Module):
    """A linear layer with a weight that is made from parameters of another, step by step.

    Attributes:
        weight: ``[N, K]``, part of the step's graph; ``None`` between the steps.
        bias: the other layer's.
    """

    def __init__(self, layer: SS1Linear | nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight: Tensor | None = None
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """``y [..., N]`` of ``x [..., K]``."""
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)


class Materialized:
    """The layers of a model's blocks that can run with a dense weight.

    They are the SS1 layers with a learned sketch, and beside them dense ones, so that blocks with
    and without SS1 layers are of one form.

    Args:
        model: has the blocks.
        blocks: their names; none means the whole model.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self._places: list[tuple[nn.Module, str, nn.Module, DenseForm]] = []
        self._learned: dict[tuple[int, ...], list[tuple[SS1Linear, DenseForm]]] = {}
        self._dense: list[tuple[nn.Linear, DenseForm]] = []
        forms: dict[nn.Module, DenseForm] = {}
        parents = {p: None for name in blocks or [""] for p in model.get_submodule(name).modules()}
        for parent in parents:
            for key, layer in parent._modules.items():
                form = None if layer is None else forms.get(layer) or self._form(layer)
                if layer is not None and form is not None:
                    forms[layer] = form
                    self._places.append((parent, key, layer, form))

    def _form(self, layer: nn.Module) -> DenseForm | None:
        if type(layer) is nn.Linear:
            form = DenseForm(layer)
            self._dense.append((layer, form))
            return form
        if type(layer) is SS1Linear and layer.block_k is None:
            form = DenseForm(layer)
            alike = (*layer.z.shape, *layer.sketch.shape, layer.in_features)
            self._learned.setdefault(alike, []).append((layer, form))
            return form
        return None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The dense forms in the places of the layers, for one step."""
        for parent, key, _, form in self._places:
            parent._modules[key] = form
        try:
            yield
        finally:
            for parent, key, layer, form in self._places:
                parent._modules[key] = layer
                form.weight = None

    def make_weights(self) -> None:
        """Of the parameters as they are, in autocast's dtype inside of it."""
        for layer, form in self._dense:
            form.weight = _cast(layer.weight)
        for layers in self._learned.values():
            _set_weights([layer for layer, _ in layers], [form for _, form in layers])


def _set_weights(layers: Sequence[SS1Linear], forms: Sequence[DenseForm]) -> None:
    """``W[n, (g, k)] = Σ_r z[n, (g, r)] S[j, g, k, r]`` of layers of one shape, at once."""
    _, groups, _, rank = layers[0].sketch.shape
    structure = layers[0].structure
    z = torch.stack([layer.z for layer in layers]).unflatten(2, (groups, rank))
    sketch = torch.stack([layer.sketch for layer in layers])
    parts = [
        torch.einsum("lngr,lgkr->lngk", rows, sketch[:, j])
        for j, rows in enumerate(z.split(structure.block_n, 1))
    ]
    weights = torch.cat(parts, 1).flatten(2)[:, :, : structure.in_features]
    for form, weight in zip(forms, weights.unbind(), strict=True):
        # no view: dynamo guards on the tensor behind one, which differs from group to group
        form.weight = weight.clone(memory_format=torch.contiguous_format)


def _cast(weight: Tensor) -> Tensor:
    """In the dtype of the products, and no parameter, as the others are none."""
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return weight.to(dtype, copy=True)
