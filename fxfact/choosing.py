"""The plan for a budget: the one that statistics foresee, or a more even one where that measures clearly better."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from fxfact.calibration import (
    Batches,
    ReferenceOutputs,
    Statistics,
    arguments_for,
    calibrate,
    held_out_of,
    known_likelihood,
    place_among_processes,
)
from fxfact.capture import Captured, ExampleInputs
from fxfact.copying import evaluated, private_copy
from fxfact.cost import Cost
from fxfact.errors import ArgumentError, CalibrationError
from fxfact.inference import Rival, best_form
from fxfact.latency import Clock
from fxfact.passes import Decomposed, Decomposing
from fxfact.planning import Plan, Selection, make_plan
from fxfact.ranks import Budget, Latency, Loss, Macs, Params, Requested, WithinBudget
from fxfact.rehearsing import Rehearsal
from fxfact.trying import Trial

_EVEN = 1.0  # the evenness of another plan, which is measured beside the usual one
_HALVINGS = 8


@dataclass(frozen=True)
class Selected:
    """What of the network a plan is for."""

    include: Selection | None
    exclude: Selection | None
    allow_growth: bool
    form: tuple[str, ...] = ()  # for inference, and the milliseconds of the dense network in it
    ms: float | None = None

    def plan(self, captured: Captured, strategy: Requested | WithinBudget) -> Plan:
        """What the strategy makes of it."""
        made = make_plan(captured, strategy, include=self.include, exclude=self.exclude, allow_growth=self.allow_growth)
        return replace(made, form=self.form, network=replace(made.network, ms=self.ms))


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a caller gives: batches or the statistics of some, batches to measure on, what the output means, and how
    kernels are decomposed to measure them.
    """

    calibration: Batches | Statistics | None
    held_out: Batches | None
    likelihood: object
    decomposing: Decomposing


class Chosen(NamedTuple):
    """The plan, the statistics that it was made with, and by ``Decision.rewrite`` what was decomposed to measure it."""

    plan: Plan
    statistics: Statistics | None
    decomposed: Mapping[str, Decomposed]


@torch.inference_mode(False)  # in which nothing can be fitted
def choose(
    captured: Captured,
    strategy: Requested | WithinBudget,
    selected: Selected,
    budget: Budget | Loss | None,
    data: Data,
) -> Chosen:
    """Raises ArgumentError, BudgetError, CalibrationError."""
    if isinstance(strategy, Requested) and data.held_out is not None:
        raise ArgumentError("held_out is for budgets: ranks that are given leave nothing to measure")
    _check_likelihood(data)
    if isinstance(budget, Latency):
        _check_alone(data)
    statistics, trial = _statistics(captured, data, budget)
    if statistics is not None:
        statistics.check([site.path for site in captured.sites])
    strategy = replace(strategy, statistics=statistics)
    if isinstance(strategy, Requested):
        return Chosen(selected.plan(captured, strategy), statistics, {})
    make: Callable[[WithinBudget], Plan] = partial(selected.plan, captured)
    if isinstance(budget, Latency):
        make, strategy, budget = _clocked(captured, strategy, selected, budget)

    def plan_for(some: Budget) -> Plan:
        made = make(replace(strategy, budget=some))
        if trial is None:
            return made
        even = make(replace(strategy, budget=some, evenness=_EVEN))
        if trial.is_clear(even, made):
            made = replace(even, front=made.front)
        return replace(made, measured=trial(made)) if trial.on_others else made

    if isinstance(budget, Loss):
        best = _cheapest_within(budget.nats, plan_for, Params if captured.macs is None else Macs)
    else:
        assert budget is not None
        best = plan_for(budget)
    return Chosen(best, statistics, {} if trial is None else trial.decomposed)


def _clocked(
    captured: Captured, strategy: WithinBudget, selected: Selected, budget: Latency
) -> tuple[Callable[[WithinBudget], Plan], WithinBudget, Budget]:
    """What makes plans, with a clock, all of whose times are known; where the machine is under too much load for that,
    a budget of MACs.

    Raises BudgetError.
    """
    form = best_form(captured, compiled=budget.compiled)
    clock = Clock(captured.sites, form.ms, form=form.passes, undecided=form.undecided, compiled=budget.compiled)
    selected.plan(captured, replace(strategy, budget=Params(1.0), clock=clock))
    clock.save()
    rival = Rival(captured, clock.form, compiled=budget.compiled)
    clock.network = min(form.ms, rival.milliseconds())  # at the pace at which its convolutions were measured
    make = partial(replace(selected, form=clock.form, ms=clock.network).plan, captured)
    if not clock.noisy:
        return Rehearsal(captured, clock, rival, make), replace(strategy, clock=clock), budget
    share = min(1.0, budget.allowed(Cost(0, None, clock.network)) / clock.network)
    warnings.warn(
        f"the machine is under load, times spread too much to plan by: the budget is {share:.2f} of the MACs instead. "
        "Try again when it is idle.",
        stacklevel=4,
    )
    return make, strategy, Macs(share)


