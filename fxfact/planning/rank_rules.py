"""The classic rank rules: each chooses the rank of a layer from its kernel alone."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxfact.conv import Skip
from fxfact.errors import RankError
from fxfact.factorizations import Factorization, Rank
from fxfact.planning.error_curves import relative_square_error
from fxfact.planning.strategy import Candidate

__all__ = ["VBMF", "Energy", "LargestThatPays", "RankRule"]

_ROUNDING = 1e-10  # tolerance, as a share of the energy


class RankRule(ABC):
    """Chooses the rank of one convolution. Pass it as ``rank``; subclass it for a rule of your own."""

    @abstractmethod
    def rank_for(self, factorization: Factorization, candidate: Candidate) -> Rank | Skip:
        """Return the rank, or the reason why there is none.

        Args:
            factorization: one that does not reject the convolution.
            candidate: the convolution.

        Returns:
            A feasible rank, or a Skip. What ``rank=`` of ``fxfact.plan`` takes is accepted too. The convolution stays
            dense if the rule returns None or a rank with a 0.
        """


@final
@dataclass(frozen=True)
class Energy(RankRule):
    """The smallest rank that keeps a share of the kernel's energy: ‖W − Ŵ‖² ≤ (1 − share) ‖W‖².

    Args:
        share: above 0 and at most 1.

    Raises:
        RankError: if the share is out of range.
    """

    share: float

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, Real) or not 0 < self.share <= 1:
            raise RankError(f"Energy({self.share!r}): the share of the energy to keep must be above 0 and at most 1")

    def rank_for(self, factorization: Factorization, candidate: Candidate) -> Rank | Skip:
        """Find the rank by bisection.

        Args:
            factorization: one that does not reject the convolution.
            candidate: the convolution.

        Returns:
            A feasible rank, or a Skip with the reason.

        Raises:
            WeightError: if the weight has no values, or some are not finite.
        """
        ranks, layer = factorization.ranks(candidate.spec), candidate.checked_layer()
        place = bisect.bisect_left(
            ranks,
            self.share - 1 - _ROUNDING,
            key=lambda rank: -relative_square_error(layer, factorization, rank),
        )
        return ranks[place] if place < len(ranks) else Skip(f"no rank keeps {self.share} of the energy")


@final
@dataclass(frozen=True)
class LargestThatPays(RankRule):
    """The largest rank that costs less than the convolution, in parameters and, if sizes are known, in MACs."""

    def rank_for(self, factorization: Factorization, candidate: Candidate) -> Rank | Skip:
        """Find the rank by bisection.

        Args:
            factorization: one that does not reject the convolution.
            candidate: the convolution.

        Returns:
            A feasible rank, or a Skip with the reason.

        Raises:
            WeightError: if the weight has no values, or some are not finite.
        """
        dense, ranks = candidate.dense_cost, factorization.ranks(candidate.spec)
        place = bisect.bisect_left(
            ranks,
            True,
            key=lambda rank: (cost := candidate.cost(factorization, rank)).exceeds(dense) or cost == dense,
        )
        return ranks[place - 1] if place else Skip("no rank costs less than the convolution")


@final
@dataclass(frozen=True)
class VBMF(RankRule):
    """The rank found by empirical variational Bayesian matrix factorization (VBMF) of the kernel's unfoldings.

    Uses the global analytic solution of Nakajima, Sugiyama, Babacan and Tomioka 2013. For Tucker, the unfoldings are
    those of both channel modes (Kim et al. 2016). For grouped convolutions, the largest rank of all groups counts.
    """

    def rank_for(self, factorization: Factorization, candidate: Candidate) -> Rank | Skip:
        """Run VBMF on each unfolding.

        Args:
            factorization: one that does not reject the convolution.
            candidate: the convolution.

        Returns:
            A feasible rank, or a Skip if VBMF takes an unfolding for noise alone (rank 0), or if the factorization's
            rank is not that of a matrix.

        Raises:
            WeightError: if the weight has no values, or some are not finite.
        """
        groups = factorization.unfoldings(candidate.checked_layer())
        found = [tuple(vbmf_rank(matrix) for matrix in group) for group in groups]
        if not found[0]:
            return Skip(f"VBMF finds ranks of matrices, and {factorization.name} has no such rank")
        rank = tuple(max(entries) for entries in zip(*found, strict=True))
        if not all(rank):
            return Skip(f"VBMF takes the kernel for noise alone: {factorization.name} rank {','.join(map(str, rank))}")
        return factorization.clip(candidate.spec, rank)


def vbmf_rank(matrix: Tensor) -> int:
    """Return the number of components that the analytic solution of empirical VBMF keeps of a matrix.

    For a matrix with sides L ≤ M, let α = L/M and τ = 2.5129 √α. A component is kept if its squared singular value
    exceeds M σ² (1 + τ)(1 + α/τ), where the noise variance σ² minimises the free energy (Nakajima et al. 2013).
    """
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    rows, columns = matrix.shape
    squares = torch.linalg.svdvals(matrix.double()).square().cpu().numpy()
    if not squares[0] > 0:
        return 0
    alpha = rows / columns
    tau = 2.5129 * math.sqrt(alpha)
    threshold = (1 + tau) * (1 + alpha / tau)
    most = min(math.ceil(rows / (1 + alpha)) - 1, rows)
    rest = squares[most:].mean() if most < rows else 0.0
    lower = max(float(squares[most] if most < rows else 0.0) / (columns * threshold), float(rest) / columns, 1e-300)
    upper = max(float(squares.sum()) / (rows * columns), lower * (1 + 1e-9))
    candidates = np.geomspace(lower, upper, 2000)
    energies = [_free_energy(squares / (columns * variance), alpha, threshold) for variance in candidates]
    variance = candidates[int(np.argmin(energies))]
    return int((squares > columns * variance * threshold).sum())


def _free_energy(x: NDArray[np.float64], alpha: float, threshold: float) -> float:
    """Return the part of the free energy that depends on the singular values, for x = squares / (M σ²)."""
    kept, dropped = x[x > threshold], x[x <= threshold]
    z = kept - (1 + alpha)
    tau = 0.5 * (z + np.sqrt(np.maximum(z**2 - 4 * alpha, 0)))
    above = kept - tau + np.log((tau + 1) / kept) + alpha * np.log(tau / alpha + 1)
    return float((dropped - np.log(np.maximum(dropped, 1e-300))).sum() + above.sum())
