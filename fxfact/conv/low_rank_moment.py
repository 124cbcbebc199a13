"""The second moment of many channels, held by the rows that it is a sum of."""

from __future__ import annotations

import torch
from torch import Tensor

from fxfact.conv.fisher import MIN_EIGENVALUE, KroneckerMoment, shrinkage


class LowRankMoment(KroneckerMoment):
    """The moment Xᵀ X + λ I of one group. X has fewer rows than columns, so that it takes less memory than the moment.

    Args:
        rows: The matrix X ``(k, n)``.
        identity: The multiple λ of the identity.
    """

    rows: Tensor
    identity: float

    def __init__(self, rows: Tensor, identity: float = 0.0) -> None:
        vars(self).update(rows=rows, identity=identity)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The moment as one matrix ``(1, n, n)``, computed at every access."""
        return (self._with_identity_added(self.rows.T @ self.rows, self.identity)[None],)

    @property
    def size(self) -> int:
        """The number of rows of the moment."""
        return self.rows.shape[1]

    @property
    def groups(self) -> int:
        """The number of groups, which is 1."""
        return 1

    @property
    def diagonals(self) -> tuple[Tensor, ...]:
        """The diagonal of the moment ``(1, n)``."""
        return (self.rows.square().sum(dim=0)[None] + self.identity,)

    def of_group(self, group: int) -> LowRankMoment:
        """Return the moment of one group."""
        return self

    def like(self, tensor: Tensor) -> LowRankMoment:
        """Return the moment in the dtype and on the device of ``tensor``."""
        return LowRankMoment(self.rows.to(tensor), self.identity)

    def left_multiply(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (m, n) @ M."""
        return (rows @ self.rows.T @ self.rows).add_(rows, alpha=self.identity)

    def shrunk(self, samples: int, least: float = 0.0) -> LowRankMoment:
        """Return the moment shrunk towards a multiple of the identity, as a moment held as one matrix is."""
        gram, energy = (self.rows @ self.rows.T).double(), float(self.rows.double().square().sum())
        square = gram.square().sum() + 2 * self.identity * energy + self.size * self.identity**2
        trace = energy + self.size * self.identity
        share = max(least, float(shrinkage(square, torch.full_like(square, trace), self.size, samples)))
        identity = (1 - share) * self.identity + share * trace / self.size
        return LowRankMoment(self.rows * (1 - share) ** 0.5, identity)

    def damped(self, amount: float) -> LowRankMoment:
        """Return the moment with ``amount`` times the mean of the diagonal added to the diagonal."""
        mean = float(self.rows.double().square().sum()) / self.size + self.identity
        return LowRankMoment(self.rows, self.identity + amount * mean)

    def root_and_inverse(self) -> tuple[Tensor, Tensor]:
        """Return the symmetric square root (n, n) and its inverse, from the eigenvectors of X Xᵀ (k, k)."""
        squares, vectors = torch.linalg.eigh((self.rows @ self.rows.T).double())
        kept = squares > MIN_EIGENVALUE**2 * squares[-1]
        squares, vectors = squares[kept], vectors[:, kept]
        directions = self.rows.double().T @ (vectors / squares.sqrt())
        least = max(float(squares[-1:].sum()) + self.identity, torch.finfo(torch.float64).tiny) * MIN_EIGENVALUE
        others, values = max(self.identity, least), (squares + self.identity).clamp_min(least)
        found = []
        for power in (0.5, -0.5):
            matrix = (directions * (values**power - others**power)) @ directions.T
            found.append(self._with_identity_added(matrix, others**power).to(self.rows))
        return found[0], found[1]

    def _with_identity_added(self, matrix: Tensor, amount: float) -> Tensor:
        matrix.diagonal().add_(amount)
        return matrix
