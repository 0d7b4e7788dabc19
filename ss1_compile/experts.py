"""Experts: many linear layers of one shape in one 3-D parameter.

They share one structure, so that their inputs are sketched at once. ``SS1Experts`` takes the place
of the experts of Transformers' mixture-of-experts models; the graph doors rewrite the products.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ss1_compile.kernels.experts  # noqa: F401 - registers torch.ops.ss1
from ss1_compile.errors import StructureError
from ss1_compile.kernels.layout import block_n
from ss1_compile.learned import LearnedStructure, Structure, structure_of
from ss1_compile.projection.project import Projection, project
from ss1_compile.structure import SS1Structure


def project_experts(
    weight: Tensor, structure: Structure, bias: Tensor | None = None, **options: Any
) -> Projection:
    """:func:`ss1_compile.project` of ``[N, K]``, or of each matrix of ``[E, N, K]``.

    With experts z is ``[E, N, K_c]``, there is no bias, statistics are those of all their inputs
    together, and the error is the root mean square of theirs. Learned blocks are fitted to all
    experts at once, which share them; the error is then that of all their outputs together.

    Raises:
        ProjectionError: see :func:`~ss1_compile.projection.project.project`; the expert is named.
    """
    if weight.dim() == 2:
        return project(weight, structure, bias, **options)
    if isinstance(structure, LearnedStructure):
        return _project_together(weight, structure, **options)
    name = options.pop("name", "weight")
    made = [
        project(matrix, structure, name=f"{name}[{expert}]", **options)
        for expert, matrix in enumerate(weight.unbind())
    ]
    error = math.sqrt(sum(projection.error**2 for projection in made) / len(made))
    return replace(made[0], z=torch.stack([projection.z for projection in made]), error=error)


def _project_together(weight: Tensor, structure: LearnedStructure, **options: Any) -> Projection:
    """Column block by column block, the rows of all experts as one weight."""
    experts, out_features, in_features = weight.shape
    z = weight.new_empty(experts, out_features, structure.reduced_features)
    made: list[Projection] = []
    width = block_n(out_features, structure.num_hashes)
    for rows, stored in zip(weight.split(width, dim=1), z.split(width, dim=1), strict=True):
        together = rows.reshape(-1, in_features)
        sizes = replace(structure, out_features=len(together), num_hashes=1)
        made.append(project(together, sizes, **options))
        stored.copy_(made[-1].z.view_as(stored))
    error = math.sqrt(sum(projection.error**2 for projection in made) / len(made))
    sketch = torch.cat([projection.sketch for projection in made])
    return replace(made[0], z=z, error=error, sketch=sketch)


class ExpertLinear(nn.Module):
    """The dense weights of one projection of all experts.

    Attributes:
        weight: parameter ``[E, N, K]``, or ``[E, K, N]`` if ``is_transposed``.
        is_transposed: see ``weight``.
    """

    bias = None

    def __init__(self, weight: nn.Parameter, is_transposed: bool) -> None:
        super().__init__()
        self.weight = weight
        self.is_transposed = is_transposed

    @property
    def matrices(self) -> Tensor:
        """``[E, N, K]``."""
        return self.weight.mT if self.is_transposed else self.weight

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """``y [S, N]`` of ``x [S, K]``; see ``ss1::grouped_linear``."""
        y = x.new_zeros(x.shape[0], self.matrices.shape[1])
        start = 0
        for matrix, end in zip(self.matrices, offsets.tolist(), strict=True):
            if end > start:
                y[start:end] = F.linear(x[start:end], matrix)
            start = end
        return y


class SS1ExpertLinear(nn.Module):
    """One projection of all experts with ``W[e]`` stored as ``z[e]`` (SS1, NeurIPS 2024).

    Attributes:
        z: parameter ``[E, N, K_c]``.
        sketch: buffer that the experts share: int32 ``[J, G, c]``, or learned blocks
            ``[J, G, gsize, r]`` in z's dtype, which are not trained.
    """

    bias = None
    z: nn.Parameter
    sketch: Tensor

    def __init__(self, structure: Structure, z: nn.Parameter, sketch: Tensor | None = None) -> None:
        """Wrap z without copying it.

        Raises:
            StructureError: z or the sketch does not have the structure's shape.
        """
        super().__init__()
        structure.check_sketch(sketch)
        shape = (structure.out_features, structure.reduced_features)
        if z.dim() != 3 or tuple(z.shape[1:]) != shape:
            raise StructureError(f"z must be [E, {shape[0]}, {shape[1]}], got {list(z.shape)}")
        self.in_features, self.out_features = structure.in_features, structure.out_features
        self.z = z
        self.block_k: int | None = None
        if isinstance(structure, SS1Structure):
            self.block_k = structure.block_k
            sketch = structure.code.to(z.device, copy=True)
        self.register_buffer("sketch", sketch)

    @property
    def structure(self) -> Structure:
        """The structure, rebuilt from the buffers and validated."""
        return structure_of(self.in_features, self.out_features, self.block_k, self.sketch)

    @property
    def weight(self) -> Tensor:
        """The dense ``[E, N, K]``, materialised on every access."""
        structure = self.structure
        return torch.stack([structure.materialize(z, self.sketch) for z in self.z])

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """``y [S, N]`` of ``x [S, K]``; see ``ss1::grouped_linear``."""
        y: Tensor = torch.ops.ss1.grouped_linear(x, self.sketch, self.z, offsets)
        return y

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        rotation = self.block_k is not None  # not `structure`, which needs values
        reduction = self.sketch.shape[2] if rotation else self.structure.reduction
        return (
            f"experts={self.z.shape[0]}, in_features={self.in_features}, "
            f"out_features={self.out_features}, reduction={reduction:.4g}, "
            f"block_k={self.block_k}"
        )


_FLAGS = ("has_bias", "is_transposed")
_LATER_FLAGS = {"has_gate": True, "is_concatenated": True, "has_post_expert_norm": False}
"""Those that Transformers 5.0 has not yet, with what holds for all experts of such a release."""


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` follows Transformers' interface of interchangeable expert forwards.

    ``transformers.integrations.moe.use_experts_implementation`` marks such classes with what their
    forward needs to know. The experts of an expert-parallel model are distributed and left alone.
    """
    held = vars(module)
    if not all(flag in held for flag in _FLAGS) or held.get("_is_expert_parallel"):
        return False
    names = _weight_names(module)
    weights = [module._parameters.get(name) for name in names]
    return hasattr(type(module), "_apply_gate") and all(
        weight is not None and weight.dim() == 3 for weight in weights
    )


