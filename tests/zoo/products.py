"""Count the products of a model with its parameters, independently of the library's site finder.

A ``TorchDispatchMode`` sees every operator that the dense model runs in eager mode, below any
spelling; a tensor that is computed from parameters alone is followed to them by its storage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_PRODUCTS = {  # operator → positions of its two factors, the right one first
    _aten.mm: (1, 0),
    _aten.mv: (1, 0),
    _aten.bmm: (1, 0),
    _aten.addmm: (2, 1),
    _aten.addmv: (2, 1),
    _aten.baddbmm: (2, 1),
    _aten._grouped_mm: (1, 0),
    _aten.convolution: (1,),
}


@dataclass
class Product:
    """The products with one weight.

    Attributes:
        names: every name of the parameters it is computed from.
        operators: by which operators.
        flops: two per multiplication, over all of them.
    """

    names: tuple[str, ...]
    operators: set[str]
    flops: int = 0

    def row_names(self) -> set[str]:
        """The names under which a report may list it: the parameter's or its module's."""
        plain = [re.sub(r"parametrizations\.(\w+)\.original\d*$", r"\1", n) for n in self.names]
        # nn.MultiheadAttention's parts have modules of their own after compress
        parts = [re.sub(r"\bin_proj_weight$", f"{x}_proj", n) for x in "qkv" for n in plain]
        parts += [name.removesuffix("_weight") for name in plain]
        return {*self.names, *parts, *(name.removesuffix(".weight") for name in plain)}


class _Watch(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.products: dict[tuple[str, ...], Product] = {}
        self.convolution_flops = 0
        self.names: dict[int, tuple[str, ...]] = {}  # storage → the parameters it comes from
        self.computed: set[int] = set()  # storages that are no parameter's own
        self.alive: list[Tensor] = []  # so that no storage is used again for something else
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.dim() >= 2:
                key = _storage(parameter)
                self.names[key] = (*self.names.get(key, ()), name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.higher_order.cond:
            predicate, yes, no, operands = args
            with self:
                return (yes if predicate else no)(*operands)
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        if packet in _PRODUCTS:
            self._count(packet, args, out)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        names = [self.names.get(_storage(x)) for x in tensors]
        if tensors and all(names):
            for result in tree_leaves(out):
                if isinstance(result, Tensor) and _storage(result) not in self.names:
                    self.names[_storage(result)] = tuple(
                        dict.fromkeys(n for group in names for n in group or ())
                    )
                    if packet not in (_aten.clone, _aten._to_copy):
                        self.computed.add(_storage(result))
                    self.alive.append(result)
        return out

    def _count(self, packet: Any, args: tuple[Any, ...], out: Tensor) -> None:
        factors = [args[i] for i in _PRODUCTS[packet] if _storage(args[i]) in self.names]
        if not factors:
            return
        weight = min(factors, key=lambda x: _storage(x) in self.computed)  # itself, if there is one
        if packet is _aten.convolution:
            flops = 2 * out.numel() * weight[0].numel()
            if any(size != 1 for size in weight.shape[2:]):
                self.convolution_flops += flops
                return
        else:
            flops = 2 * out.numel() * args[_PRODUCTS[packet][1]].shape[-1]
        names = self.names[_storage(weight)]
        product = self.products.setdefault(names, Product(names, set()))
        product.operators.add(str(packet).removeprefix("aten."))
        product.flops += flops


def watch(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[Product], int]:
    """The products of one forward pass, and the FLOPs of its real convolutions.

    The fused operators of attention and recurrent layers are switched off, so that the products
    inside them are seen as well.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), _Watch(model) as mode:
            model(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        # Dynamo skips the frame of torch.cond under a mode, and remembers it: without a reset the
        # next torch.cond would fail (torch 2.13).
        torch._dynamo.reset()
    return list(mode.products.values()), mode.convolution_flops


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
