"""Plans for a time, rehearsed: their networks, holding random numbers, are timed before anything is decomposed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fxfact.capture import Captured
from fxfact.conv import Cost
from fxfact.errors import BudgetError
from fxfact.passes import Decomposed, DecomposeOptions, apply_plan
from fxfact.planning import Budget, BudgetAllocator, Decision, Latency, ParetoPoint, Plan
from fxfact.search.inference import DenseBaseline
from fxfact.search.latency_model import MeasuredLatency
from fxfact.utils import TICK, random_numbers, warn_caller

_REHEARSALS, _CERTAIN = 5, 3  # at most; of the same plan, before its budget is refused
_NEAR = 0.03  # of the budget below it, and above it what may be chance
_LEAST = 0.05  # of the milliseconds of a convolution, for its chain, and of what was foreseen to be saved
_INNER = 0.2  # of what is searched, at either end: not looked at


class LatencyTrial(NamedTuple):
    """A plan, the milliseconds asked of the clock for it, and those that its network measured."""

    plan: Plan
    asked: float
    ms: float


@dataclass(frozen=True, eq=False)
class LatencySearch:
    """Makes plans whose networks measure within the milliseconds of their budget.

    What chains save in a network is not what they save alone: their inputs are fresh there, and the compiler fuses. So
    it searches for what to ask the clock: between what gave a network too slow and what gave one too fast.
    """

    captured: Captured
    clock: MeasuredLatency
    rival: DenseBaseline
    make: Callable[[BudgetAllocator], Plan]
    _asked: dict[float, float] = field(default_factory=dict)  # for a budget, at last

    def __call__(self, strategy: BudgetAllocator) -> Plan:
        """Of up to five the nearest to the budget that is within; where none is, the fastest, with a warning. Raises
        BudgetError where even the fastest chains, rehearsed, do not meet it.
        """
        network = self.clock.network
        allowed = strategy.budget.allowed(Cost(0, None, network))
        search = _Search(network, allowed)
        tried: dict[frozenset[str], LatencyTrial] = {}
        measured: defaultdict[frozenset[str], list[float]] = defaultdict(list)
        asked, refused = self._asked.get(allowed, allowed), False
        for _ in range(_REHEARSALS):
            plan, asked, at_least = self._planned(strategy, asked)
            rewrites = frozenset(decision.rewrite for decision in plan.rewrites)
            times = measured[rewrites]
            if not times or (at_least and median(times) > allowed):  # no plan is faster: was it disturbed?
                times.append(self._milliseconds(plan))
            tried[rewrites] = _rehearsed(plan, asked, median(times))
            ms = tried[rewrites].ms
            refused = at_least and ms > allowed * (1 + _NEAR)
            if abs(ms / allowed - 1) < _NEAR or not rewrites or (refused and len(times) == _CERTAIN):
                break
            asked = search.after(asked, ms)
        best = _best(list(tried.values()), allowed, strategy.budget if refused else None)
        self._asked[allowed] = best.asked
        return best.plan

    def _planned(self, strategy: BudgetAllocator, asked: float) -> tuple[Plan, float, bool]:
        """The plan for so many milliseconds, or for the fewest that the clock knows of; which, and whether it is
        those: in the network they may be fewer.
        """
        try:
            return self.make(replace(strategy, budget=Latency(at_most_ms=asked))), asked, False
        except BudgetError as error:
            if error.least is None:
                raise
            least = error.least * (1 + 1e-9)
            return self.make(replace(strategy, budget=Latency(at_most_ms=least))), least, True

    def _milliseconds(self, plan: Plan) -> float:
        """What the plan's network takes, by its share of the dense one's time, taking turns."""
        if not plan.rewrites:
            return self.clock.network
        weights = {site.path: site.weight for site in self.captured.sites}
        random = {decision.rewrite: _random(decision, weights[decision.path]) for decision in plan.rewrites}
        rehearsed = replace(
            plan, model=f"{plan.model}, rehearsed with random numbers", uses_statistics=False
        )  # for the log
        made = apply_plan(rehearsed, self.captured, DecomposeOptions(known=random))
        network = made.module() if isinstance(made, ExportedProgram) else made
        before, after = self.rival.times(network)
        return self.clock.network * after / before


def _rehearsed(plan: Plan, asked: float, ms: float) -> LatencyTrial:
    """With what its network measured spread over its chains."""
    network = plan.network.ms
    assert network is not None
    foreseen = [each.milliseconds for each in plan.rewrites if each.milliseconds is not None]
    return LatencyTrial(_scaled(plan, _factor(foreseen, network - ms)), asked, ms)


def _factor(foreseen: Sequence[tuple[float, float]], saved: float) -> float:
    """How many times what each chain was foreseen to save, of milliseconds of convolutions and their chains, gives what
    they saved together, where none saves more than nearly all of its convolution.
    """
    savings = [(dense - ms, (1 - _LEAST) * dense) for dense, ms in foreseen if ms < dense]
    free, factor = sum(saving for saving, _ in savings), 1.0
    for saving, most in sorted(savings, key=lambda each: each[1] / each[0]):  # those first that come to it first
        factor = max(saved / free, _LEAST)
        if factor * saving <= most:
            break
        saved, free = saved - most, free - saving
    return factor


def _best(tried: list[LatencyTrial], allowed: float, missed: Budget | None) -> LatencyTrial:
    within = [each for each in tried if each.ms <= allowed * (1 + _NEAR)]
    if within:
        return max(within, key=lambda each: each.ms)
    best = min(tried, key=lambda each: each.ms)
    if missed is not None:
        raise missed.unmet(best.ms, best.plan.network)
    warn_caller(
        f"the budget is {allowed:.3g} ms, and of {len(tried)} networks planned for it the fastest measures "
        f"{best.ms:.3g} ms. Ask for less, or try again when the machine is idle.",
    )
    return best


def _random(decision: Decision, like: Tensor) -> Decomposed:
    """Stages that keep the size of what goes through them."""
    sizes = [torch.Size(spec.weight_shape) for spec in decision.stages]
    return [(random_numbers(size) / size[1:].numel() ** 0.5).to(like) for size in sizes], 0.0


def _scaled(plan: Plan, factor: float) -> Plan:
    """With so many times what its chains, and those of the other networks that could be had, were foreseen to save."""

    def left(dense: float, ms: float) -> float:
        return max(dense - factor * (dense - ms), _LEAST * dense)

    def chain_scaled(decision: Decision) -> Decision:
        if decision.factorization is None or decision.milliseconds is None:
            return decision
        dense, chain = decision.milliseconds
        return replace(decision, milliseconds=(dense, left(dense, chain)))

    def point_scaled(point: ParetoPoint) -> ParetoPoint:
        return replace(point, cost=replace(point.cost, ms=left(plan.network.ms or 0.0, point.cost.ms or 0.0)))

    return replace(
        plan, decisions=tuple(map(chain_scaled, plan)), pareto_points=tuple(map(point_scaled, plan.pareto_points))
    )


class _Search:
    """For the milliseconds to ask of a clock for a network that measures what is allowed (by the Illinois method:
    M. Dowell and P. Jarratt, A modified regula falsi method, BIT 11, 1971).
    """

    def __init__(self, network: float, allowed: float) -> None:
        self._network, self._allowed = network, allowed
        self._ends = {True: (network, network - allowed)}  # by whether it was too slow: asked, by how much
        self._last: bool | None = None

    def after(self, asked: float, measured: float) -> float:
        """What to ask next: where a line through what gave a network too slow, at first the dense one, and what gave
        one too fast meets what is allowed; until one was too fast, what it would be if savings were in proportion.
        """
        slow = measured > self._allowed
        if slow is self._last and len(self._ends) == 2:  # then the other end counts half
            other, by = self._ends[not slow]
            self._ends[not slow] = other, by / 2
        self._ends[slow], self._last = (asked, measured - self._allowed), slow
        start, above = self._ends[True]
        if False not in self._ends:
            wanted = self._network - self._allowed
            saved = max(wanted - above, _LEAST * (self._network - start))
            return max(self._network - (self._network - start) * wanted / saved, TICK)
        end, below = self._ends[False]
        return start + min(max(above / (above - below), _INNER), 1 - _INNER) * (end - start)