def _cheapest_within(nats: float, plan_for: Callable[[Budget], Plan], unit: type[Macs | Params]) -> Plan:
    """The cheapest of the plans for shares of the dense cost, 0 … 1, whose measured loss is within ``nats``; found by
    halving, to a 256th of the way between its cheapest network and the dense one.
    """
    dense = plan_for(unit(1.0))
    network = dense.network.macs or dense.network.params
    cheapest = dense.front[0].cost if dense.front else dense.network
    low, high = (cheapest.macs or cheapest.params) / network, 1.0
    best = dense
    if not _within(dense, nats):  # even what costs next to nothing by prediction
        for decision in dense.rewrites:
            best = best.edited(decision.path, skip="the loss cannot bear it")
        best = replace(best, measured=0.0)
    for _ in range(_HALVINGS if dense.front else 0):
        middle = (low + high) / 2
        plan = plan_for(unit(middle))
        if _within(plan, nats):
            best, high = plan, middle
        else:
            low = middle
    return best


def _within(plan: Plan, nats: float) -> bool:
    return plan.measured is not None and plan.measured <= nats


def _check_alone(data: Data) -> None:
    """Raise ArgumentError where several processes are to plan one network together, each by a clock of its own."""
    together = data.held_out is not None or not isinstance(data.calibration, Statistics | None)
    if together and place_among_processes()[1] > 1:
        raise ArgumentError(
            "each process measures times of its own, and would plan another network. Plan in one, from "
            "fxfact.Statistics that all have calibrated, and load its plan in the others."
        )


def _check_likelihood(data: Data) -> None:
    """Raise ArgumentError for one that nothing would be made of, CalibrationError for one that is none."""
    own = data.calibration.likelihood if isinstance(data.calibration, Statistics) else None
    known = known_likelihood(data.likelihood)
    if known is not None and data.held_out is None and (data.calibration is None or own not in (None, known.name)):
        raise ArgumentError(
            f"likelihood={data.likelihood!r} says what outputs mean for batches, and there are none"
            + (f"; the statistics are of {own!r}. Calibrate again." if own else ": pass calibration.")
        )


def _statistics(captured: Captured, data: Data, budget: Budget | Loss | None) -> tuple[Statistics | None, Trial | None]:
    """The statistics, and what measures plans for a budget, if there is data to measure on: what is held out, or else
    every fourth batch of what is learned from. Raises CalibrationError.
    """
    given, request = data.calibration, data.likelihood
    if isinstance(given, Statistics) and request is None:
        request = given.likelihood
    kept, held_out = _batches(captured, data, budget)
    seen = held_out
    if budget is not None and isinstance(kept, list) and not held_out and not callable(request):
        seen = held_out_of(kept)[1] if len(kept) > 1 else kept
    original = ReferenceOutputs(evaluated(private_copy(captured.network)), seen, request) if seen else None
    statistics = given if isinstance(given, Statistics) else None
    if kept is not None:
        statistics = calibrate(captured, kept, likelihood=request, progress=data.decomposing.progress)
    if statistics is None or original is None:
        return statistics, None
    return statistics, Trial(captured, statistics, original, data.decomposing, on_others=bool(held_out))


def _batches(
    captured: Captured, data: Data, budget: Budget | Loss | None
) -> tuple[Batches | None, list[ExampleInputs]]:
    """Those to calibrate on, None where there are statistics or no data, a list for a budget; and those held out, by
    the caller or for a bound on the loss.
    """

    def listed(batches: Batches, name: str) -> list[ExampleInputs]:
        return list(arguments_for(captured.network, batches, captured.example_inputs, name=name))

    given, needed = data.calibration, isinstance(budget, Loss)
    kept = None if isinstance(given, Statistics) else given
    held_out = [] if data.held_out is None else listed(data.held_out, "held_out")
    if kept is not None and budget is not None:
        kept = listed(kept, "calibration")
        if needed and not held_out:
            kept, held_out = held_out_of(kept)
    if held_out and given is None:
        raise CalibrationError("held_out is only measured on: pass calibration, other batches to learn from, as well")
    if needed and not held_out:
        raise CalibrationError(
            "a loss is measured on batches of its own: pass two or more as calibration, or fxfact.Statistics and "
            "held_out=batches"
        )
    return kept, held_out
