"""Rank allocation under a budget: a multiple-choice knapsack over every factorization and rank of all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import NamedTuple, final

from fxfact.calibration import Statistics
from fxfact.conv import ConvLayer, Cost, KroneckerFisher, Skip
from fxfact.errors import check_int, error_context
from fxfact.factorizations import Factorization, Rank
from fxfact.planning.budgets import Budget
from fxfact.planning.error_curves import ErrorCurveCache, cache_key, error_curves, interpolate
from fxfact.planning.hardware_ranks import chain_latencies, hardware_friendly, multiples
from fxfact.planning.joint_options import JointFamily, joint_errors, joint_families, with_joint_options
from fxfact.planning.layer_options import LayerOptions, Option, thinned
from fxfact.planning.network_knapsack import NetworkKnapsack, joint_sets
from fxfact.planning.strategy import (
    Allocation,
    ByPath,
    Candidate,
    Choice,
    LatencyModel,
    ParetoPoint,
    RankStrategy,
)
from fxfact.utils import CLOCK_RESOLUTION_MS, Progress, ordered_map, with_progress

_PARETO_POINTS = 40
_SMALLEST_RANKS = 2  # of each factorization, to find out what can be reached
_NO_COST = Cost(0, 0, 0.0)
_MAX_TIME_SHARE = 0.97  # of the dense layer's time; a chain must be at least this much faster
_MIN_MS = 1000 * CLOCK_RESOLUTION_MS  # layers that take less cannot be compared by this machine's clock
_MIN_KEPT = 1e-6  # of the energy of a layer's output; below it the energy loss is not a logarithm any more
_DENSE = Skip("best left as it is for this budget")


def allocate(layers: Sequence[LayerOptions], network: Cost, budget: Budget, normalization: float = 0.5) -> Allocation:
    """Choose one option for each layer: of all networks within the budget, the one with the least loss increase.

    Loss increases add up only while they are small. The increases of each layer are therefore divided by
    ``loss_without_layer ** normalization``, so that no layer is sacrificed for the others. Of 0, ½ and 1, ½ nearly
    always measures best on other data, or close to the best; where little is left of a network, 1 may be better.

    This is a pure function: it computes no errors, measures nothing, and changes nothing.

    Args:
        layers: the options of every layer.
        network: the cost of the whole dense network.
        budget: the bound.
        normalization: the exponent, 0 … 1.

    Returns:
        One choice for each layer, and the Pareto front.

    Raises:
        BudgetError: if not even the cheapest options meet the budget.
    """
    knapsack = NetworkKnapsack(layers, budget, normalization)
    bound = budget.allowed(network) - _fixed_amount(layers, network, budget)
    picked = knapsack.at(bound)
    if picked is None:
        raise budget.unmet_error(least_amount(layers, network, budget), network)
    if any(layer.joint for layer in layers):  # choices of each layer alone are tried on a finer scale without them
        alone = NetworkKnapsack([replace(layer, joint=()) for layer in layers], budget, normalization)
        others = alone.at(bound)
        is_joint = any(k >= len(layer.options) for layer, k in zip(layers, picked, strict=True))
        if others is not None and not (is_joint and knapsack.value(picked) < knapsack.value(others)):
            picked = others
    chosen = list(zip(layers, picked, strict=True))
    choices = tuple(layer.every[k].choice for layer, k in chosen)
    alternatives = tuple(layer.alternatives(k, budget) for layer, k in chosen)
    return Allocation(choices, _pareto_points(layers, knapsack, network, budget), alternatives)


def least_amount(layers: Sequence[LayerOptions], network: Cost, budget: Budget) -> float:
    """Return the least that the network costs, in the budget's unit: with the cheapest option of every layer."""
    cheapest = [min(budget.amount(option.cost) for option in layer.options) for layer in layers]
    total = _fixed_amount(layers, network, budget) + sum(cheapest)
    for own in joint_sets(layers):
        together = zip(*([budget.amount(option.cost) for option in layers[k].joint] for k in own), strict=True)
        total += min(0.0, min(map(sum, together)) - sum(cheapest[k] for k in own))
    return total


def _fixed_amount(layers: Sequence[LayerOptions], network: Cost, budget: Budget) -> float:
    """Return the cost of everything but these layers, in the budget's unit."""
    return budget.amount(network) - sum(budget.amount(layer.dense.cost) for layer in layers)


