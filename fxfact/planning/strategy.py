"""The contract of a rank strategy: it takes all candidate layers and returns a factorization and a rank for each."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Generic, Protocol, TypeVar, final

from fxfact.conv import ConvLayer, ConvSpec, Cost, Sizes, Skip, chain_cost
from fxfact.errors import ArgumentError, error_context
from fxfact.factorizations import Factorization, Rank, check_weight
from fxfact.utils import tensor_digest

T = TypeVar("T")
_Nats = TypeVar("_Nats", float, float | None)
Layout = Callable[[ConvSpec], tuple[ConvSpec, ...]]  # returns the stages that replace a convolution


@dataclass(frozen=True, eq=False)
class Candidate:
    """A convolution to choose for, together with the convolutions that share its weight.

    Attributes:
        path: the path of the convolution in the model.
        layer: the convolution and its weight, for strategies that look at the values.
        calls: one entry for each convolution that shares the weight, this one first: its spec, and the spatial size of
            its input at every call, or None if sizes are unknown.
        joint_set: the path of the first layer of the joint set that this one belongs to, or None.
    """

    path: str
    layer: ConvLayer
    calls: tuple[tuple[ConvSpec, tuple[Sizes, ...] | None], ...]
    joint_set: str | None = None

    @property
    def spec(self) -> ConvSpec:
        """The convolution without its weight."""
        return self.layer.spec

    def checked_layer(self) -> ConvLayer:
        """Return the layer. Raises WeightError if its weight has no values, or some are not finite."""
        check_weight(self.layer.weight)
        return self.layer

    def weight_digest(self) -> str:
        """Return a short hash of the weight's data type and values."""
        return tensor_digest([self.layer.weight])

    @cached_property
    def dense_cost(self) -> Cost:
        """The cost of all these convolutions without factorization."""
        return self._total_cost([(spec,) for spec, _ in self.calls])

    def cost(self, factorization: Factorization, rank: Rank) -> Cost:
        """Return the cost of the chains that would replace all these convolutions."""
        return self.costs(factorization, [rank])[0]

    def costs(self, factorization: Factorization, ranks: Sequence[Rank]) -> list[Cost]:
        """Return ``cost`` for several ranks, which is faster than a call for each."""
        layouts = [factorization.layouts(spec, ranks) for spec, _ in self.calls]
        return [self._total_cost(chains) for chains in zip(*layouts, strict=True)]

    def _total_cost(self, chains: Sequence[Sequence[ConvSpec]]) -> Cost:
        costs = [
            chain_cost(stages, sizes, tied=k > 0)
            for k, (stages, (_, sizes)) in enumerate(zip(chains, self.calls, strict=True))
        ]
        return sum(costs[1:], costs[0])


@dataclass(frozen=True)
class Choice:
    """What becomes of one layer.

    Attributes:
        factorization: the factorization to apply.
        rank: its rank.
        note: how the choice differs from the request, if it does.
        predicted_loss_increase: the expected increase of the loss in nats for one sample, if known.
        latencies_ms: milliseconds of the layer and of its chain in one call of the network, if measured.
        shares_with: the path of the first layer of a joint set whose chains share stages, this one among them.
    """

    factorization: Factorization
    rank: Rank
    note: str = ""
    predicted_loss_increase: float | None = None
    latencies_ms: tuple[float, float] | None = None
    shares_with: str | None = None


@dataclass(frozen=True)
class Alternative:
    """What could have become of a layer.

    Attributes:
        factorization: the factorization.
        rank: its rank.
        cost: the cost of the layer then.
        predicted_loss_increase: the expected increase of the loss in nats for one sample. Without data, -log of the
            share of the output's energy that the chain keeps.
    """

    factorization: Factorization
    rank: Rank
    cost: Cost
    predicted_loss_increase: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "predicted_loss_increase", significant(self.predicted_loss_increase))


def significant(nats: _Nats) -> _Nats:
    """Return an increase of the loss with six significant digits: more than it has, and files of plans are read."""
    return nats if nats is None else float(f"{nats:.6g}")


@dataclass(frozen=True)
class ParetoPoint:
    """A network on the Pareto front: its cost, and the expected increase of its loss in nats for one sample.

    Without data, the increase is -log of the share of the output's energy that the chains keep.
    """

    cost: Cost
    predicted_loss_increase: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "predicted_loss_increase", significant(self.predicted_loss_increase))


@dataclass(frozen=True)
class Allocation:
    """The answer of a strategy.

    Attributes:
        choices: one entry for each candidate, in order: a Choice, or a Skip with the reason to leave the layer dense.
        pareto_points: the best networks at other budgets, cheapest first. Empty if the strategy knows none.
        alternatives: for each candidate, in order, the choice and what else could become of it. Empty if the strategy
            compares nothing.
    """

    choices: tuple[Choice | Skip, ...]
    pareto_points: tuple[ParetoPoint, ...] = ()
    alternatives: tuple[tuple[Alternative, ...], ...] = ()


@final
@dataclass(frozen=True)
class ByPath(Generic[T]):
    """One value for every path, or values by path or glob. The exact path wins, then the first glob that fits."""

    everywhere: T | None
    by_pattern: Mapping[str, T]

    @classmethod
    def parse(cls, request: object, parse: Callable[[object], T]) -> ByPath[T]:
        """Parse a value, or a mapping from path or glob to values, with ``parse`` for each value."""
        if not isinstance(request, Mapping):
            return cls(parse(request), {})
        parsed = {}
        for pattern, value in request.items():
            with error_context(str(pattern)):
                parsed[str(pattern)] = parse(value)
        return cls(None, parsed)

    def get(self, path: str) -> tuple[T | None, bool]:
        """Return the value for a path, or None if there is none, and whether the exact path was given."""
        if path in self.by_pattern:
            return self.by_pattern[path], True
        matching = (value for pattern, value in self.by_pattern.items() if fnmatchcase(path, pattern))
        return next(matching, self.everywhere), False

    def check(self, paths: Sequence[str], argument: str) -> None:
        """Raise ArgumentError for a pattern that fits no path."""
        for pattern in self.by_pattern:
            if not any(path == pattern or fnmatchcase(path, pattern) for path in paths):
                near = difflib.get_close_matches(pattern, paths, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ArgumentError(
                    f"{argument}: nothing to factorize at {pattern!r}.{hint} There are: {_format_paths(paths)}."
                )


class LatencyModel(Protocol):
    """How long convolutions, and the chains that could replace them, take in one network."""

    @property
    def network_ms(self) -> float:
        """Milliseconds of one call of the whole dense network."""

    def latencies_ms(self, path: str, layouts: Sequence[Layout]) -> list[float]:
        """Return the milliseconds of each layout of the convolution at ``path``.

        They are summed over all calls of this convolution and of those that share its weight. The first layout must be
        the convolution itself.
        """


class RankStrategy(ABC):
    """Chooses for all layers of a network together."""

    @abstractmethod
    def choose(self, candidates: Sequence[Candidate], network: Cost) -> Allocation:
        """Return one choice for each candidate, in order. ``network`` is the cost of the whole dense network."""

    @property
    def uses_statistics(self) -> bool:
        """Whether the ranks assume that chains are fitted in the Fisher metric of calibration statistics."""
        return False


def _format_paths(paths: Sequence[str]) -> str:
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "") if paths else "none at all"
