"""``SS1Linear``: the layer that takes the place of ``nn.Linear``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.errors import QuantizationError, StructureError
from ss1_compile.kernels.quantize import Q_MAX, dequantize
from ss1_compile.learned import Structure, structure_of
from ss1_compile.structure import SS1Structure


class SS1Linear(nn.Module):
    """``y = x Wᵀ + b`` with ``W`` stored as ``z [N, K_c]`` (SS1, NeurIPS 2024).

    Holds plain tensors only, so it trains, copies, pickles, casts and saves like ``nn.Linear``.

    A *quantised* layer holds an int8 or float8 z with float32 scales. They are buffers: ``half()``
    and ``to(dtype)`` leave their dtypes alone, and they are frozen, while x, the bias and learned
    blocks keep their gradients (those of the layer with dequantised z).

    Attributes:
        z: parameter ``[N, K_c]``; quantised, a buffer of int8 or float8_e4m3fn.
        bias: parameter ``[N]`` or ``None``.
        sketch: the operator's sketch operand: an int32 buffer ``[J, G, c]`` for a rotation, a
            parameter ``[J, G, gsize, r]`` for a learned structure.
        scale: float32 buffer ``[N, groups]`` of a quantised layer, else ``None``.
        dynamic: whether a quantised layer quantises its activations too, per token.
        block_k: B_K of a rotation, ``None`` for a learned structure.
    """

    z: Tensor
    bias: nn.Parameter | None
    sketch: Tensor
    scale: Tensor | None

    def __init__(
        self,
        structure: Structure,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = structure.in_features
        self.out_features = structure.out_features
        self.block_k = structure.block_k if isinstance(structure, SS1Structure) else None
        shape = (structure.out_features, structure.reduced_features)
        self.z = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None,
        )
        if isinstance(structure, SS1Structure):
            self.register_buffer("sketch", structure.code.to(self.z.device, copy=True))
        else:
            blocks = torch.empty(structure.sketch_shape, device=device, dtype=dtype)
            self.register_parameter("sketch", nn.Parameter(blocks))
        self.register_buffer("scale", None)
        self.dynamic = False
        self._float_dtype: torch.dtype | None = None
        self.reset_parameters()

    @classmethod
    def from_tensors(
        cls,
        structure: Structure,
        z: Tensor,
        bias: nn.Parameter | None,
        sketch: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        dynamic: bool = False,
        dtype: torch.dtype | None = None,
    ) -> SS1Linear:
        """Wrap existing tensors without copying them; a rotation goes to z's device.

        Args:
            structure: of the layer.
            z: parameter ``[N, K_c]``; with a scale a tensor of int8 or float8_e4m3fn.
            bias: ``[N]`` or ``None``.
            sketch: the blocks ``[J, G, gsize, r]`` of a learned structure, in z's dtype (``dtype``
                with a scale); a parameter, or a tensor that becomes one and is trained if z is.
            scale: float32 ``[N, groups]`` of a quantised z, as
                :func:`ss1_compile.kernels.quantize.quantize_rows` gives it.
            dynamic: see :class:`SS1Linear`.
            dtype: of x, the bias and learned blocks of a quantised layer; ``None`` means that of
                the bias or the blocks, float32 without either.

        Raises:
            StructureError: z, the bias or the sketch does not have the structure's shape.
            QuantizationError: z and its scale do not fit each other, or the layer is float64.
        """
        shape = (structure.out_features, structure.reduced_features)
        if tuple(z.shape) != shape or (bias is not None and tuple(bias.shape) != shape[:1]):
            raise StructureError(
                f"z must be {list(shape)} and the bias [{shape[0]}], got {list(z.shape)} and "
                f"{None if bias is None else list(bias.shape)}"
            )
        module = cls(structure, bias is not None, device="meta")
        structure.check_sketch(sketch)
        if scale is None:
            module.z = z
        else:
            del module.z
            module.register_buffer("z", z)
            module.scale, module.dynamic = scale, dynamic
            floating = (t for t in (bias, sketch) if t is not None and t.is_floating_point())
            module._float_dtype = dtype or next((t.dtype for t in floating), torch.float32)
            check_quantized(z, scale, dynamic, module._float_dtype)
        module.bias = bias
        if isinstance(structure, SS1Structure):
            module.sketch = structure.code.to(z.device, copy=True)
        else:
            assert sketch is not None
            is_parameter = isinstance(sketch, nn.Parameter)
            module.sketch = sketch if is_parameter else nn.Parameter(sketch, z.requires_grad)
        return module

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear``.

        Entries of W are ± those of z, which so takes its range; or sums of r products with entries
        of learned blocks, whose variance is 1/r.
        """
        bound = 1 / math.sqrt(self.in_features)
        if self.block_k is None:
            scale = math.sqrt(3 / self.sketch.shape[3])
            nn.init.uniform_(self.sketch, -scale, scale)
        nn.init.uniform_(self.z, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def structure(self) -> Structure:
        """The structure, rebuilt from the sketch and validated."""
        return structure_of(self.in_features, self.out_features, self.block_k, self.sketch)

    @property
    def reduction(self) -> float:
        """The factor c; an integer for a rotation."""
        return self.structure.reduction if self.block_k is None else self.sketch.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of ``weight``, the bias and learned blocks: that of z unless it is quantised."""
        return self._float_dtype or self.z.dtype

    @property
    def quantization(self) -> str | None:
        """The option of :class:`~ss1_compile.SS1Config` that makes such a layer, or ``None``."""
        if self.scale is None:
            return None
        if not self.dynamic:
            return "int8_weight_only"
        return "int8_dynamic" if self.z.dtype == torch.int8 else "fp8_dynamic"

    @property
    def weight(self) -> Tensor:
        """The dense ``W [N, K]`` in ``dtype``, materialised on every access.

        For code that looks at ``layer.weight`` (its dtype, say); ``forward`` never uses it.
        """
        z = self.z if self.scale is None else dequantize(self.z, self.scale, self.dtype)
        return self.structure.materialize(z, self.sketch)

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` that computes the same function."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        linear.weight = nn.Parameter(self.weight.detach(), self.z.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """``y [..., N]`` of ``x [..., K]``, both in the layer's dtype."""
        y: Tensor
        if self.scale is None:
            y = torch.ops.ss1.linear(x, self.sketch, self.z, self.bias)
        else:
            y = torch.ops.ss1.linear_quantized(
                x, self.sketch, self.z, self.scale, self.bias, self.dynamic
            )
        return y

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        sizes = f"block_k={self.block_k}"
        if self.block_k is None:
            sizes = f"group_size={self.sketch.shape[2]}, rank={self.sketch.shape[3]}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"reduction={self.reduction:.4g}, num_hashes={self.sketch.shape[0]}, "
            f"{sizes}, bias={self.bias is not None}"
        ) + ("" if self.scale is None else f", quantization={self.quantization!r}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Cast and move; the dtypes of a quantised z and its scale stay."""
        z, scale = self.z, self.scale
        if scale is None:
            super()._apply(fn, recurse)
            return self
        floating = fn(torch.empty(0, dtype=self.dtype, device=z.device)).dtype

        def keep_quantized(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if (tensor is z or tensor is scale) and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_quantized, recurse)
        if floating.is_floating_point:
            self._float_dtype = floating
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Layers that were pickled before there were quantised ones have no scale."""
        super().__setstate__(state)
        self._buffers.setdefault("scale", None)
        self.__dict__.setdefault("dynamic", False)
        self.__dict__.setdefault("_float_dtype", None)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse a sketch that does not fit the layer: kernels index by a rotation.

        And a z or scale of another kind: copying would round the one or reinterpret the other.
        """
        sketch = state_dict.get(prefix + "sketch")
        if isinstance(sketch, Tensor) and not sketch.is_meta:
            try:
                if sketch.is_floating_point() != self.sketch.is_floating_point():
                    raise StructureError(
                        f"it is {sketch.dtype}, the layer's is {self.sketch.dtype}: the kinds of "
                        f"sketch differ"
                    )
                structure_of(self.in_features, self.out_features, self.block_k, sketch)
            except StructureError as error:
                raise StructureError(f"{prefix}sketch in the state dict: {error}") from error
        self._check_state(state_dict.get(prefix + "z"), state_dict.get(prefix + "scale"), prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_state(self, z: object, scale: object, prefix: str) -> None:
        held = self.z.dtype if self.scale is not None else None
        if isinstance(z, Tensor):
            given = z.dtype if z.dtype in Q_MAX else None
            if given != held:
                kinds = [str(kind or "not quantised") for kind in (given, held)]
                raise QuantizationError(
                    f"{prefix}z in the state dict is {kinds[0]}, the layer's is {kinds[1]}: load "
                    f"into a model that was compressed with the same quantization"
                )
        if isinstance(scale, Tensor) and self.scale is not None:
            problem = scale_problem(scale, self.out_features)
            if problem is not None:
                raise QuantizationError(f"{prefix}scale in the state dict {problem}")


def scale_problem(scale: Tensor, out_features: int) -> str | None:
    """What is wrong with the scales of a quantised z, for a message, or ``None``."""
    shape = list(scale.shape)
    if scale.dtype != torch.float32 or len(shape) != 2 or shape[0] != out_features or not shape[1]:
        return f"must be float32 [{out_features}, groups], got {scale.dtype} {shape}"
    if not scale.is_meta and not bool((scale.isfinite() & (scale > 0)).all()):
        return "must be positive and finite"
    return None


def check_quantized(z: Tensor, scale: Tensor, dynamic: bool, dtype: torch.dtype) -> None:
    """Raise :class:`QuantizationError` unless ``ss1::linear_quantized`` takes them together."""
    if z.dtype not in Q_MAX:
        raise QuantizationError(f"a quantised z must be int8 or float8_e4m3fn, got {z.dtype}")
    problem = scale_problem(scale, z.shape[0])
    if problem is not None:
        raise QuantizationError(f"the scale of a quantised z {problem}")
    if z.shape[1] % scale.shape[1]:
        raise QuantizationError(f"{scale.shape[1]} scales per row do not divide {z.shape[1]} slots")
    if dynamic and scale.shape[1] != 1:
        raise QuantizationError(
            f"with dynamic activations a row of z has one scale, got {scale.shape[1]}"
        )
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise QuantizationError(
            f"a quantised layer computes in float32, float16 or bfloat16, not {dtype}; convert the "
            f"model first (model.float())"
        )


def put_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place called ``name``.

    In eval mode ``nn.TransformerEncoderLayer`` hands the ``weight`` of its linears to one fused
    operator, which would materialise the dense matrix. It does so for known activations only, so
    it is told that its own is unknown; the activation itself is another attribute.
    """
    model.set_submodule(name, layer)
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0
