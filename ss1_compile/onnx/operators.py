"""The ONNX operators: names, operands and schemas.

================================  ================================================================
``SS1Linear``                     ``Y [..., N]`` of ``X [..., K]``: the rotation sketch
``SS1LearnedLinear``              the same with learned blocks as the sketch
``…Int8``                         Z is int8 with a scale per row: weight-only
``…Int8Dynamic``                  the same, and the sketched input is quantised at run time, per
                                  tensor and to uint8
``…Int8PerToken``                 the same, but per row of X and column block, to ±127: the
                                  arithmetic of ``torch.ops.ss1.linear_quantized``
================================  ================================================================

Operands: ``X [..., K]``, ``sketch`` (int32 ``[J, G, c]`` or floating ``[J, G, gsize, r]``, see
:mod:`ss1_compile.kernels.layout`), ``Z [N, K_c]``, for int8 ``scale`` float32 ``[N, groups]``, and
``B [N]``. A layer without a bias has the scalar 0 as B: optional inputs break the ONNX parser of
TensorRT, and runtimes drop the addition of a scalar 0. The attributes are ``in_features`` (K) and,
with a rotation sketch, ``block_k`` (B_K); every other size can be read off the shapes. B_K could
be, too, but only off Z, and then no runtime would see that the sketches of q, k and v are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import defs
from onnx.shape_inference import InferenceContext, InferenceError

from ss1_compile.config import Quantization

DOMAIN = "io.github.ss1_compile"
"""Never to be renamed. ONNX Runtime ignores versions of domains it does not know, so a change that
breaks readers goes into the operator's name."""

VERSION = 1
IN_FEATURES = "in_features"
BLOCK_K = "block_k"

Kind = Literal["rotation", "learned"]
Arithmetic = Quantization | Literal["int8_per_token"]

_FLOATS = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(double)"]
_NAMES: dict[Kind, str] = {"rotation": "SS1Linear", "learned": "SS1LearnedLinear"}
_SUFFIXES: dict[Arithmetic | None, str] = {
    None: "",
    "int8_weight_only": "Int8",
    "int8_dynamic": "Int8Dynamic",
    "int8_per_token": "Int8PerToken",
}


@dataclass(frozen=True)
class Operator:
    """One ONNX operator.

    Attributes:
        kind: of the sketch.
        quantization: of Z; ``None`` means that Z is floating.
    """

    kind: Kind
    quantization: Arithmetic | None = None

    @property
    def name(self) -> str:
        """The operator type in :data:`DOMAIN`."""
        return _NAMES[self.kind] + _SUFFIXES[self.quantization]

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the inputs, in order; all are required."""
        scale = () if self.quantization is None else ("scale",)
        return ("X", "sketch", "Z", *scale, "B")

    @property
    def attributes(self) -> dict[str, str]:
        """What each attribute, a positive integer, says; all are required."""
        of_kind = {BLOCK_K: "B_K, the chunk length."} if self.kind == "rotation" else {}
        return {IN_FEATURES: "K, the features of X.", **of_kind}


OPERATORS = {
    operator.name: operator
    for operator in (Operator(kind, q) for kind in _NAMES for q in _SUFFIXES)
}


def register_schemas() -> None:
    """Register the operators with ``onnx.defs``, so that checkers and shape inference know them.

    Needed for ``form="custom"`` only, whose file has no function bodies. May be called any number
    of times.
    """
    for operator in OPERATORS.values():
        if not defs.has(operator.name, DOMAIN):
            defs.register_schema(_schema(operator))


def _schema(operator: Operator) -> defs.OpSchema:
    formal = defs.OpSchema.FormalParameter
    quantized = operator.quantization is not None
    types = {
        "X": "T",
        "sketch": "T" if operator.kind == "learned" else "tensor(int32)",
        "Z": "tensor(int8)" if quantized else "T",
        "scale": "tensor(float)",
        "B": "T",
    }
    schema = defs.OpSchema(
        operator.name,
        DOMAIN,
        VERSION,
        doc="A linear layer as a sketch structured transform (SS1).",
        inputs=[formal(name, types[name]) for name in operator.operands],
        outputs=[formal("Y", "T")],
        type_constraints=[("T", _FLOATS, "Floating.")],
        attributes=[
            defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.INT, text, required=True)
            for name, text in operator.attributes.items()
        ],
    )
    schema.set_type_and_shape_inference_function(_inference(operator))
    return schema


class _Inference:
    """``Y`` has the type of X, and its shape but for the last dimension, which is N."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator

    def __call__(self, context: InferenceContext) -> None:
        name, operands = self.operator.name, self.operator.operands
        if context.get_num_inputs() != len(operands):
            raise InferenceError(
                f"{name} takes {', '.join(operands)}; got {context.get_num_inputs()} inputs"
            )
        types = {operand: context.get_input_type(i) for i, operand in enumerate(operands)}
        shapes = {operand: _shape(of) for operand, of in types.items()}
        output = onnx.TypeProto()
        output.tensor_type.elem_type = types["X"].tensor_type.elem_type
        x, z = shapes["X"], shapes["Z"]
        if x is not None:
            self._check(context, shapes)
            dims = output.tensor_type.shape.dim
            dims.extend(types["X"].tensor_type.shape.dim[:-1])
            last = dims.add()
            if z is not None and isinstance(z[0], int):
                last.dim_value = z[0]
        context.set_output_type(0, output)

    def _check(self, context: InferenceContext, shapes: dict[str, list[int | None] | None]) -> None:
        name = self.operator.name
        ranks = {"sketch": 3 if self.operator.kind == "rotation" else 4, "Z": 2, "scale": 2}
        for operand, rank in ranks.items():
            shape = shapes.get(operand)
            if shape is not None and len(shape) != rank:
                raise InferenceError(f"{name}: {operand} has rank {len(shape)}, not {rank}")
        x = shapes["X"]
        attribute = context.get_attribute(IN_FEATURES)
        if not x or (attribute is not None and x[-1] not in (None, attribute.i)):
            raise InferenceError(
                f"{name}: X {x} does not end with {IN_FEATURES} = {attribute and attribute.i}"
            )


def _inference(operator: Operator) -> _Inference:
    return _Inference(operator)


def _shape(of: onnx.TypeProto | None) -> list[int | None] | None:
    """The dimensions, ``None`` where one is not known, or ``None`` if not even the rank is."""
    if of is None or not of.tensor_type.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else None for d in of.tensor_type.shape.dim]


def operator_of(domain: str, op_type: str) -> Operator | None:
    """The operator that a node of this domain and type runs, or ``None`` if it is no SS1 layer."""
    return OPERATORS.get(op_type) if domain == DOMAIN else None


def operator_names() -> Sequence[str]:
    """All operator types of :data:`DOMAIN`."""
    return tuple(OPERATORS)
