"""The contract of a rank strategy: all convolutions in, for each a factorization and a rank, or why none, out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fxfact.conv import ConvLayer, ConvSpec, Sizes
from fxfact.cost import Cost, cost_of
from fxfact.factorizations import Factorization, Rank, check_weight
from fxfact.skip import Skip


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
            cost_of(stages, sizes, tied=k > 0)
            for k, (stages, (_, sizes)) in enumerate(zip(chains, self.calls, strict=True))
        ]
        return sum(costs[1:], costs[0])


@dataclass(frozen=True)
class Choice:
    """What a convolution becomes; ``note`` says what of the request could not be met, ``increase`` by how much the loss
    is expected to grow, in nats, ``milliseconds`` how long it takes and its chain will, where the strategy knows.
    """

    factorization: Factorization
    rank: Rank
    note: str = ""
    increase: float | None = None
    milliseconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class FrontPoint:
    """A network that could be had: its cost, and by how much its loss is expected to grow, in nats."""

    cost: Cost
    increase: float


@dataclass(frozen=True)
class Allocation:
    """What a strategy says: one of the ``choices`` for each candidate, and the ``front`` of the best networks at other
    budgets, cheapest first, where it knows them.
    """

    choices: tuple[Choice | Skip, ...]
    front: tuple[FrontPoint, ...] = ()


class RankStrategy(ABC):
    """Chooses for all convolutions of a network together."""

    @abstractmethod
    def choose(self, candidates: Sequence[Candidate], network: Cost) -> Allocation:
        """One answer for each candidate, in order; ``network`` is the cost of the whole dense network."""

    @property
    def in_metric(self) -> bool:
        """Whether the ranks were chosen for chains decomposed in the metric of statistics."""
        return False
