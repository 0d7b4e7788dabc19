"""The SS1 layers of an ONNX model in memory: finding, quantising, giving them bodies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from ss1_compile.config import SS1Config
from ss1_compile.errors import CheckpointError
from ss1_compile.kernels.layout import block_n
from ss1_compile.learned import Structure
from ss1_compile.onnx.functions import NARROW, Traits, function_body
from ss1_compile.onnx.operators import (
    BLOCK_K,
    DOMAIN,
    IN_FEATURES,
    VERSION,
    Operator,
    operator_of,
)
from ss1_compile.structure import SS1Structure

SEVEN_BITS, EIGHT_BITS = 63, 127
"""Largest magnitudes of int8 codes."""

FORMAT_VERSION = "1"
FORMAT_KEY = "ss1.format"
LAYERS_KEY = "ss1.layers"
CONFIG_KEY = "ss1.config"

Form = Literal["function", "standard", "custom"]
FORMS: tuple[Form, ...] = ("function", "standard", "custom")


@dataclass(frozen=True)
class OnnxLayer:
    """One SS1 layer of an ONNX model.

    Attributes:
        name: qualified name of the PyTorch module, or the name of the node.
        op: operator type.
        in_features: K.
        out_features: N.
        reduction: c; for a learned sketch ``K / K_c``.
        num_hashes: J.
        block_k: B_K; for a learned sketch ``r``.
        dtype: of the activations: ``"float32"``, ``"float16"``, ``"bfloat16"`` or ``"float64"``.
        bias: whether it has one.
        bytes_dense: of the dense weight and bias in ``dtype``.
        bytes_stored: of Z, sketch, scale and bias.
    """

    name: str
    op: str
    in_features: int
    out_features: int
    reduction: float
    num_hashes: int
    block_k: int
    dtype: str
    bias: bool
    bytes_dense: int
    bytes_stored: int


def ss1_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, Operator]]:
    """Every node of the graph and its subgraphs that runs one of our operators."""
    for node in model.graph.all_nodes():
        operator = operator_of(node.domain, node.op_type)
        if operator is not None:
            yield node, operator


def operand(node: ir.Node, operator: Operator, name: str) -> ir.Value:
    """The node's input called ``name`` in :attr:`Operator.operands`.

    Raises:
        CheckpointError: the node lacks it.
    """
    index = operator.operands.index(name)
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise CheckpointError(
            f"{node.op_type} {node.name!r} has no operand {name}; it takes "
            f"{', '.join(operator.operands)}"
        )
    return value


def constant(node: ir.Node, operator: Operator, name: str) -> ir.TensorProtocol:
    """The value of an operand that must be an initializer or a constant.

    Raises:
        CheckpointError: it is computed, or missing.
    """
    value = operand(node, operator, name)
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise CheckpointError(
            f"{layer_name(node, operator)}: operand {name} ({value.name!r}) is no initializer"
        )
    return tensor


def dims(tensor: ir.TensorProtocol) -> list[int]:
    """The shape of a constant, whose dimensions are all known."""
    return [d for d in tensor.shape if isinstance(d, int)]


def layer_name(node: ir.Node, operator: Operator) -> str:
    """The module's name if Z is called after it (``name.z``), else the node's."""
    z = operand(node, operator, "Z").name or ""
    name = z.removesuffix(".z")
    return name if name != z else (node.name or z or node.op_type)


def in_features_of(node: ir.Node) -> int:
    """The attribute K.

    Raises:
        CheckpointError: it is missing or no positive integer.
    """
    return _positive(node, IN_FEATURES)


def attributes_of(structure: Structure) -> list[ir.Attr]:
    """The attributes of a node."""
    sizes = {IN_FEATURES: structure.in_features}
    if isinstance(structure, SS1Structure):
        sizes[BLOCK_K] = structure.block_k
    return [ir.AttrInt64(name, value) for name, value in sizes.items()]


def _positive(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    if attribute is None or attribute.type != ir.AttributeType.INT or attribute.as_int() < 1:
        raise CheckpointError(f"{node.op_type} {node.name!r}: {name} must be an integer ≥ 1")
    return attribute.as_int()


def check_block_k(node: ir.Node, operator: Operator, groups: int, reduced: int) -> None:
    """Raise :class:`CheckpointError` unless the attribute B_K is ``K_c / G``, as the body needs."""
    if operator.kind == "rotation" and _positive(node, BLOCK_K) * groups != reduced:
        raise CheckpointError(
            f"{layer_name(node, operator)}: {BLOCK_K} = {_positive(node, BLOCK_K)} with {groups} "
            f"supergroups does not fit Z with {reduced} columns"
        )


def describe(node: ir.Node, operator: Operator) -> OnnxLayer:
    """The layer that ``node`` is, read off the shapes of its operands."""
    tensors = {n: constant(node, operator, n) for n in operator.operands if n != "X"}
    sketch, z, bias = tensors["sketch"], tensors["Z"], tensors["B"]
    name, k = layer_name(node, operator), in_features_of(node)
    ranks = {"sketch": 3 if operator.kind == "rotation" else 4, "Z": 2}
    for which, rank in ranks.items():
        if len(dims(tensors[which])) != rank or not tensors[which].size:
            raise CheckpointError(
                f"{name}: {which} has shape {dims(tensors[which])}; rank {rank} is needed"
            )
    num_hashes, groups = dims(sketch)[:2]
    n, reduced = dims(z)
    check_block_k(node, operator, groups, reduced)
    has_bias = len(bias.shape) == 1
    itemsize = bias.dtype.itemsize
    return OnnxLayer(
        name=name,
        op=node.op_type,
        in_features=k,
        out_features=n,
        reduction=dims(sketch)[2] if operator.kind == "rotation" else k / reduced,
        num_hashes=num_hashes,
        block_k=reduced // groups,
        dtype=bias.dtype.numpy().name,
        bias=has_bias,
        bytes_dense=int(itemsize * (n * k + has_bias * n)),
        bytes_stored=sum(tensor.nbytes for tensor in tensors.values()),
    )


# --- editing -----------------------------------------------------------------------------------


def copy_output(old: ir.Value, new: ir.Value) -> None:
    """Give ``new`` the name, type and shape of ``old``."""
    new.name, new.type, new.shape = old.name, old.type, old.shape


def add_initializer(
    model: ir.Model, name: str, array: np.ndarray[Any, Any], replacing: ir.Value | None = None
) -> ir.Value:
    """A new initializer of the main graph. Its name is made unique unless it replaces another's."""
    initializers = model.graph.initializers
    if replacing is not None and replacing.name == name:
        replacing.name = f"{name}.replaced"
    unique, count = name, 0
    while unique in initializers:
        count += 1
        unique = f"{name}.{count}"
    tensor = ir.tensor(np.array(array, order="C"), name=unique)
    value = ir.Value(
        name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )  # fmt: skip
    model.graph.register_initializer(value)
    return value


