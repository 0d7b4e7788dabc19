"""``SS1Linear``: the layer that takes the place of ``nn.Linear``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ss1_compile.kernels  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.errors import StructureError
from ss1_compile.learned import Structure, structure_of
from ss1_compile.structure import SS1Structure


class SS1Linear(nn.Module):
    """``y = x Wᵀ + b`` with ``W`` stored as ``z [N, K_c]`` (SS1, NeurIPS 2024).

    Holds plain tensors only, so it trains, copies, pickles, casts and saves like ``nn.Linear``.

    Attributes:
        z: parameter ``[N, K_c]``.
        bias: parameter ``[N]`` or ``None``.
        sketch: the operator's sketch operand: an int32 buffer ``[J, G, c]`` for a rotation, a
            parameter ``[J, G, gsize, r]`` for a learned structure.
        block_k: B_K of a rotation, ``None`` for a learned structure.
    """

    z: nn.Parameter
    bias: nn.Parameter | None
    sketch: Tensor

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
        self.reset_parameters()

    @classmethod
    def from_tensors(
        cls,
        structure: Structure,
        z: nn.Parameter,
        bias: nn.Parameter | None,
        sketch: Tensor | None = None,
    ) -> SS1Linear:
        """Wrap existing parameters without copying them; a rotation goes to z's device.

        Args:
            structure: of the layer.
            z: ``[N, K_c]``.
            bias: ``[N]`` or ``None``.
            sketch: the blocks ``[J, G, gsize, r]`` of a learned structure, in z's dtype; a
                parameter, or a tensor that becomes one and is trained if z is.

        Raises:
            StructureError: z, the bias or the sketch does not have the structure's shape.
        """
        shape = (structure.out_features, structure.reduced_features)
        if tuple(z.shape) != shape or (bias is not None and tuple(bias.shape) != shape[:1]):
            raise StructureError(
                f"z must be {list(shape)} and the bias [{shape[0]}], got {list(z.shape)} and "
                f"{None if bias is None else list(bias.shape)}"
            )
        module = cls(structure, bias is not None, device="meta")
        module.z = z
        module.bias = bias
        structure.check_sketch(sketch)
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
    def weight(self) -> Tensor:
        """The dense ``W [N, K]``, materialised on every access.

        For code that looks at ``layer.weight`` (its dtype, say); ``forward`` never uses it.
        """
        return self.structure.materialize(self.z, self.sketch)

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` that computes the same function."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        linear.weight = nn.Parameter(self.weight.detach(), self.z.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """``y [..., N]`` of ``x [..., K]``, both in the layer's dtype."""
        y: Tensor = torch.ops.ss1.linear(x, self.sketch, self.z, self.bias)
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
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse a sketch that does not fit the layer: kernels index by a rotation."""
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
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


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