def _weight_names(module: nn.Module) -> tuple[str, str]:
    gated = getattr(module, "has_gate", _LATER_FLAGS["has_gate"])
    return ("gate_up_proj" if gated else "up_proj"), "down_proj"


class SS1Experts(nn.Module):
    """Takes the place of the experts module of a Transformers model.

    Computes what ``transformers.integrations.moe.grouped_mm_experts_forward`` does, which is what
    the module's own forward does. The state dict has ``gate_up_proj.z`` (``up_proj.z`` without a
    gate), ``down_proj.z`` and a ``.sketch`` of each (``.weight`` where one is dense); other
    parameters, such as biases ``[E, N]``, keep their names.
    """

    act_fn: Any
    post_expert_norm: Any

    def __init__(self, experts: nn.Module) -> None:
        """Take over the parameters of ``experts``; dense, and sharing their memory."""
        super().__init__()
        # has _apply_gate, which reads attributes of the module
        self.experts_class: Any = type(experts)
        for name, value in {**_LATER_FLAGS, **vars(experts)}.items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.up_name, self.down_name = _weight_names(experts)
        for name, parameter in experts._parameters.items():
            if name in (self.up_name, self.down_name):
                assert parameter is not None
                self.add_module(name, ExpertLinear(parameter, bool(experts.is_transposed)))
            else:
                self.register_parameter(name, parameter)
        for name, module in experts._modules.items():
            self.add_module(name, module)
        for name, buffer in experts._buffers.items():
            self.register_buffer(name, buffer, name not in experts._non_persistent_buffers_set)
        self.count = int(experts._parameters[self.down_name].shape[0])  # type: ignore[union-attr]
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the outputs of every token's experts.

        Args:
            hidden_states: ``[T, K]``.
            top_k_index: integers ``[T, top_k]``; a token's ``E`` stands for no expert.
            top_k_weights: ``[T, top_k]``.

        Returns:
            ``[T, K]``, in the dtype of ``hidden_states``.
        """
        tokens, top_k = top_k_index.shape
        expert, order = torch.sort(top_k_index.reshape(-1))
        known = torch.arange(self.count, device=expert.device, dtype=expert.dtype)
        offsets = torch.searchsorted(expert, known, right=True, out_int32=True)
        absent = (expert >= self.count).unsqueeze(-1)
        expert = expert.clamp(max=self.count - 1)
        y = self._project(self.up_name, hidden_states[order // top_k], expert, offsets)
        y = self.experts_class._apply_gate(self, y) if self.has_gate else self.act_fn(y)
        y = self._project(self.down_name, y, expert, offsets)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        y = (y * top_k_weights.reshape(-1)[order].unsqueeze(-1)).masked_fill(absent, 0.0)
        y = torch.empty_like(y).index_copy(0, order, y)
        return y.view(tokens, top_k, y.shape[-1]).sum(dim=1).to(hidden_states.dtype)

    def _project(self, name: str, x: Tensor, expert: Tensor, offsets: Tensor) -> Tensor:
        y: Tensor = getattr(self, name)(x, offsets)
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y