def energy_loss(error: float) -> float:
    """Return what a relative squared error costs without statistics: -log(1 - e).

    The chain that is closest to a kernel keeps the share 1 - e of the energy of the layer's output (for white inputs).
    The shares that consecutive layers keep multiply, so their logarithms add up. The cost is e while e is small, and
    grows without bound as the output is lost. From 1 - 1e-6 on it rises steeply instead, but stays finite and
    increasing, so that the least bad rank is still known.

    Args:
        error: e = ‖W − Ŵ‖² / ‖W‖², or an estimate of it.

    Returns:
        The cost.
    """
    kept = max(1 - error, _MIN_KEPT)
    return -math.log(kept) + max(0.0, _MIN_KEPT - (1 - error)) / _MIN_KEPT**2


def _work(layer: ConvLayer) -> float:
    """Return about how long the error curves of a layer take, compared with others: the cost of an SVD."""
    return float(layer.weight.numel() * min(layer.spec.in_channels, layer.spec.out_channels))


def _pareto_points(
    layers: Sequence[LayerOptions], knapsack: NetworkKnapsack, network: Cost, budget: Budget
) -> tuple[ParetoPoint, ...]:
    """Return the networks for budgets spread evenly between the cheapest network and the dense one.

    Networks that are expected to be worse than a cheaper one are left out. There are some, because the knapsack weighs
    the increases.
    """
    if not layers:
        return ()
    dense = sum((layer.dense.cost for layer in layers), _NO_COST)
    largest, points = budget.amount(dense), {}
    for k in range(_PARETO_POINTS + 1):
        picked = knapsack.at(knapsack.least + (largest - knapsack.least) * k / _PARETO_POINTS)
        if picked is not None:
            taken = [layer.every[p] for layer, p in zip(layers, picked, strict=True)]
            cost = network - dense + sum((option.cost for option in taken), _NO_COST)
            points[cost] = ParetoPoint(cost, sum(option.predicted_loss_increase for option in taken))
    increases = [point.predicted_loss_increase for point in points.values()]
    best_so_far = accumulate(increases, min)
    return tuple(p for p, best in zip(points.values(), best_so_far, strict=True) if p.predicted_loss_increase <= best)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class BudgetAllocator(RankStrategy):
    """Chooses factorizations and ranks for all layers together, within a budget.

    Options that cost more than the dense layer, in parameters or in MACs, are left out. With a latency model, options
    that are not faster are left out as well. The layers of a joint set can also share stages, if the budget counts
    parameters.

    Attributes:
        budget: the bound for the whole network.
        factorizations: the factorizations to consider, by path.
        statistics: calibration statistics. Without them, the ``energy_loss`` of every kernel counts.
        multiple: ranks are multiples of this, or full.
        normalization: see ``allocate``.
        latency_model: required by a budget of milliseconds.
        error_curves: curves that are known already; new ones are added.
        progress: see ``fxfact.plan``.
        executor: computes the error curves; the result does not depend on it.
    """

    budget: Budget
    factorizations: ByPath[tuple[Factorization, ...]]
    statistics: Statistics | None = None
    multiple: int = 1
    normalization: float = 0.5
    latency_model: LatencyModel | None = None
    error_curves: ErrorCurveCache = field(default_factory=ErrorCurveCache)
    progress: Progress = None
    executor: Executor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiple", check_int("multiple_of", self.multiple, 1))

    @property
    def uses_statistics(self) -> bool:
        """Whether there are statistics."""
        return self.statistics is not None

    def choose(self, candidates: Sequence[Candidate], network: Cost) -> Allocation:
        """Raises BudgetError if not even the smallest ranks meet the budget."""
        if self.latency_model is not None:
            network = replace(network, ms=self.latency_model.network_ms)
        self.check_budget(candidates, network)
        return allocate(self.layer_options(candidates), network, self.budget, self.normalization)

    def check_budget(self, candidates: Sequence[Candidate], network: Cost, reasons: str = "") -> None:
        """Raise BudgetError if the smallest ranks do not meet the budget. Computes no errors.

        ``reasons`` says why layers have to stay, if some do.
        """
        self.budget.amount(network)  # refuses unknown MACs
        least = least_amount(self.smallest_options(candidates), network, self.budget)
        if least > self.budget.allowed(network):
            raise self.budget.unmet_error(least, network, reasons)

    def smallest_options(self, candidates: Sequence[Candidate]) -> tuple[LayerOptions, ...]:
        """Return for each candidate the dense layer and the smallest ranks of each factorization, without errors.

        Those are two, because the smallest one is not always the fastest.
        """
        self.factorizations.check([candidate.path for candidate in candidates], "factorization")
        layers = []
        for candidate in candidates:
            ranked = []
            for factorization, _, costs in self._ranks_to_choose(candidate):
                smallest = dict(islice(costs.items(), _SMALLEST_RANKS))
                ranked.append(_RankedChains(factorization, smallest, [0.0] * len(smallest)))
            layers.append(LayerOptions(tuple(self._options(candidate, ranked)), 1.0))
        joint = [family.smallest(_SMALLEST_RANKS) for family in self._joint_families(candidates)]
        no_losses = [(family, [[0.0] * len(family.costs)] * len(family.members)) for family in joint]
        return with_joint_options(layers, candidates, no_losses, in_nats=False)

    def layer_options(self, candidates: Sequence[Candidate]) -> tuple[LayerOptions, ...]:
        """Return what could become of each candidate. Errors are computed first, then latencies are measured.

        Raises WeightError for weights without values, and ArgumentError for a path pattern that fits no candidate.
        """
        self.factorizations.check([candidate.path for candidate in candidates], "factorization")
        losses = [self._loss_without(candidate) for candidate in candidates]
        families = [self._families(candidate) for candidate in candidates]
        self._compute_curves([family for own in families for family in own])
        rows = zip(candidates, families, losses, strict=True)
        shown = self.progress if self.latency_model is not None else False
        layers = [
            LayerOptions(tuple(self._options(candidate, [self._with_increases(family) for family in own])), loss)
            for candidate, own, loss in with_progress(rows, len(candidates), "timing", shown)
        ]
        joint, curves = self._joint_families(candidates), self.error_curves
        errors = joint_errors(joint, self.statistics, curves, executor=self.executor, progress=self.progress)
        options = zip(joint, ([self._as_losses(own) for own in each] for each in errors), strict=True)
        return with_joint_options(layers, candidates, list(options), in_nats=self.uses_statistics)

    def _joint_families(self, candidates: Sequence[Candidate]) -> list[JointFamily]:
        """Return the factorizations of the joint sets, if the budget counts parameters: nothing else is saved."""
        if not self.budget.amount(Cost(1, 0, 0.0)):
            return []
        reached = [candidate for candidate in candidates if self._has_gradients(candidate)]
        return joint_families(reached, lambda path: self.factorizations.get(path)[0] or (), self.multiple)

    def _loss_without(self, candidate: Candidate) -> float:
        with error_context(candidate.path):
            layer = candidate.checked_layer()
        fisher = self._fisher(candidate)
        return 1.0 if fisher is None else fisher.loss_increase(layer.spec, layer.weight.float())

    def _fisher(self, candidate: Candidate) -> KroneckerFisher | None:
        return None if self.statistics is None else self.statistics.fisher(candidate.path, candidate.spec)

    def _has_gradients(self, candidate: Candidate) -> bool:
        return self.statistics is None or candidate.path in self.statistics.moments

    def _families(self, candidate: Candidate) -> list[_Family]:
        """Return the factorizations that could replace a layer, with the ranks to choose from."""
        ranked = self._ranks_to_choose(candidate)
        if not ranked:
            return []
        weight = candidate.weight_digest()
        statistics = "no statistics" if self.statistics is None else self.statistics.digest(candidate.path)
        return [
            _Family(f, candidate, cache_key(f, candidate.spec, curve_ranks, weight, statistics), curve_ranks, costs)
            for f, curve_ranks, costs in ranked
        ]

    def _ranks_to_choose(self, candidate: Candidate) -> list[tuple[Factorization, Sequence[Rank], Mapping[Rank, Cost]]]:
        """Return each factorization that could replace a layer, with what ``_ranks`` returns."""
        if not self._has_gradients(candidate):
            return []
        factorizations, _ = self.factorizations.get(candidate.path)
        fitting = [f for f in factorizations or () if not f.rejects(candidate.spec)]
        fitting = [f for f in fitting if f.is_worth_trying(candidate.spec, fitting)]
        return [(f, curve_ranks, costs) for f in fitting for curve_ranks, costs in [self._ranks(f, candidate)] if costs]

    def _ranks(self, factorization: Factorization, candidate: Candidate) -> tuple[Sequence[Rank], Mapping[Rank, Cost]]:
        """Return the ranks of the error curve, and the ranks to choose from with their costs, both ascending."""
        fitting = factorization.ranks_within(candidate.spec, 1.0)  # no more parameters than the dense layer
        costs = _affordable(candidate, factorization, thinned(fitting))
        curve_ranks = list(costs)
        if self.latency_model is not None or self.multiple > 1:
            full = factorization.max_rank(candidate.spec)
            allowed = multiples(fitting, self.multiple, full)
            chosen = thinned(allowed) if self.latency_model is None else hardware_friendly(allowed, full)
            costs = _affordable(candidate, factorization, chosen)
        return curve_ranks or list(costs), costs

    def _why_dense(self, candidate: Candidate) -> Skip:
        """Return the reason why a layer has no option but to stay dense."""
        if not self._has_gradients(candidate):
            return Skip("no gradient reached it in calibration")
        factorizations, _ = self.factorizations.get(candidate.path)
        if factorizations is None:
            return Skip("no factorization is given for it")
        refused = [skip.reason for f in factorizations if (skip := f.rejects(candidate.spec)) is not None]
        larger = [] if len(refused) == len(factorizations) else ["no chain would be smaller"]
        return Skip("; ".join(dict.fromkeys([*refused, *larger])))

    def _compute_curves(self, families: Sequence[_Family]) -> None:
        """Compute the curves that are not in the cache, one job for each layer.

        Large kernels go first, so that all workers finish together.
        """
        by_path: dict[str, list[_Family]] = {}
        for family in families:
            if family.key not in self.error_curves:
                by_path.setdefault(family.candidate.path, []).append(family)
        layers = sorted(by_path.values(), key=lambda own: own[0].candidate.layer.weight.numel(), reverse=True)
        jobs = (
            (own[0].candidate.layer, [(f.factorization, f.curve_ranks) for f in own], self._fisher(own[0].candidate))
            for own in layers
        )
        results = with_progress(
            ordered_map(error_curves, jobs, self.executor),
            len(layers),
            "planning",
            self.progress,
            work=[_work(own[0].candidate.layer) for own in layers],
        )
        for own, curves in zip(layers, results, strict=True):
            for family, curve in zip(own, curves, strict=True):
                self.error_curves[family.key] = curve

    def _with_increases(self, family: _Family) -> _RankedChains:
        """Return the chains of a family with their expected loss increases."""
        errors = interpolate(self.error_curves[family.key], list(family.costs))
        return _RankedChains(family.factorization, family.costs, self._as_losses(errors))

    def _as_losses(self, errors: list[float]) -> list[float]:
        """Return the values of an error curve as loss increases."""
        return [energy_loss(error) for error in errors] if self.statistics is None else errors

    def _options(self, candidate: Candidate, families: Sequence[_RankedChains]) -> list[Option]:
        """Return the dense layer, then the chains. With a latency model, only those that are faster."""
        dense_ms: float | None = None
        chain_ms: Sequence[Sequence[float | None]] = [[None] * len(family.costs) for family in families]
        if self.latency_model is not None:
            ranked = [(family.factorization, list(family.costs)) for family in families]
            dense_ms, chain_ms = chain_latencies(self.latency_model, candidate, ranked)
        reason = _DENSE if families else self._why_dense(candidate)
        options = [Option(reason, replace(candidate.dense_cost, ms=dense_ms), 0.0)]
        for family, latencies in zip(families, chain_ms, strict=True):
            for (rank, cost), increase, ms in zip(family.costs.items(), family.increases, latencies, strict=True):
                choice = Choice(
                    family.factorization,
                    rank,
                    predicted_loss_increase=increase if self.uses_statistics else None,
                    latencies_ms=None if dense_ms is None or ms is None else (dense_ms, ms),
                )
                options.append(Option(choice, cost if ms is None else replace(cost, ms=ms), increase))
        return options if dense_ms is None or not families else _faster_options(options, dense_ms)


