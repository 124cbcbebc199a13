"""The ranks that a loss bears best under a budget: a knapsack over every factorization and rank of all convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, final

from fxfact.calibration import Statistics
from fxfact.conv import Cost, KroneckerFisher, Skip
from fxfact.errors import check_int, error_context
from fxfact.factorizations import Factorization, Rank
from fxfact.planning.budgets import Budget
from fxfact.planning.error_curves import ErrorCurves, cache_key, error_curve, interpolate
from fxfact.planning.hardware_ranks import chain_latencies, hardware_friendly, multiples
from fxfact.planning.knapsack import Class, Knapsack
from fxfact.planning.requested import ByPath
from fxfact.planning.strategy import Allocation, Candidate, Choice, LatencyModel, ParetoPoint, RankStrategy
from fxfact.utils import TICK, Progress, ordered_map, with_progress

_RANKS = 40  # of a factorization among which to choose
_FRONT = 40  # points
_NOTHING = Cost(0, 0, 0.0)
_FASTER, _SHORTEST = 0.97, 1000 * TICK  # of the time of the convolution; milliseconds
_DENSE = Skip("the budget lets it stay as it is")


class Option(NamedTuple):
    """What could become of a convolution, its cost, by how much the loss would grow, and how much that counts."""

    choice: Choice | Skip
    cost: Cost
    predicted_loss_increase: float
    counted: float


@final
@dataclass(frozen=True, eq=False)
class BudgetAllocator(RankStrategy):
    """Of all networks within ``budget`` the one whose loss is expected to grow least, by the errors of its kernels.

    With ``statistics`` errors are in nats, else squares of relative errors, all convolutions counted alike. Ranks are
    ``multiple`` or its multiples. Options that cost more than the convolution, in parameters or in MACs, are none; with
    a ``clock``, which a budget of milliseconds needs, nor are those that do not measure faster.

    Increases of the loss add up while they are small. ``normalization``, 0 … 1, is for those that are not: the increases of
    each convolution count divided by that power of what it would cost to lose its output altogether, so that none loses
    nearly all of it. Of 0, ½ and 1 it is nearly always ½ that measures best on other data, or near the best, and where
    little is left of a network it may be 1.

    ``executor``: on which errors are computed, with the same result.
    """

    budget: Budget
    factorizations: ByPath[tuple[Factorization, ...]]
    statistics: Statistics | None = None
    multiple: int = 1
    normalization: float = 0.5
    clock: LatencyModel | None = None
    progress: Progress = False
    executor: Executor | None = None
    _curves: dict[str, ErrorCurves] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiple", check_int("multiple_of", self.multiple, 1))

    def choose(self, candidates: Sequence[Candidate], network: Cost) -> Allocation:
        """Raises BudgetError where not even the smallest ranks meet the budget."""
        self.factorizations.check([candidate.path for candidate in candidates], "factorization")
        network = network if self.clock is None else replace(network, ms=self.clock.network)
        allowed = self.budget.allowed(network)
        options = self._options(candidates)
        fixed = self._fixed(options, network)
        knapsack = self._knapsack(options)
        picked = knapsack.at(allowed - fixed)
        if picked is None:
            raise self.budget.unmet(fixed + knapsack.least, network)
        choices = tuple(each[k].choice for each, k in zip(options, picked, strict=True))
        return Allocation(choices, self._front(options, knapsack, network))

    @property
    def uses_statistics(self) -> bool:
        """With statistics."""
        return self.statistics is not None

    def _front(self, options: Sequence[Sequence[Option]], knapsack: Knapsack, network: Cost) -> tuple[ParetoPoint, ...]:
        """At budgets spread evenly between the cheapest network and the dense one, without those that are expected to
        be worse than a cheaper one: increases do not count as they are.
        """
        if not options:
            return ()
        dense = sum((each[0].cost for each in options), _NOTHING)
        most, points = self.budget.amount(dense), {}
        for k in range(_FRONT + 1):
            picked = knapsack.at(knapsack.least + (most - knapsack.least) * k / _FRONT)
            if picked is not None:
                taken = [each[p] for each, p in zip(options, picked, strict=True)]
                cost = network - dense + sum((option.cost for option in taken), _NOTHING)
                points[cost] = ParetoPoint(cost, sum(option.predicted_loss_increase for option in taken))
        least = accumulate((point.predicted_loss_increase for point in points.values()), min)
        return tuple(
            point for point, best in zip(points.values(), least, strict=True) if point.predicted_loss_increase <= best
        )

    def _fixed(self, options: Sequence[Sequence[Option]], network: Cost) -> float:
        """What of the network no choice changes."""
        return self.budget.amount(network) - sum(self.budget.amount(each[0].cost) for each in options)

    def _knapsack(self, options: Sequence[Sequence[Option]]) -> Knapsack:
        return Knapsack(
            [Class([self.budget.amount(o.cost) for o in each], [o.counted for o in each]) for each in options]
        )

    def _options(self, candidates: Sequence[Candidate]) -> list[list[Option]]:
        """For each candidate the dense one first."""
        wholes = [self._whole(candidate) for candidate in candidates]
        families = [self._families(candidate) for candidate in candidates]
        self._compute([family for own in families for family in own])  # all of them, before anything is timed
        return [self._options_of(*each) for each in zip(candidates, families, wholes, strict=True)]

    def _compute(self, families: Sequence[_Family]) -> None:
        """The curves that are not known yet, those of the largest kernels first: nobody is to work alone at the end."""
        new = [family for family in families if family.key not in self._known(family.candidate)]
        new.sort(key=lambda family: family.candidate.layer.weight.numel(), reverse=True)
        results = ordered_map(error_curve, map(self._job, new), self.executor)
        for family, found in zip(new, with_progress(results, len(new), "planning", self.progress), strict=True):
            self._known(family.candidate)[family.key] = found

    def _families(self, candidate: Candidate) -> list[_Family]:
        """What could replace a convolution, if data say anything of it."""
        if not self._is_reached(candidate):
            return []
        methods, _ = self.factorizations.get(candidate.path)
        families = [_Family(method, candidate) for method in methods or () if not method.rejects(candidate.spec)]
        for family in families:
            family.costs = self._costs(family)
        return [family for family in families if family.costs]

    def _is_reached(self, candidate: Candidate) -> bool:
        return self.statistics is None or candidate.path in self.statistics.moments

    def _known(self, candidate: Candidate) -> ErrorCurves:
        kept = self._curves if self.statistics is None else self.statistics.curves
        return kept.setdefault(candidate.path, {})

    def _metric(self, candidate: Candidate) -> KroneckerFisher | None:
        return None if self.statistics is None else self.statistics.metric(candidate.path, candidate.spec)

    def _whole(self, candidate: Candidate) -> float:
        """By how much the loss grows where the output is lost altogether. Raises WeightError."""
        with error_context(candidate.path):
            layer = candidate.checked
        metric = self._metric(candidate)
        return 1.0 if metric is None else metric.loss_increase(layer.spec, -layer.weight.float())

    def _job(self, family: _Family) -> tuple[Any, ...]:
        """For ``curve``."""
        ranks = list(family.thinned or family.costs)
        return family.candidate.layer, family.method, ranks, self._metric(family.candidate)

    def _options_of(self, candidate: Candidate, families: Sequence[_Family], whole: float) -> list[Option]:
        if not self._is_reached(candidate):
            return [Option(Skip("no gradient reached it in calibration"), candidate.dense, 0.0, 0.0)]
        ranked = [(family.method, list(family.costs)) for family in families]
        ms, times = (None, []) if self.clock is None else chain_latencies(self.clock, candidate, ranked)
        options = [Option(_DENSE, replace(candidate.dense, ms=ms), 0.0, 0.0)]
        known = self._known(candidate)
        for k, family in enumerate(families):
            nats = interpolate(known[family.key], list(family.costs))
            for j, ((rank, cost), n) in enumerate(zip(family.costs.items(), nats, strict=True)):
                pair = None if ms is None else (ms, times[k][j])
                choice = Choice(
                    family.method, rank, predicted_loss_increase=n if self.uses_statistics else None, milliseconds=pair
                )
                timed = cost if pair is None else replace(cost, ms=pair[1])
                options.append(Option(choice, timed, n, n / max(whole, 1e-30) ** self.normalization))
        return options if ms is None else _faster(options, ms)

    def _costs(self, family: _Family) -> dict[Rank, Cost]:
        """Those of the ranks among which to choose, ascending."""
        if self.clock is None and self.multiple == 1:
            return family.thinned
        most = family.method.max_rank(family.candidate.spec)
        allowed = multiples(family.fitting, self.multiple, most)
        return family.cheaper(_thinned(allowed) if self.clock is None else hardware_friendly(allowed, most))


@dataclass(eq=False)
class _Family:
    """The ranks of a factorization that are none dearer than the convolution; ``costs`` are those to choose among."""

    method: Factorization
    candidate: Candidate
    costs: Mapping[Rank, Cost] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """By which its curve is known."""
        return f"{cache_key(self.method)} of {self.candidate.digest}"

    @cached_property
    def fitting(self) -> Sequence[Rank]:
        """Those that have no more parameters, ascending."""
        spec = self.candidate.spec
        ranks, largest = self.method.ranks(spec), self.method.rank_within(spec, 1.0)
        return ranks[: ranks.index(largest) + 1] if largest else ()

    @cached_property
    def thinned(self) -> dict[Rank, Cost]:
        """At most forty of them that have no more MACs either."""
        return self.cheaper(_thinned(self.fitting))

    def cheaper(self, ranks: Sequence[Rank]) -> dict[Rank, Cost]:
        """Those of the ranks whose chains cost no more, with what they cost."""
        costs = {rank: self.candidate.cost(self.method, rank) for rank in ranks}
        return {rank: cost for rank, cost in costs.items() if not cost.exceeds(self.candidate.dense)}


def _thinned(ranks: Sequence[Rank]) -> list[Rank]:
    """At most so many, spread evenly, with the largest."""
    step = max(1, -(-len(ranks) // _RANKS))
    return list(ranks[::-1][::step][::-1])


def _faster(options: Sequence[Option], ms: float) -> list[Option]:
    """The dense one, and those that measure faster by what is more than chance."""
    dense, *others = options
    if ms < _SHORTEST:
        return [dense._replace(choice=Skip(f"it takes {ms:.2g} ms, too little for this machine's clock to compare"))]
    kept = [option for option in others if (option.cost.ms or 0.0) < _FASTER * ms]
    if others and not kept:
        fastest = min(option.cost.ms or 0.0 for option in others)
        dense = dense._replace(choice=Skip(f"no chain measures faster: {ms:.3g} ms as it is, {fastest:.3g} ms at best"))
    return [dense, *kept]
