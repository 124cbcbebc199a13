"""The classic rules: a rank from the numbers of one kernel alone, whatever the others are."""

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
from fxfact.planning.error_curves import relative_square
from fxfact.planning.strategy import Candidate

_ROUNDING = 1e-10  # of the energy


class RankRule(ABC):
    """A rank for one convolution; pass it as ``rank``."""

    @abstractmethod
    def rank_for(self, factorization: Factorization, candidate: Candidate) -> Rank | Skip:
        """The rank, or why there is none. The factorization does not reject the convolution."""


@final
@dataclass(frozen=True)
class Energy(RankRule):
    """The smallest rank whose composed kernel keeps that ``share`` of the energy: ‖W − Ŵ‖² ≤ (1 − share) ‖W‖²."""

    share: float

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, Real) or not 0 < self.share <= 1:
            raise RankError(f"Energy({self.share!r}): the share of the energy to keep is within 0 and 1")

    def rank_for(self, factorization: Factorization, candidate: Candidate) -> Rank | Skip:
        """By bisection over the proportional ranks."""
        ranks, layer = factorization.ranks(candidate.spec), candidate.checked
        place = bisect.bisect_left(
            ranks,
            self.share - 1 - _ROUNDING,
            key=lambda rank: -relative_square(layer, factorization, rank),
        )
        return ranks[place] if place < len(ranks) else Skip(f"no rank keeps {self.share} of the energy")


@final
@dataclass(frozen=True)
class LargestThatPays(RankRule):
    """The largest rank that costs less than the convolution, in parameters and, where known, in MACs."""

    def rank_for(self, factorization: Factorization, candidate: Candidate) -> Rank | Skip:
        """By bisection over the proportional ranks."""
        dense, ranks = candidate.dense, factorization.ranks(candidate.spec)
        place = bisect.bisect_left(
            ranks,
            True,
            key=lambda rank: (cost := candidate.cost(factorization, rank)).exceeds(dense) or cost == dense,
        )
        return ranks[place - 1] if place else Skip("no rank costs less than the convolution")


@final
@dataclass(frozen=True)
class VBMF(RankRule):
    """The rank that empirical variational Bayes finds in the unfoldings of the kernel, by its global analytic solution
    (Nakajima, Sugiyama, Babacan and Tomioka 2013); for Tucker these are both channel modes (Kim et al. 2016). Of
    grouped convolutions the largest of the groups' ranks.
    """

    def rank_for(self, factorization: Factorization, candidate: Candidate) -> Rank | Skip:
        """At least 1; a Skip where the rank is of no matrix."""
        found = [tuple(max(1, vbmf_rank(m)) for m in group) for group in factorization.unfoldings(candidate.checked)]
        if not found[0]:
            return Skip(f"VBMF finds ranks of matrices, which {factorization.name} has none of")
        return factorization.clip(candidate.spec, tuple(max(entries) for entries in zip(*found, strict=True)))


def vbmf_rank(matrix: Tensor) -> int:
    """The number of components that the analytic solution of empirical VBMF keeps of a matrix.

    With L ≤ M the sides, α = L/M, τ = 2.5129 √α the point at which the free energy's threshold lies, a component stays
    if its singular value squared exceeds M σ² (1 + τ)(1 + α/τ); the variance σ² of the noise minimises the free energy.
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
    """The part that depends on the singular values, for x = squares / (M σ²)."""
    kept, dropped = x[x > threshold], x[x <= threshold]
    z = kept - (1 + alpha)
    tau = 0.5 * (z + np.sqrt(np.maximum(z**2 - 4 * alpha, 0)))
    above = kept - tau + np.log((tau + 1) / kept) + alpha * np.log(tau / alpha + 1)
    return float((dropped - np.log(np.maximum(dropped, 1e-300))).sum() + above.sum())
