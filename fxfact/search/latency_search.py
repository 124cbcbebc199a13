"""Plans for a budget of milliseconds: propose a plan, time its network before anything is decomposed, decide."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fxfact.capture import Captured
from fxfact.conv import Cost
from fxfact.errors import BudgetError
from fxfact.passes import DecomposeOptions, Decomposition, apply_plan
from fxfact.planning import Budget, Decision, Latency, MeasuredPoint, ParetoPoint, Plan
from fxfact.search.inference import DenseBaseline
from fxfact.search.propose import Factors, Propose
from fxfact.utils import CLOCK_RESOLUTION_MS, seeded_randn, warn_caller

_MAX_TRIALS = 5
_MAX_REPEATS = 3  # measurements of the fastest plan before the budget is refused, and of an implausible one
_EARLY_TOLERANCE = 0.1  # the share of the budget by which the smallest ranks must miss it to be refused at once
_TOLERANCE = 0.03  # a plan may measure this share of the budget below it, or by chance above it
_MIN_TIME_SHARE = 0.05  # the least share of a layer's time that its chain usually takes, and of predicted savings
_MARGIN = 0.2  # of the search interval, at both ends, where no plan is asked for


_Point = TypeVar("_Point", ParetoPoint, MeasuredPoint)


class LatencyTrial(NamedTuple):
    """A plan, the milliseconds that it was asked for, and the milliseconds that its network measured.

    ``is_plausible`` says whether its chains can have saved what the network saved.
    """

    plan: Plan
    asked_ms: float
    measured_ms: float
    is_plausible: bool


class LatencySearch:
    """Finds plans whose networks measure within a budget of milliseconds.

    Chains do not save the same time in a network as alone: their inputs are in the caches, and compilers fuse them. The
    search therefore varies the milliseconds that plans are asked for until the network measures the budget.

    ``is_implausible`` says whether a plan was returned whose network saved more than its chains can save. Then the
    times of the network or those of the layers are wrong, as on a machine under load, and so are the ranks.

    Args:
        captured: the network.
        baseline: the dense network to compare with.
        propose: returns the plan for a budget, by the latencies of single layers and chains.
        network_ms: milliseconds of the dense network.

    Attributes:
        points: every network that was timed.
    """

    def __init__(
        self,
        captured: Captured,
        baseline: DenseBaseline,
        propose: Propose,
        network_ms: float,
    ) -> None:
        self._captured, self._baseline, self._propose, self._network_ms = captured, baseline, propose, network_ms
        self._start_ms: float | None = None  # what the best plan of the last search was asked for
        self.is_implausible = False
        self.points: list[MeasuredPoint] = []

    def check_reachable(self, budget: Budget) -> None:
        """Raise BudgetError if the fastest network measures more than the budget by a tenth or more."""
        plan, _, _ = self._plan_for(CLOCK_RESOLUTION_MS, 0.0, {})
        target, times = budget.allowed(plan.network), [self._measure(plan)]
        while median(times) > target * (1 + _EARLY_TOLERANCE):
            if len(times) == _MAX_REPEATS:
                raise budget.unmet_error(median(times), plan.network)
            times.append(self._measure(plan))

    def propose(self, budget: Budget, normalization: float, factors: Factors) -> Plan:
        """Try up to five plans. Return the slowest one that meets the budget, or the fastest one with a warning.

        Raises:
            BudgetError: if even the network of the fastest chains measures more than the budget.
        """
        target = budget.allowed(Cost(0, None, self._network_ms))
        interval = RegulaFalsi(self._network_ms, target)
        trials: dict[frozenset[str], LatencyTrial] = {}
        measured: defaultdict[frozenset[str], list[float]] = defaultdict(list)
        asked, is_refused = self._start_ms or target, False
        for _ in range(_MAX_TRIALS):
            plan, asked, is_fastest = self._plan_for(asked, normalization, factors)
            rewrites = frozenset(decision.rewrite for decision in plan.rewrites)
            times = measured[rewrites]
            if not times or (is_fastest and median(times) > target):  # again, in case the machine was disturbed
                times.append(self._measure(plan))
            while not _is_plausible(plan, median(times)) and len(times) < _MAX_REPEATS:
                times.append(self._measure(plan))
            ms = median(times)
            trial = trials[rewrites] = LatencyTrial(_with_measured(plan, ms), asked, ms, _is_plausible(plan, ms))
            cost = replace(plan.after, ms=ms)
            self.points.append(MeasuredPoint(cost, plan.predicted_loss_increase, milliseconds=ms))
            is_refused = is_fastest and ms > target * (1 + _TOLERANCE)
            is_close = abs(ms / target - 1) < _TOLERANCE
            is_refused_thrice = is_refused and len(times) == _MAX_REPEATS
            if is_close or not rewrites or is_refused_thrice or not trial.is_plausible:
                break
            asked = interval.next_asked(asked, ms)
        best = _best_trial(list(trials.values()), target, budget if is_refused else None)
        self._start_ms = best.asked_ms
        self.is_implausible |= not best.is_plausible
        return best.plan

    def _plan_for(self, asked: float, normalization: float, factors: Factors) -> tuple[Plan, float, bool]:
        """Return a plan, the milliseconds that it was asked for, and whether it is the fastest plan.

        It is the plan for ``asked`` milliseconds, or the fastest one if no plan takes so few.
        """
        try:
            return self._propose(Latency(at_most_ms=asked), normalization, factors), asked, False
        except BudgetError as error:
            if error.least is None:
                raise
            least = error.least * (1 + 1e-9)
            return self._propose(Latency(at_most_ms=least), normalization, factors), least, True

    def as_measured(self, plan: Plan) -> Plan:
        """Return a plan, its front and its measured points with milliseconds that agree with its network's."""
        return _with_measured(plan, self._measure(plan))

    def _measure(self, plan: Plan) -> float:
        """Return the milliseconds of the plan's network, holding random weights."""
        if not plan.rewrites:
            return self._network_ms
        weights = {site.path: site.weight for site in self._captured.sites}
        random = {
            decision.rewrite: _random_decomposition(decision, weights[decision.path]) for decision in plan.rewrites
        }
        model = f"{plan.model}, with random numbers to measure its time"  # for the log
        timed_plan = replace(plan, model=model, uses_statistics=False)
        result = apply_plan(timed_plan, self._captured, DecomposeOptions(), known=random)
        network = result.module() if isinstance(result, ExportedProgram) else result
        dense_ms, network_ms = self._baseline.compare(network)
        return self._network_ms * network_ms / dense_ms


