"""Float64 moments of the inputs of weights, collected in a stream and shared between equals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ss1_compile.calibration.input_statistics import InputStatistics as InputStatistics
from ss1_compile.errors import CalibrationError

CHUNK_ELEMENTS = 2**24  # float64 copies of at most 128 MiB

# StorageWeakRef compares by the storage's address and keeps that address from being reused
InputKey = tuple[StorageWeakRef, int, torch.dtype, tuple[int, ...], tuple[int, ...], int]


def input_key(x: Tensor) -> InputKey | None:
    """What makes ``x`` the same input as another: its memory and its version.

    ``None`` for inference tensors, which have no version, so that equality cannot be known.
    """
    if x.is_inference():
        return None
    storage = StorageWeakRef(x.untyped_storage())
    return (
        storage, int(x.storage_offset()), x.dtype, tuple(x.shape), tuple(x.stride()), x._version
    )  # fmt: skip


class Moments:
    """Row count, ``Σ x [K]`` and ``Σ x xᵀ [K, K]``, float64 on the device of the inputs."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.members: set[str] = set()
        self.count = 0
        self.total = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.waiting: list[_Input] = []

    def absorb(self, rows: Tensor, name: str, sign: int = 1) -> None:
        """Add (``sign=-1``: take away) the rows ``[M, K]``, any floating dtype.

        Raises:
            CalibrationError: a row is not finite; the message names the weight.
        """
        for chunk in rows.split(max(1, CHUNK_ELEMENTS // rows.shape[1])):
            x = chunk.double()
            total = x.sum(0)
            if not bool(torch.isfinite(total).all()):
                bad = chunk[~torch.isfinite(chunk)]
                raise CalibrationError(
                    f"the input of {name} holds {bad[0].item() if len(bad) else 'values too large'}"
                    f" during calibration; check the batch and the model in {chunk.dtype} "
                    f"(float16 overflows at 65504: bfloat16 or float32 does not)"
                )
            self.total.add_(total, alpha=sign)
            self.outer.addmm_(x.t(), x, alpha=sign)
            self.count += sign * x.shape[0]

    def finish(self) -> InputStatistics:
        """The means, in place: the sums are gone afterwards."""
        mean, second_moment = self.total.div_(self.count), self.outer.div_(self.count)
        return InputStatistics(self.count, mean, second_moment)

    def copy(self) -> Moments:
        """An independent copy without members."""
        other = Moments(0, self.total.device)
        other.count = self.count
        other.total, other.outer = self.total.clone(), self.outer.clone()
        return other


@dataclass
class _Input:
    """An input that a group has absorbed and that some members have not been given yet."""

    key: InputKey
    x: Tensor
    names: set[str]


class SharedMoments:
    """Moments per weight; weights that have read the very same inputs share one object.

    Weights join when their first input is the same tensor (q, k and v; gate and up). From then on
    the group absorbs an input when its first member reads it, and holds it until every member has.
    A member that reads something else, or nothing, leaves with a copy of the moments less the
    inputs it was not given, so the result is that of separate accumulation in every case.
    """

    def __init__(self) -> None:
        self._of: dict[str, Moments] = {}
        self._first: dict[InputKey, Moments] = {}
        self._mask: Tensor | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __getitem__(self, name: str) -> Moments:
        return self._of[name]

    def start(self, mask: Tensor | None) -> None:
        """Begin a forward; rows where the bool ``mask [B, T]`` is false are left out."""
        self._mask = mask
        self._first = {}

    def finish(self) -> None:
        """End a forward: members that were not given an input of their group leave it."""
        for name, moments in list(self._of.items()):
            if any(name in held.names for held in moments.waiting):
                self._leave(name)
        self._first = {}

    def add(self, name: str, x: Tensor) -> None:
        """Count the input ``x [..., K]`` of the weight ``name``.

        Raises:
            CalibrationError: x is not finite, or was changed in place in a way that sharing cannot
                follow.
        """
        key = input_key(x)
        moments = self._of.get(name)
        if moments is None:
            moments = self._first.get(key) if key is not None else None
            if moments is not None:
                moments.members.add(name)
                self._of[name] = moments
                return
            moments = self._of[name] = Moments(x.shape[-1], x.device)
            moments.members.add(name)
            if key is not None:
                self._first[key] = moments
        else:
            expected = next((held for held in moments.waiting if name in held.names), None)
            if expected is not None and expected.key == key:
                expected.names.discard(name)
                moments.waiting = [held for held in moments.waiting if held.names]
                return
            if expected is not None or (key is None and len(moments.members) > 1):
                moments = self._leave(name)
            for first in [k for k, m in self._first.items() if m is moments]:
                del self._first[first]
        moments.absorb(self._rows(x), name)
        others = moments.members - {name}
        if others and key is not None:
            moments.waiting.append(_Input(key, x, others))

    def _leave(self, name: str) -> Moments:
        group = self._of[name]
        alone = group.copy()
        for held in group.waiting:
            if name in held.names:
                if input_key(held.x) != held.key:
                    raise CalibrationError(
                        f"{name} shares its input with {sorted(group.members - {name})} in some "
                        f"batches but not in all, and the input was changed in place meanwhile; "
                        f"calibrate {name} in a run of its own (names=[{name!r}])"
                    )
                alone.absorb(self._rows(held.x), name, sign=-1)
                held.names.discard(name)
        group.waiting = [held for held in group.waiting if held.names]
        group.members.discard(name)
        alone.members.add(name)
        self._of[name] = alone
        return alone

    def _rows(self, x: Tensor) -> Tensor:
        return kept_rows(x, self._mask)


def kept_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """``[M, K]``: the rows of x that the bool ``mask [B, T]`` keeps."""
    x = x.detach()
    if mask is not None:
        if x.dim() > 2 and x.shape[:2] == mask.shape:
            x = x[mask.to(x.device)]
        elif x.dim() == 2 and x.shape[0] == mask.numel():
            x = x[mask.to(x.device).flatten()]
    return x.reshape(-1, x.shape[-1])
