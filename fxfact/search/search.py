"""The plan for a budget: the one that statistics foresee, or a more even one where that measures clearly better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from fxfact.calibration import (
    Batches,
    DivergenceEvaluator,
    Statistics,
    collect_statistics,
    iter_batches,
    parse_likelihood,
    rank_and_world_size,
    split_held_out,
)
from fxfact.capture import Captured, ExampleInputs
from fxfact.conv import Cost
from fxfact.errors import ArgumentError, CalibrationError
from fxfact.passes import Decomposed, DecomposeOptions
from fxfact.planning import (
    Budget,
    BudgetAllocator,
    FixedRanks,
    Latency,
    Loss,
    Macs,
    Params,
    Plan,
    Selection,
    build_plan,
)
from fxfact.search.inference import DenseBaseline, best_inference_passes
from fxfact.search.latency_model import MeasuredLatency
from fxfact.search.latency_search import LatencySearch
from fxfact.search.plan_loss import PlanLoss
from fxfact.utils import alias_copy, to_eval, warn_caller

_FULL_NORMALIZATION = 1.0  # the normalization of another plan, which is measured beside the usual one
_HALVINGS = 8


@dataclass(frozen=True)
class SearchScope:
    """What of the network a plan is for."""

    include: Selection | None
    exclude: Selection | None
    allow_growth: bool
    form: tuple[str, ...] = ()  # for inference, and the milliseconds of the dense network in it
    ms: float | None = None

    def plan(self, captured: Captured, strategy: FixedRanks | BudgetAllocator) -> Plan:
        """What the strategy makes of it."""
        made = build_plan(
            captured, strategy, include=self.include, exclude=self.exclude, allow_growth=self.allow_growth
        )
        return replace(made, inference_passes=self.form, network=replace(made.network, ms=self.ms))


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """What a caller gives: batches or the statistics of some, batches to measure on, what the output means, and how
    kernels are decomposed to measure them.
    """

    calibration: Batches | Statistics | None
    held_out: Batches | None
    likelihood: object
    decomposing: DecomposeOptions


class SearchResult(NamedTuple):
    """The plan, the statistics that it was made with, and by ``Decision.rewrite`` what was decomposed to measure it."""

    plan: Plan
    statistics: Statistics | None
    decomposed: Mapping[str, Decomposed]


@torch.inference_mode(False)  # in which nothing can be fitted
def search(
    captured: Captured,
    strategy: FixedRanks | BudgetAllocator,
    selected: SearchScope,
    budget: Budget | Loss | None,
    data: CalibrationData,
) -> SearchResult:
    """Raises ArgumentError, BudgetError, CalibrationError."""
    if isinstance(strategy, FixedRanks) and data.held_out is not None:
        raise ArgumentError("held_out is for budgets: ranks that are given leave nothing to measure")
    _check_likelihood(data)
    if isinstance(budget, Latency):
        _check_alone(data)
    statistics, trial = _statistics(captured, data, budget)
    if statistics is not None:
        statistics.check([site.path for site in captured.sites])
    strategy = replace(strategy, statistics=statistics)
    if isinstance(strategy, FixedRanks):
        return SearchResult(selected.plan(captured, strategy), statistics, {})
    make: Callable[[BudgetAllocator], Plan] = partial(selected.plan, captured)
    if isinstance(budget, Latency):
        make, strategy, budget = _clocked(captured, strategy, selected, budget)

    def plan_for(some: Budget) -> Plan:
        made = make(replace(strategy, budget=some))
        if trial is None:
            return made
        even = make(replace(strategy, budget=some, normalization=_FULL_NORMALIZATION))
        if trial.is_clear(even, made):
            made = replace(even, pareto_points=made.pareto_points)
        return replace(made, measured_loss_increase=trial(made)) if trial.on_others else made

    if isinstance(budget, Loss):
        best = _cheapest_within(budget.nats, plan_for, Params if captured.macs is None else Macs)
    else:
        assert budget is not None
        best = plan_for(budget)
    return SearchResult(best, statistics, {} if trial is None else trial.decomposed)


def _clocked(
    captured: Captured, strategy: BudgetAllocator, selected: SearchScope, budget: Latency
) -> tuple[Callable[[BudgetAllocator], Plan], BudgetAllocator, Budget]:
    """What makes plans, with a clock, all of whose times are known; where the machine is under too much load for that,
    a budget of MACs.

    Raises BudgetError.
    """
    form = best_inference_passes(captured, compiled=budget.compiled)
    clock = MeasuredLatency(
        captured.sites, form.ms, form=form.passes, undecided=form.undecided, compiled=budget.compiled
    )
    selected.plan(captured, replace(strategy, budget=Params(1.0), clock=clock))
    clock.save()
    rival = DenseBaseline(captured, clock.form, compiled=budget.compiled)
    clock.network = min(form.ms, rival.milliseconds())  # at the pace at which its convolutions were measured
    make = partial(replace(selected, form=clock.form, ms=clock.network).plan, captured)
    if not clock.noisy:
        return LatencySearch(captured, clock, rival, make), replace(strategy, clock=clock), budget
    share = min(1.0, budget.allowed(Cost(0, None, clock.network)) / clock.network)
    warn_caller(
        f"the machine is under load, times spread too much to plan by: the budget is {share:.2f} of the MACs instead. "
        "Try again when it is idle.",
    )
    return make, strategy, Macs(share)


def _cheapest_within(nats: float, plan_for: Callable[[Budget], Plan], unit: type[Macs | Params]) -> Plan:
    """The cheapest of the plans for shares of the dense cost, 0 … 1, whose measured loss is within ``nats``; found by
    halving, to a 256th of the way between its cheapest network and the dense one.
    """
    dense = plan_for(unit(1.0))
    network = dense.network.macs or dense.network.params
    cheapest = dense.pareto_points[0].cost if dense.pareto_points else dense.network
    low, high = (cheapest.macs or cheapest.params) / network, 1.0
    best = dense
    if not _within(dense, nats):  # even what costs next to nothing by prediction
        for decision in dense.rewrites:
            best = best.edited(decision.path, skip="the loss cannot bear it")
        best = replace(best, measured_loss_increase=0.0)
    for _ in range(_HALVINGS if dense.pareto_points else 0):
        middle = (low + high) / 2
        plan = plan_for(unit(middle))
        if _within(plan, nats):
            best, high = plan, middle
        else:
            low = middle
    return best


def _within(plan: Plan, nats: float) -> bool:
    return plan.measured_loss_increase is not None and plan.measured_loss_increase <= nats


def _check_alone(data: CalibrationData) -> None:
    """Raise ArgumentError where several processes are to plan one network together, each by a clock of its own."""
    together = data.held_out is not None or not isinstance(data.calibration, Statistics | None)
    if together and rank_and_world_size()[1] > 1:
        raise ArgumentError(
            "each process measures times of its own, and would plan another network. Plan in one, from "
            "fxfact.Statistics that all have calibrated, and load its plan in the others."
        )


def _check_likelihood(data: CalibrationData) -> None:
    """Raise ArgumentError for one that nothing would be made of, CalibrationError for one that is none."""
    own = data.calibration.likelihood if isinstance(data.calibration, Statistics) else None
    known = parse_likelihood(data.likelihood)
    if known is not None and data.held_out is None and (data.calibration is None or own not in (None, known.name)):
        raise ArgumentError(
            f"likelihood={data.likelihood!r} says what outputs mean for batches, and there are none"
            + (f"; the statistics are of {own!r}. Calibrate again." if own else ": pass calibration.")
        )


def _statistics(
    captured: Captured, data: CalibrationData, budget: Budget | Loss | None
) -> tuple[Statistics | None, PlanLoss | None]:
    """The statistics, and what measures plans for a budget, if there is data to measure on: what is held out, or else
    every fourth batch of what is learned from. Raises CalibrationError.
    """
    given, request = data.calibration, data.likelihood
    if isinstance(given, Statistics) and request is None:
        request = given.likelihood
    kept, held_out = _batches(captured, data, budget)
    seen = held_out
    if budget is not None and isinstance(kept, list) and not held_out and not callable(request):
        seen = split_held_out(kept)[1] if len(kept) > 1 else kept
    original = DivergenceEvaluator(to_eval(alias_copy(captured.network)), seen, request) if seen else None
    statistics = given if isinstance(given, Statistics) else None
    if kept is not None:
        statistics = collect_statistics(captured, kept, likelihood=request, progress=data.decomposing.progress)
    if statistics is None or original is None:
        return statistics, None
    return statistics, PlanLoss(captured, statistics, original, data.decomposing, on_others=bool(held_out))


def _batches(
    captured: Captured, data: CalibrationData, budget: Budget | Loss | None
) -> tuple[Batches | None, list[ExampleInputs]]:
    """Those to calibrate on, None where there are statistics or no data, a list for a budget; and those held out, by
    the caller or for a bound on the loss.
    """

    def listed(batches: Batches, name: str) -> list[ExampleInputs]:
        return list(iter_batches(captured.network, batches, captured.example_inputs, name=name))

    given, needed = data.calibration, isinstance(budget, Loss)
    kept = None if isinstance(given, Statistics) else given
    held_out = [] if data.held_out is None else listed(data.held_out, "held_out")
    if kept is not None and budget is not None:
        kept = listed(kept, "calibration")
        if needed and not held_out:
            kept, held_out = split_held_out(kept)
    if held_out and given is None:
        raise CalibrationError("held_out is only measured on: pass calibration, other batches to learn from, as well")
    if needed and not held_out:
        raise CalibrationError(
            "a loss is measured on batches of its own: pass two or more as calibration, or fxfact.Statistics and "
            "held_out=batches"
        )
    return kept, held_out