def _is_plausible(plan: Plan, measured_ms: float) -> bool:
    """Return whether the chains of a plan can save what its network saved."""
    latencies = [decision.latencies_ms for decision in plan.rewrites if decision.latencies_ms is not None]
    most = sum(_most_saved(dense, chain) for dense, chain in latencies if chain < dense)
    return (plan.network.ms or 0.0) - measured_ms <= most


def _most_saved(dense: float, chain: float) -> float:
    """Return the most milliseconds that a chain can save: nearly all, or all but half of what it takes alone."""
    return dense - min(_MIN_TIME_SHARE * dense, chain / 2)


def _with_measured(plan: Plan, measured_ms: float) -> Plan:
    """Return the plan with the latencies of its chains scaled so that they save what the network saved."""
    network_ms = plan.network.ms
    assert network_ms is not None
    predicted = [decision.latencies_ms for decision in plan.rewrites if decision.latencies_ms is not None]
    return _scale_savings(plan, _savings_factor(predicted, network_ms - measured_ms))


def _savings_factor(latencies: Sequence[tuple[float, float]], saved: float) -> float:
    """Return the factor on the predicted savings of the chains whose total is ``saved``.

    Args:
        latencies: milliseconds of each layer and of its chain.
        saved: milliseconds that they saved together. No chain saves more than ``_most_saved``.
    """
    savings = [(dense - chain, _most_saved(dense, chain)) for dense, chain in latencies if chain < dense]
    free, factor = sum(saving for saving, _ in savings), 1.0
    for saving, limit in sorted(savings, key=lambda pair: pair[1] / pair[0]):  # those that reach their limit first
        factor = max(saved / free, _MIN_TIME_SHARE)
        if factor * saving <= limit:
            break
        saved, free = saved - limit, free - saving
    return factor