class _RankedChains(NamedTuple):
    """One factorization of one layer: the ranks to choose from with their costs, and their loss increases."""

    factorization: Factorization
    costs: Mapping[Rank, Cost]
    increases: Sequence[float]


@dataclass(frozen=True, eq=False)
class _Family:
    """One factorization of one layer: the key and the ranks of its error curve, and the ranks to choose from."""

    factorization: Factorization
    candidate: Candidate
    key: str
    curve_ranks: Sequence[Rank]
    costs: Mapping[Rank, Cost]


def _affordable(candidate: Candidate, factorization: Factorization, ranks: Sequence[Rank]) -> dict[Rank, Cost]:
    """Return the ranks whose chains cost no more than the dense layer, with their costs."""
    costs = zip(ranks, candidate.costs(factorization, ranks), strict=True)
    return {rank: cost for rank, cost in costs if not cost.exceeds(candidate.dense_cost)}


def _faster_options(options: Sequence[Option], dense_ms: float) -> list[Option]:
    """Return the dense layer, and the chains that are faster by more than chance."""
    dense, *chains = options
    if dense_ms < _MIN_MS:
        reason = f"it takes {dense_ms:.2g} ms, too little for this machine's clock to compare"
        return [dense._replace(choice=Skip(reason))]
    faster = [option for option in chains if (option.cost.ms or 0.0) < _MAX_TIME_SHARE * dense_ms]
    if chains and not faster:
        best = min(option.cost.ms or 0.0 for option in chains)
        reason = f"no chain measures faster: {dense_ms:.3g} ms as it is, {best:.3g} ms at best"
        dense = dense._replace(choice=Skip(reason))
    return [dense, *faster]
