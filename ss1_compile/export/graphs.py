"""What graphs and tensors of an exported program have to do with each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Identifies a tensor by its memory: tied weights may be distinct objects after loading."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.layout != torch.strided:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes have the very names of the original, to which signatures refer."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = new.graph_copy(graph, mapping, return_output_node=True)
    assert isinstance(result, tuple)
    value, output = result
    new.output(value).meta.update(output.meta)
    for old, copied in mapping.items():
        copied.name = old.name
    return new
