"""Stand-ins: equivalent modules whose linear layers can be replaced one by one.

Some modules multiply by their weights in one function, out of the reach of a replacement. Before
``compress`` looks for layers each of them makes way for a dense equivalent that consists of layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ss1_compile.compression.attention import SS1MultiheadAttention
from ss1_compile.experts import SS1ExpertLinear, SS1Experts, is_experts
from ss1_compile.modules import SS1Linear


@dataclass(frozen=True)
class StandIn:
    """A module and what stands in for it.

    Attributes:
        names: its qualified names.
        original: what was there.
        module: what is there now.
    """

    names: tuple[str, ...]
    original: nn.Module
    module: nn.Module

    def has_compressed(self) -> bool:
        """Whether any layer of it was compressed."""
        return any(
            isinstance(module, SS1Linear | SS1ExpertLinear) for module in self.module.modules()
        )


class StandIns:
    """The stand-ins of a model; see :func:`stand_ins`."""

    def __init__(self, members: Sequence[StandIn]) -> None:
        self.members = members
        self.kept = False

    def keep(self) -> None:
        """Leave those with a compressed layer in place for good."""
        self.kept = True


@contextlib.contextmanager
def stand_ins(model: nn.Module, layers: Iterable[str] | None = None) -> Iterator[StandIns]:
    """Put stand-ins into ``model``; on leaving, put back the originals of all that were not kept.

    A module is left alone where an equivalent might differ from it: if it has hooks, a subclass's
    forward, or a parameter that another module holds too; and the model itself.

    Args:
        model: changed in place.
        layers: qualified names of layers; modules that are to hold none of them, as a stand-in's
            children, are left alone too. ``None`` means all modules.
    """
    parents = None if layers is None else {name.rpartition(".")[0] for name in layers}
    inside = StandIns([])
    try:
        inside.members = _put(model, parents)
        yield inside
    finally:
        for member in inside.members:
            if inside.kept and member.has_compressed():
                _unshare(member.module)
            else:
                for name in member.names:
                    model.set_submodule(name, member.original)


def stand_in_for(module: nn.Module) -> nn.Module | None:
    """A dense equivalent of ``module`` made of layers; ``None`` if there is none or none needed."""
    hooked = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    if any(hooked) or "forward" in vars(module):
        return None
    if type(module) is nn.MultiheadAttention:
        return SS1MultiheadAttention(module)
    return SS1Experts(module) if is_experts(module) else None


def _put(model: nn.Module, parents: set[str] | None) -> list[StandIn]:
    names: dict[nn.Module, list[str]] = {}
    owners: dict[int, set[int]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    members = []
    for module, paths in names.items():
        shared = any(len(owners[id(p)]) > 1 for p in module.parameters())
        unused = parents is not None and parents.isdisjoint(paths)
        equivalent = None if shared or unused or "" in paths else stand_in_for(module)
        if equivalent is not None:
            members.append(StandIn(tuple(paths), module, equivalent))
    for member in members:
        for name in member.names:
            model.set_submodule(name, member.module)
    return members


def _unshare(module: nn.Module) -> None:
    """Give the parts of a packed parameter that stayed dense memory of their own."""
    for parameter in module.parameters():
        if parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size():
            parameter.data = parameter.data.clone()
