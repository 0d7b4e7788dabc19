"""What the backend reads off a graph that Dynamo captured: names, weights, whether it is all."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import fx, nn


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with the metadata AOTAutograd needs; Dynamo rereads the original afterwards."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, mapping))
    for old, new in mapping.items():
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copy._param_name_to_source = gm._param_name_to_source
    return copy


def fake_mode_of(nodes: Iterable[fx.Node]) -> Any:
    """The mode of the nodes' example values; ``None`` if they are real."""
    modes = (getattr(node.meta.get("example_value"), "fake_mode", None) for node in nodes)
    return next((mode for mode in modes if mode is not None), None)


def is_static(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or buffer of a module that Dynamo holds fixed."""
    is_static = bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))
    return is_static or isinstance(node.meta.get("example_value"), nn.Parameter)


def layer_name(node: fx.Node) -> str:
    """The name :func:`ss1_compile.compress` would use: that of the module that holds ``weight``.

    ``"encoder.0"`` from ``L['self']._modules['encoder']._modules['0']._parameters['weight']``, or
    the same through ``__dict__['_modules']`` or plain attributes; parameters of another name keep
    it (``"attention.in_proj"``).
    """
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return node.name
    text = source.name if isinstance(source.name, str) else source.name()
    return qualified_name(text).removesuffix(".weight")


def qualified_name(source: str) -> str:
    """The path below the root that Dynamo's expression names; the expression if it is no path."""
    step = r"\.(\w+)|\['([^']*)'\]|\[(\d+)\]"
    path = re.fullmatch(rf"[LG]\['\w+'\]((?:{step})+)", source)
    if path is None:
        return source
    steps = ["".join(found) for found in re.findall(step, path[1])]
    storage = ("__dict__", "_modules", "_parameters", "_buffers")
    return ".".join(name for name in steps if name not in storage)


def module_name(node: fx.Node) -> str:
    """The name of the module whose ``forward`` made the node; the node's own if it is unknown."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    text = str(stack[-1][0]) if stack else ""  # "L['self'].encoder.0"
    return re.sub(r"^\w+\['\w+'\]\.?", "", text) or node.name


def is_whole_model(gm: fx.GraphModule) -> bool:
    """Whether the graph is a whole call: no graph break ends it and none precedes it."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or reason.graph_break:
        return False
    return not any("torch_dynamo_resume_in" in frame.name for frame in reason.user_stack)