def drop_unused(model: ir.Model, value: ir.Value | None) -> None:
    """Remove a weight that nothing reads any more, and the constant that it is computed from."""
    if value is None or value.uses() or value.is_graph_output():
        return
    producer = value.producer()
    if producer is None:
        if value.name is not None:
            model.graph.initializers.pop(value.name, None)
    elif producer.op_type in ("Constant", "Transpose") and producer.graph is not None:
        sources = list(producer.inputs)
        producer.graph.remove(producer, safe=True)
        for source in sources:
            drop_unused(model, source)


# --- forms --------------------------------------------------------------------------------------


def traits_of(model: ir.Model, operator: Operator) -> Traits:
    """What the layers that use ``operator`` have in common."""
    hashes: set[int] = set()
    pads = cuts = wide = False
    narrow = biased = True
    for node, of in ss1_nodes(model):
        if of != operator:
            continue
        sketch, z = constant(node, of, "sketch"), constant(node, of, "Z")
        num_hashes, groups, parts = dims(sketch)[:3]
        out_features, reduced = dims(z)
        size = parts * (reduced // groups) if of.kind == "rotation" else parts
        pads |= in_features_of(node) != groups * size
        cuts |= num_hashes * block_n(out_features, num_hashes) != out_features
        hashes.add(num_hashes)
        narrow &= num_hashes * (reduced // groups) <= NARROW
        biased &= len(dims(constant(node, of, "B"))) == 1
        if of.quantization == "int8_per_token" and not wide:
            wide = bool((np.abs(z.numpy().astype(np.int16)) > SEVEN_BITS).any())
    return Traits(hashes.pop() if len(hashes) == 1 else None, pads, cuts, wide, narrow, biased)


def attach_functions(model: ir.Model, reduce_range: bool = True) -> None:
    """Give every SS1 operator that the model uses its body, a local function, in place.

    Args:
        model: that has the nodes.
        reduce_range: whether products of 8-bit codes must be exact on CPUs that add pairs of them
            in 16 bits; see :func:`ss1_compile.export_onnx`.
    """
    used = {operator for _, operator in ss1_nodes(model)}
    opset = int(model.graph.opset_imports.get("", 0))
    for operator in used:
        traits = traits_of(model, operator)
        traits = replace(traits, wide=traits.wide and reduce_range)
        body = ir.serde.deserialize_function(function_body(operator, opset, traits))
        model.functions[body.identifier()] = body
    if used:
        model.graph.opset_imports[DOMAIN] = VERSION


def detach_functions(model: ir.Model) -> None:
    """Remove the bodies that :func:`attach_functions` attached, in place."""
    for identifier in [i for i in model.functions if i[0] == DOMAIN]:
        del model.functions[identifier]


def inline_functions(model: ir.Model) -> None:
    """Replace every call of a local function by its body, in place."""
    InlinePass()(model)
    model.graph.opset_imports.pop(DOMAIN, None)


def share_sketches(model: ir.Model) -> None:
    """Let equal sketches, as those of q, k and v, be one initializer."""
    known: dict[tuple[Any, ...], ir.Value] = {}
    for node, operator in ss1_nodes(model):
        value = operand(node, operator, "sketch")
        tensor = constant(node, operator, "sketch")
        key = (tuple(tensor.shape), tensor.dtype, tensor.tobytes())
        first = known.setdefault(key, value)
        if first is not value:
            node.replace_input_with(operator.operands.index("sketch"), first)
            drop_unused(model, value)


def record(model: ir.Model, layers: list[OnnxLayer], config: SS1Config | None) -> None:
    """Put format, layers and configuration into ``metadata_props``."""
    fields = ("name", "op", "in_features", "out_features", "reduction", "block_k", "num_hashes")
    rows = [{field: asdict(layer)[field] for field in fields} for layer in layers]
    model.metadata_props[FORMAT_KEY] = FORMAT_VERSION
    model.metadata_props[LAYERS_KEY] = json.dumps(rows)
    if config is not None:
        model.metadata_props[CONFIG_KEY] = json.dumps(config.to_dict())


def strip(model: ir.Model) -> None:
    """Remove what the exporter records of the machine: stack traces hold local paths."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in graphs:
        for node in graph.all_nodes():
            node.doc_string = None
            for key in [k for k in node.metadata_props if "stack_trace" in k]:
                del node.metadata_props[key]
    model.doc_string = None
