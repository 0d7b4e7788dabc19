"""Remembers the models whose compression is settled: ``compress`` or ``load`` made them.

What is dense in them was left so for a reason (an exclusion, ``max_error``), which the backend must
not undo with its defaults. Deep copies and unpickled models are not remembered; their graphs show
by their SS1 layers what they are.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_parameters = WeakIdKeyDictionary()


def settle(model: nn.Module) -> None:
    """Remember every parameter of ``model``."""
    for parameter in model.parameters():
        _parameters[parameter] = None


def is_settled(parameter: Tensor) -> bool:
    """Whether :func:`settle` saw the parameter's model."""
    return parameter in _parameters
