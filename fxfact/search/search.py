"""From a budget to a plan: statistics, candidates, then a loop that proposes a plan, measures it, and decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from fxfact.calibration import (
    READING_SAMPLES,
    Batches,
    CustomLoss,
    DivergenceEvaluator,
    Statistics,
    collect_statistics,
    iter_batches,
    own_likelihood,
    rank_and_world_size,
    resolve_likelihood,
    samples_of_all_processes,
    split_held_out,
)
from fxfact.capture import Captured, ExampleInputs
from fxfact.errors import ArgumentError, CalibrationError
from fxfact.finetune import refit as refit_network
from fxfact.passes import DecomposeOptions, Decomposition
from fxfact.planning import (
    Budget,
    BudgetAllocator,
    FixedRanks,
    Latency,
    Loss,
    Macs,
    MeasuredPoint,
    Metric,
    Params,
    Plan,
    PlanDraft,
    SearchScope,
    draft_plan,
)
from fxfact.search.cheapest import CostOfIncrease, Limit, cheapest_within
from fxfact.search.latency_plan import LatencyPlanner
from fxfact.search.metric_drop import MetricDrop, Refit
from fxfact.search.plan_loss import PlanLoss
from fxfact.search.propose import PlanProposer, best_plan, measured, warn_if_contradicted
from fxfact.utils import alias_copy, to_eval

_LOSS_TRIALS = 8  # plans measured for a bound on the loss


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """The data that a caller gave.

    Attributes:
        calibration: batches to learn from, or statistics that were collected before.
        held_out: batches to measure on.
        likelihood: what the outputs mean, as for ``fxfact.plan``.
    """

    calibration: Batches | Statistics | None = None
    held_out: Batches | None = None
    likelihood: object = None


class SearchResult(NamedTuple):
    """The plan, the statistics that it uses, and the kernels that were decomposed to measure it.

    ``refit`` refits its network, if the networks that were measured had been refitted.
    """

    plan: Plan
    statistics: Statistics | None
    decompositions: Mapping[str, Decomposition]
    refit: Refit | None = None


@torch.inference_mode(False)  # nothing can be fitted in inference mode
def search(
    captured: Captured,
    strategy: FixedRanks | BudgetAllocator,
    scope: SearchScope,
    data: CalibrationData,
    *,
    options: DecomposeOptions,
    bound: Loss | Metric | None = None,
) -> SearchResult:
    """Find the plan for fixed ranks or for a budget.

    Args:
        captured: the network.
        strategy: fixed ranks, or what chooses ranks within its budget.
        scope: which layers may change.
        data: the caller's data.
        options: how kernels are decomposed in order to measure plans.
        bound: find the cheapest network within this bound on the loss, or on the caller's metric. The strategy's budget
            then only says in which unit the cost is counted.

    Raises:
        ArgumentError, BudgetError, CalibrationError, CaptureError, MetricError, RankError, TimingError, WeightError.
    """
    loss = bound if isinstance(bound, Loss) else None
    _check_requests(strategy, data, scope, has_metric=isinstance(bound, Metric))
    if data.calibration is not None or data.held_out is not None:
        captured.check_sites()

    # Candidates: the layers that may change. A budget that they cannot meet is refused before anything expensive.
    draft = draft_plan(captured, scope)
    budget = strategy.budget if isinstance(strategy, BudgetAllocator) and loss is None else None
    if isinstance(strategy, BudgetAllocator) and budget is not None and not isinstance(budget, Latency):
        draft.check_reach(budget)
        strategy.check_budget(draft.candidates, draft.network, draft.why_unread)

    # Statistics: given by the caller, or collected from the caller's batches. The original is measured first, so that
    # metrics that fail, and outputs that cannot be measured, are refused before the expensive part.
    batches = _split_batches(captured, data, has_budget=bool(budget or loss), needs_held_out=loss is not None)
    metric_drop = _metric_drop(bound, captured, draft, data, batches, options) if isinstance(bound, Metric) else None
    plan_network = to_eval(alias_copy(captured.network)) if batches.measuring else None
    evaluator = None if plan_network is None else _evaluator(plan_network, data, batches)
    latency_planner = _latency_planner(captured, draft, strategy)
    statistics = _statistics(captured, data, batches, evaluator, options)

    # Fixed ranks, or propose, measure, decide.
    plan_loss = None
    if plan_network is not None and evaluator is not None and statistics is not None:
        plan_loss = PlanLoss(captured, plan_network, statistics, evaluator, options, on_held_out=batches.held_out)
    decompositions = {} if plan_loss is None else plan_loss.decompositions
    strategy = replace(strategy, statistics=statistics)
    if isinstance(strategy, FixedRanks):
        plan = measured(_fixed_plan(draft, strategy), plan_loss)
    elif metric_drop is not None:
        proposer = _proposer(draft, strategy) if latency_planner is None else latency_planner.proposer(strategy)
        limit = metric_drop.limit(statistics, decompositions)
        plan = _cheapest_plan(limit, proposer, type(strategy.budget), plan_loss)
        plan = replace(plan, measured_points=metric_drop.points_beside(plan.network))
        plan = plan if latency_planner is None else latency_planner.as_measured(plan, strategy)
    else:
        plan = _plan_by_data(draft, strategy, latency_planner, plan_loss, loss)
        warn_if_contradicted(plan)
    refit = None if metric_drop is None else metric_drop.refit
    return SearchResult(_with_data(plan, statistics), statistics, decompositions, refit)


def _evaluator(network: nn.Module, data: CalibrationData, batches: _SplitBatches) -> DivergenceEvaluator:
    """Read the outputs from the batches to learn from, and run the network on the batches to measure on."""
    readable = batches.learning if isinstance(batches.learning, list) else batches.measuring
    first = samples_of_all_processes(readable, READING_SAMPLES)
    return DivergenceEvaluator(network, batches.measuring, resolve_likelihood(_likelihood(data), network, first))


def _with_data(plan: Plan, statistics: Statistics | None) -> Plan:
    """Return the plan with what the statistics know about the data and the outputs."""
    return plan if statistics is None else replace(plan, samples=statistics.samples, outputs=statistics.outputs)


def _latency_planner(
    captured: Captured, draft: PlanDraft, strategy: FixedRanks | BudgetAllocator
) -> LatencyPlanner | None:
    """Return the planner for a budget of milliseconds, which is checked. Raises BudgetError."""
    if not isinstance(strategy, BudgetAllocator) or not isinstance(strategy.budget, Latency):
        return None
    planner = LatencyPlanner(captured, draft, strategy.budget)
    planner.check_budget(strategy)
    return planner


def _fixed_plan(draft: PlanDraft, fixed: FixedRanks) -> Plan:
    allocation = fixed.choose(draft.candidates, draft.network)
    return draft.to_plan(allocation, uses_statistics=fixed.uses_statistics)


def _plan_by_data(
    draft: PlanDraft,
    allocator: BudgetAllocator,
    latency_planner: LatencyPlanner | None,
    plan_loss: PlanLoss | None,
    loss: Loss | None,
) -> Plan:
    """Return the plan for a budget, or the cheapest one within a bound on the loss."""
    if latency_planner is not None:
        return latency_planner.plan(allocator, plan_loss)
    if loss is None:
        allocator.check_budget(draft.candidates, draft.network)  # again: no gradient may have reached some layers
        return best_plan(allocator.budget, _proposer(draft, allocator).propose, plan_loss)
    limit = Limit(_measured_loss, loss.nats, _LOSS_TRIALS, slope=1.0, subject="loss")
    unit = Params if draft.network.macs is None else Macs
    return _cheapest_plan(limit, _proposer(draft, allocator), unit, plan_loss)


def _measured_loss(plan: Plan) -> float:
    return math.inf if plan.measured_loss_increase is None else plan.measured_loss_increase


def _proposer(draft: PlanDraft, allocator: BudgetAllocator) -> PlanProposer:
    layers = allocator.layer_options(draft.candidates)
    return PlanProposer(draft, layers, draft.network, allocator.uses_statistics)


def _cheapest_plan(limit: Limit, proposer: PlanProposer, unit: type[Budget], plan_loss: PlanLoss | None) -> Plan:
    """Return the cheapest plan that measures within a limit, or one without rewrites."""
    points: list[MeasuredPoint] = []

    def plan_at(share: float) -> Plan:
        budget = unit(min(share * (1 + 1e-9), 1.0))  # not less than the front's cheapest network, by rounding
        plan = best_plan(budget, proposer.propose, plan_loss)
        if plan.measured_loss_increase is not None:
            points.append(MeasuredPoint(plan.after, plan.predicted_loss_increase, plan.measured_loss_increase))
        return plan

    whole = proposer.propose(unit(1.0))
    if not whole.pareto_points:
        return plan_at(1.0)
    found = cheapest_within(limit, CostOfIncrease(whole.pareto_points, whole.network, unit), plan_at)
    if found is None or not found.rewrites:
        dense = proposer.draft.dense_plan(f"the {limit.subject} cannot bear it")
        found = replace(whole, decisions=dense.decisions, measured_loss_increase=None if plan_loss is None else 0.0)
    return replace(found, measured_points=tuple(points))


def _check_requests(
    strategy: FixedRanks | BudgetAllocator, data: CalibrationData, scope: SearchScope, *, has_metric: bool
) -> None:
    """Raise ArgumentError or CalibrationError for arguments that would have no effect or cannot work together."""
    own_likelihood(data.likelihood)  # refuses what is none
    if data.likelihood is not None and data.held_out is None and isinstance(data.calibration, Statistics | None):
        raise ArgumentError(
            "likelihood says what outputs mean for batches, and there are none"
            + (": pass calibration." if data.calibration is None else ". The statistics know it. Remove it.")
        )
    has_batches = data.held_out is not None or not isinstance(data.calibration, Statistics | None)
    has_latency = isinstance(strategy, BudgetAllocator) and isinstance(strategy.budget, Latency)
    if has_latency and scope.joint:
        raise ArgumentError(
            "joint: layers that share stages save parameters, but no time. Pass a budget of parameters, such as "
            "fxfact.Params(0.5), or leave joint out."
        )
    if has_latency and (has_batches or has_metric) and rank_and_world_size()[1] > 1:
        raise ArgumentError(
            "each process measures times of its own, and would plan another network. Plan in one process, from "
            "fxfact.Statistics that all processes have calibrated, and load its plan in the others."
        )


@dataclass(frozen=True, eq=False)
class _SplitBatches:
    """The caller's batches by use.

    Attributes:
        learning: to collect statistics from. None if there are statistics, or no data.
        measuring: to measure plans on. Empty if plans are not measured.
        held_out: whether the batches to measure on are other ones than those to learn from.
    """

    learning: Batches | None
    measuring: Sequence[ExampleInputs]
    held_out: bool


def _split_batches(
    captured: Captured, data: CalibrationData, *, has_budget: bool, needs_held_out: bool
) -> _SplitBatches:
    """Split the caller's batches into those to learn from and those to measure on.

    Plans are measured on the batches that the caller held out. A bound on the loss needs some; without, every fourth
    batch is held out for it. Other budgets measure on every fourth batch, and learn from it as well. For fixed ranks,
    batches are not kept to measure on.
    """
    learning = None if isinstance(data.calibration, Statistics) else data.calibration
    held_out = [] if data.held_out is None else _as_list(captured, data.held_out)
    if learning is not None and has_budget:
        learning = _as_list(captured, learning)
        if needs_held_out and not held_out:
            learning, held_out = split_held_out(learning)
    if held_out and data.calibration is None:
        raise CalibrationError("held_out is only measured on: pass calibration, other batches to learn from, as well")
    if needs_held_out and not held_out:
        raise CalibrationError(
            "a loss is measured on batches of its own: pass two or more as calibration, or fxfact.Statistics and "
            "held_out=batches"
        )
    measuring = held_out
    if isinstance(learning, list) and not held_out and not _is_loss(data.likelihood):
        measuring = split_held_out(learning)[1] if len(learning) > 1 else learning
    return _SplitBatches(learning, measuring, bool(held_out))


def _is_loss(request: object) -> bool:
    """Return whether a likelihood cannot measure: a function of one output."""
    return isinstance(own_likelihood(request), CustomLoss)


def _metric_drop(  # noqa: PLR0917 (each is another part of the call)
    metric: Metric,
    captured: Captured,
    draft: PlanDraft,
    data: CalibrationData,
    batches: _SplitBatches,
    options: DecomposeOptions,
) -> MetricDrop:
    """Measure the dense network by a metric. Raises what ``MetricDrop`` raises, and ArgumentError."""
    refit = _refit_of(captured, data, batches) if metric.refit else None
    return MetricDrop(metric, captured, draft.dense_plan(), options, refit)


def _refit_of(captured: Captured, data: CalibrationData, batches: _SplitBatches) -> Refit:
    """Return what refits networks with the batches to learn from. Raises ArgumentError."""
    if captured.program is not None:
        raise ArgumentError("Metric: refit=True takes a module. Export the network after it was factorized.")
    if batches.learning is None:
        raise ArgumentError("Metric: refit=True needs batches. Pass them as calibration, instead of statistics.")
    options: dict[str, Any] = {"likelihood": data.likelihood, "progress": False}
    return lambda network: refit_network(network, captured.network, cast(Batches, batches.learning), **options)[0]


def _as_list(captured: Captured, batches: Batches) -> list[ExampleInputs]:
    return list(iter_batches(captured.network, batches, captured.example_inputs))


def _likelihood(data: CalibrationData) -> object:
    """Return the likelihood that the caller gave, else the one of the statistics. Raises CalibrationError."""
    if data.likelihood is not None or not isinstance(data.calibration, Statistics):
        return data.likelihood
    known = data.calibration.outputs or data.calibration.likelihood
    if known is None:
        raise CalibrationError(
            "the statistics were collected with a likelihood of your own, which their file does not hold. Pass it as "
            "likelihood=."
        )
    return known


def _statistics(
    captured: Captured,
    data: CalibrationData,
    batches: _SplitBatches,
    evaluator: DivergenceEvaluator | None,
    options: DecomposeOptions,
) -> Statistics | None:
    statistics = data.calibration if isinstance(data.calibration, Statistics) else None
    if batches.learning is not None:
        likelihood = data.likelihood if evaluator is None else evaluator.likelihood
        progress = options.progress
        statistics = collect_statistics(captured, batches.learning, likelihood=likelihood, progress=progress)
    if statistics is not None:
        statistics.check([site.path for site in captured.sites])
    return statistics
