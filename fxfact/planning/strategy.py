"""The contract of a rank strategy: all convolutions in, for each a factorization and a rank, or why none, out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from fxfact.conv import ConvLayer, ConvSpec, Cost, Sizes, Skip, chain_cost
from fxfact.factorizations import Factorization, Rank, check_weight


@dataclass(frozen=True, eq=False)
class Candidate:
    """A convolution to choose for, with those that share its weight. ``calls`` has of each, itself first, what it
    computes and the spatial size at every call, None where unknown. ``layer`` holds the numbers, for strategies that
    look at them.
    """

    path: str
    layer: ConvLayer
    calls: tuple[tuple[ConvSpec, tuple[Sizes, ...] | None], ...]

    @property
    def spec(self) -> ConvSpec:
        """The convolution without its numbers."""
        return self.layer.spec

    @property
    def checked(self) -> ConvLayer:
        """The layer, for its numbers. Raises WeightError where there are none, or not all are finite."""
        check_weight(self.layer.weight)
        return self.layer

    @cached_property
    def digest(self) -> str:
        """Tells its numbers from others."""
        numbers = self.layer.weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(numbers.data).hexdigest()[:16]

    @cached_property
    def dense(self) -> Cost:
        """What all of them cost as they are."""
        return self._cost([(spec,) for spec, _ in self.calls])

    def cost(self, factorization: Factorization, rank: Rank) -> Cost:
        """What their chains would."""
        return self._cost([factorization.layout(spec, rank) for spec, _ in self.calls])

    def _cost(self, chains: Sequence[Sequence[ConvSpec]]) -> Cost:
        costs = [
            chain_cost(stages, sizes, tied=k > 0)
            for k, (stages, (_, sizes)) in enumerate(zip(chains, self.calls, strict=True))
        ]
        return sum(costs[1:], costs[0])


@dataclass(frozen=True)
class Choice:
    """What a convolution becomes; ``note`` says what of the request could not be met, ``predicted_loss_increase`` by how much the loss
    is expected to grow, in nats, ``milliseconds`` how long it takes and its chain will, where the strategy knows.
    """

    factorization: Factorization
    rank: Rank
    note: str = ""
    predicted_loss_increase: float | None = None
    milliseconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class ParetoPoint:
    """A network that could be had: its cost, and by how much its loss is expected to grow, in nats."""

    cost: Cost
    predicted_loss_increase: float


@dataclass(frozen=True)
class Allocation:
    """What a strategy says: one of the ``choices`` for each candidate, and the ``front`` of the best networks at other
    budgets, cheapest first, where it knows them.
    """

    choices: tuple[Choice | Skip, ...]
    pareto_points: tuple[ParetoPoint, ...] = ()


Layout = Callable[[ConvSpec], tuple[ConvSpec, ...]]  # the stages that take the place of a convolution


class LatencyModel(Protocol):
    """How long convolutions and the chains that could replace them take, in milliseconds."""

    @property
    def network(self) -> float:
        """Milliseconds of one call of the whole dense network."""

    def times(self, path: str, layouts: Sequence[Layout]) -> list[float]:
        """Milliseconds of each layout, over all calls of the convolution at ``path`` and of those that share its
        weight. The first layout is the convolution itself.
        """


class RankStrategy(ABC):
    """Chooses for all convolutions of a network together."""

    @abstractmethod
    def choose(self, candidates: Sequence[Candidate], network: Cost) -> Allocation:
        """One answer for each candidate, in order; ``network`` is the cost of the whole dense network."""

    @property
    def uses_statistics(self) -> bool:
        """Whether the ranks were chosen for chains decomposed in the metric of statistics."""
        return False