def _scale_savings(plan: Plan, factor: float) -> Plan:
    """Return the plan with the predicted savings of its chains and of other networks multiplied."""

    def scaled(dense: float, chain: float) -> float:
        return dense - min(factor * (dense - chain), _most_saved(dense, chain))

    def scaled_decision(decision: Decision) -> Decision:
        if decision.factorization is None or decision.latencies_ms is None:
            return decision
        dense, chain = decision.latencies_ms
        return replace(decision, latencies_ms=(dense, scaled(dense, chain)))

    def scaled_point(point: _Point) -> _Point:
        return replace(point, cost=replace(point.cost, ms=scaled(plan.network.ms or 0.0, point.cost.ms or 0.0)))

    return replace(
        plan,
        decisions=tuple(map(scaled_decision, plan)),
        pareto_points=tuple(map(scaled_point, plan.pareto_points)),
        measured_points=tuple(map(scaled_point, plan.measured_points)),
    )


def _best_trial(trials: list[LatencyTrial], target: float, refused: Budget | None) -> LatencyTrial:
    """Return the slowest trial within the budget, else the fastest with a warning, or raise for a refused budget.

    Implausible trials are returned only if no other one is within the budget, and without a warning.
    """
    within = [trial for trial in trials if trial.measured_ms <= target * (1 + _TOLERANCE)]
    if within:
        plausible = [trial for trial in within if trial.is_plausible]
        return max(plausible or within, key=lambda trial: trial.measured_ms)
    best = min(trials, key=lambda trial: trial.measured_ms)
    if not best.is_plausible:
        return best
    if refused is not None:
        raise refused.unmet_error(best.measured_ms, best.plan.network)
    warn_caller(
        f"the budget is {target:.3g} ms, and of {len(trials)} networks planned for it the fastest measures "
        f"{best.measured_ms:.3g} ms. Ask for less, or try again when the machine is idle."
    )
    return best


def _random_decomposition(decision: Decision, like: Tensor) -> Decomposition:
    """Return random stages that keep the scale of what passes through them."""
    shapes = [torch.Size(spec.weight_shape) for spec in decision.stages]
    weights = [(seeded_randn(shape) / shape[1:].numel() ** 0.5).to(like) for shape in shapes]
    return Decomposition(weights, 0.0)


class RegulaFalsi:
    """Finds the milliseconds to ask for so that the network measures the target.

    Uses the Illinois variant of regula falsi (M. Dowell and P. Jarratt, A modified regula falsi method, BIT 11, 1971).
    """

    def __init__(self, network_ms: float, target: float) -> None:
        self._network_ms, self._target = network_ms, target
        self._ends = {True: (network_ms, network_ms - target)}  # by whether it was too slow: asked, excess over target
        self._last_too_slow: bool | None = None

    def next_asked(self, asked: float, measured: float) -> float:
        """Return what to ask for next.

        This is where the line through the last plan that was too slow and the last one that was too fast meets the
        target. As long as none was too fast, savings are assumed to be proportional.
        """
        too_slow = measured > self._target
        if too_slow is self._last_too_slow and len(self._ends) == 2:  # then the other end counts half
            other, excess = self._ends[not too_slow]
            self._ends[not too_slow] = other, excess / 2
        self._ends[too_slow], self._last_too_slow = (asked, measured - self._target), too_slow
        start, above = self._ends[True]
        if False not in self._ends:
            wanted = self._network_ms - self._target
            saved = max(wanted - above, _MIN_TIME_SHARE * (self._network_ms - start))
            return max(self._network_ms - (self._network_ms - start) * wanted / saved, CLOCK_RESOLUTION_MS)
        end, below = self._ends[False]
        return start + min(max(above / (above - below), _MARGIN), 1 - _MARGIN) * (end - start)
