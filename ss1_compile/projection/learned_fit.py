"""Fit learned blocks S and z to a weight: ``min E‖(W - z Sᵀ) x‖²`` over both.

With z eliminated (``z = W H S (Sᵀ H S)⁻¹``, H the second moment of x) what is left to maximise is

    tr((Sᵀ H S)⁻¹ Sᵀ P S),    P = H Wᵀ W H.

Group by group this has a closed solution, the others held: regress both ``x_g`` and ``y = W x`` on
the other groups' slots; the best block then spans the leading generalised eigenvectors of
``(P̃_gg, H̃_gg)``, the two matrices of what the regression leaves. One such sweep gains more than
five that alternate least squares for S and for z. Only H and P are needed, not the rows of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ss1_compile.errors import ProjectionError
from ss1_compile.learned import LearnedStructure

SWEEPS = 6
_ENOUGH = 1e-4
"""A sweep that lowers the squared error by less than this part of it is the last."""
_ROUNDING = 1e-12
"""The part of E‖y‖² that counts as nothing lost: the weight has the structure already."""


class LearnedFit:
    """The blocks of one column block, from the rows of W given piece by piece; all float64.

    Memory: H and P ``[K, K]``, two ``[K, K_c]`` and three ``[K_c, K_c]``. Work per sweep:
    ``O(K K_c² + K² K_c)``.

    Args:
        structure: the sizes; K, ``gsize`` and r are used.
        moment: H, float64 ``[K, K]``, or ``None`` for the identity.
        damping: ridge relative to the mean of ``diag(H)``.
        name: of the layer, for messages.
    """

    def __init__(
        self, structure: LearnedStructure, moment: Tensor | None, damping: float, name: str
    ) -> None:
        self._structure, self._name, self._damping = structure, name, damping
        self._in, self._padded = structure.in_features, structure.padded_features
        self._size, self._rank = structure.group_size, structure.rank
        self._moment = None if moment is None else self._damp(moment)
        self._gram: Tensor | None = None  # P
        self._own: Tensor | None = None  # the diagonal blocks of WᵀW, [G, gsize, gsize]
        self._energy = 0.0
        self.error = 0.0
        """``E‖(W - z Sᵀ) x‖²`` for the damped H at the end of :meth:`fit`."""
        self.blocks: Tensor
        self._solver: Tensor

    def _damp(self, moment: Tensor) -> Tensor | None:
        """Padded H with its ridge; ``None`` for inputs that never vary."""
        scale = moment.diagonal().mean().item()
        if scale <= 0:
            return None
        padded = moment.new_zeros(self._padded, self._padded)
        padded[: self._in, : self._in] = moment
        padded.diagonal()[: self._in] += self._damping * scale
        # padding is an independent input of common size, which no weight reads
        padded.diagonal()[self._in :] = scale
        return padded

    def _weigh(self, rows: Tensor) -> Tensor:
        """``W H`` for padded rows."""
        return rows if self._moment is None else rows @ self._moment

    def _pad(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, self._padded - self._in))

    def add(self, rows: Tensor) -> None:
        """Count rows ``[M, K]`` of W."""
        rows = self._pad(rows)
        weighed = self._weigh(rows)
        blocks = rows.unflatten(1, (-1, self._size)).permute(1, 2, 0)  # [G, gsize, M]
        if self._gram is None or self._own is None:
            self._gram = weighed.t() @ weighed
            self._own = blocks @ blocks.transpose(1, 2)
        else:
            self._gram.addmm_(weighed.t(), weighed)
            self._own += blocks @ blocks.transpose(1, 2)
        self._energy += (rows * weighed).sum().item()

    def fit(self, dtype: torch.dtype, sweeps: int = SWEEPS) -> Tensor:
        """The blocks ``S [G, gsize, r]`` in ``dtype``, as they will be stored.

        Args:
            dtype: of the result.
            sweeps: at most; fewer where they gain little.

        Raises:
            ProjectionError: the input statistics are singular after damping.
        """
        state = _Sweeps(self)
        error = state.error()
        for _ in range(sweeps):
            if error <= _ROUNDING * self._energy:
                break
            before = error
            state.run()
            error = state.error()
            if before - error <= _ENOUGH * before:
                break
        self.error = error
        # Orthonormal columns: any basis of their span will do, and this one keeps X̃ and z in the
        # range of x and W. z is then solved for the blocks as they were rounded.
        stored: Tensor = torch.linalg.qr(state.blocks)[0].to(dtype)
        self.use(stored)
        return stored

    def use(self, blocks: Tensor) -> None:
        """Take the blocks ``[G, gsize, r]`` as they are.

        Raises:
            ProjectionError: the input statistics are singular after damping.
        """
        self.blocks = blocks.double()
        gram = _sketch(_from_left(self._moment, self.blocks).t(), self.blocks)
        self._solver = self._factor(gram)

    def solve(self, rows: Tensor) -> Tensor:
        """``z = W H S (Sᵀ H S)⁻¹ [M, K_c]`` for rows ``[M, K]`` of W."""
        sketched = _sketch(self._weigh(self._pad(rows)), self.blocks)
        z: Tensor = torch.cholesky_solve(sketched.t(), self._solver).t()
        return z

    def materialize(self, z: Tensor) -> Tensor:
        """``z Sᵀ [M, K]``."""
        groups = z.unflatten(1, (len(self.blocks), -1)).transpose(0, 1)
        wide = torch.bmm(groups, self.blocks.transpose(1, 2)).transpose(0, 1).flatten(1)
        w: Tensor = wide[:, : self._in]
        return w

    def _factor(self, matrix: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed) != 0 or not bool(torch.isfinite(factor).all()):
            raise ProjectionError(
                f"{self._name}: the input statistics are singular with damping = {self._damping}; "
                f"raise damping (1e-3 is usual) or calibrate on more data"
            )
        solved: Tensor = factor
        return solved


class _Sweeps:
    """The state of block-coordinate ascent. ``V = (Sᵀ H S)⁻¹`` is kept up by low-rank updates."""

    def __init__(self, fit: LearnedFit) -> None:
        assert fit._gram is not None
        assert fit._own is not None
        self.fit = fit
        self.moment, self.gram = fit._moment, fit._gram
        self.size, self.rank = fit._size, fit._rank
        groups = fit._padded // fit._size
        # The leading directions of H^½ (WᵀW) H^½ within each group
        self.blocks = torch.stack(
            [
                self._leading(h @ fit._own[g] @ h, h)
                for g in range(groups)
                for h in (self._moment_block(g),)
            ]
        )
        self.ps = _from_left(self.gram, self.blocks)
        self.sps = _sketch(self.ps.t(), self.blocks)
        self._refresh()

    def _moment_block(self, g: int) -> Tensor:
        features = self._features(g)
        if self.moment is None:
            return torch.eye(self.size, dtype=self.gram.dtype, device=self.gram.device)
        return self.moment[features, features]

    def _features(self, g: int) -> slice:
        return slice(g * self.size, (g + 1) * self.size)

    def _leading(self, p: Tensor, h: Tensor) -> Tensor:
        """The r leading generalised eigenvectors of (P, H), with ``Vᵀ H V = I``."""
        factor = self.fit._factor((h + h.t()) / 2)
        inner = torch.linalg.solve_triangular(factor, p, upper=False)
        inner = torch.linalg.solve_triangular(factor, inner.t(), upper=False)
        _, vectors = torch.linalg.eigh((inner + inner.t()) / 2)
        leading = vectors[:, -self.rank :]
        block: Tensor = torch.linalg.solve_triangular(factor.t(), leading, upper=True)
        return block

    def _refresh(self) -> None:
        """V and H S anew, free of accumulated rounding."""
        self.hs = _from_left(self.moment, self.blocks)
        factor = self.fit._factor(_sketch(self.hs.t(), self.blocks))
        self.inverse = torch.cholesky_inverse(factor)

    def error(self) -> float:
        """``E‖(W - z Sᵀ) x‖²`` at the best z."""
        return max(0.0, self.fit._energy - (self.inverse * self.sps).sum().item())

    def run(self) -> None:
        """Improve every block once."""
        for g in range(len(self.blocks)):
            self._improve(g)
        self._refresh()

    def _improve(self, g: int) -> None:
        features, slots = self._features(g), slice(g * self.rank, (g + 1) * self.rank)
        v = self.inverse
        # (Sᵀ H S)⁻¹ of the other groups, with zeros for this one
        others = v - v[:, slots] @ torch.linalg.solve(v[slots, slots], v[slots])
        hs, ps = self.hs[features], self.ps[features]
        regression = hs @ others  # of x_g on the others' slots, [gsize, K_c]
        h = self._moment_block(g) - regression @ hs.t()
        cross = regression @ ps.t()
        p = self.gram[features, features] - cross - cross.t()
        p = p + regression @ self.sps @ regression.t()
        block = self._leading(p, h)
        self.blocks[g] = block
        if self.moment is None:
            self.hs[:, slots] = 0
            self.hs[features, slots] = block
        else:
            self.hs[:, slots] = self.moment[:, features] @ block
        self.ps[:, slots] = self.gram[:, features] @ block
        inner = block.t() @ self.ps[features]
        self.sps[slots] = inner
        self.sps[:, slots] = inner.t().clone()
        # blockᵀ h block = I, so the bordered inverse is a plain sum
        border = -(regression.t() @ block)
        border[slots] = torch.eye(self.rank, dtype=border.dtype, device=border.device)
        self.inverse = others + border @ border.t()


def _from_left(matrix: Tensor | None, blocks: Tensor) -> Tensor:
    """``A S [M, K_c]`` for ``A [M, K]`` (``None``: the identity) and blocks ``[G, gsize, r]``."""
    return torch.block_diag(*blocks) if matrix is None else _sketch(matrix, blocks)


def _sketch(rows: Tensor, blocks: Tensor) -> Tensor:
    """``A S [M, K_c]`` for ``A [M, G·gsize]``."""
    groups = rows.unflatten(1, (blocks.shape[0], -1)).transpose(0, 1)
    return torch.bmm(groups, blocks).transpose(0, 1).flatten(1)
