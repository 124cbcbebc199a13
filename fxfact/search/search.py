"""From a budget to a plan: statistics, candidates, then a loop that proposes a plan, measures it, and decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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
from fxfact.passes import DecomposeOptions, Decomposition
from fxfact.planning import (
    BudgetAllocator,
    FixedRanks,
    Latency,
    Loss,
    Macs,
    Params,
    Plan,
    PlanDraft,
    SearchScope,
    draft_plan,
)
from fxfact.search.latency_plan import LatencyPlanner
from fxfact.search.plan_loss import PlanLoss
from fxfact.search.propose import PlanProposer, Propose, best_plan, measured, warn_if_contradicted
from fxfact.utils import alias_copy, to_eval

_HALVINGS = 8


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
    """The plan, the statistics that it uses, and the kernels that were decomposed to measure it."""

    plan: Plan
    statistics: Statistics | None
    decompositions: Mapping[str, Decomposition]


@torch.inference_mode(False)  # nothing can be fitted in inference mode
def search(
    captured: Captured,
    strategy: FixedRanks | BudgetAllocator,
    scope: SearchScope,
    data: CalibrationData,
    *,
    options: DecomposeOptions,
    loss: Loss | None = None,
) -> SearchResult:
    """Find the plan for fixed ranks or for a budget.

    Args:
        captured: the network.
        strategy: fixed ranks, or what chooses ranks within its budget.
        scope: which layers may change.
        data: the caller's data.
        options: how kernels are decomposed in order to measure plans.
        loss: find the cheapest network within this bound on the loss. The strategy's budget then only says in which
            unit the cost is counted.

    Raises:
        ArgumentError, BudgetError, CalibrationError, CaptureError, RankError, TimingError, WeightError.
    """
    _check_requests(strategy, data)
    if data.calibration is not None or data.held_out is not None:
        captured.check_sites()

    # Candidates: the layers that may change. A budget that they cannot meet is refused before anything expensive.
    draft = draft_plan(captured, scope)
    budget = strategy.budget if isinstance(strategy, BudgetAllocator) and loss is None else None
    if isinstance(strategy, BudgetAllocator) and budget is not None and not isinstance(budget, Latency):
        draft.check_reach(budget)
        strategy.check_budget(draft.candidates, draft.network)

    # Statistics: given by the caller, or collected from the caller's batches. The original is run on the batches to
    # measure on first, so that outputs that cannot be measured are refused before the expensive part.
    has_budget = isinstance(strategy, BudgetAllocator)
    batches = _split_batches(captured, data, has_budget=has_budget, needs_held_out=loss is not None)
    plan_network = to_eval(alias_copy(captured.network)) if batches.measuring else None
    evaluator = None if plan_network is None else _evaluator(plan_network, data, batches)
    latency_planner = None
    if isinstance(strategy, BudgetAllocator) and isinstance(budget, Latency):
        latency_planner = LatencyPlanner(captured, draft, budget)
        latency_planner.check_budget(strategy)
    statistics = _statistics(captured, data, batches, evaluator, options)

    # Fixed ranks, or propose, measure, decide.
    plan_loss = None
    if plan_network is not None and evaluator is not None and statistics is not None:
        plan_loss = PlanLoss(captured, plan_network, statistics, evaluator, options, on_held_out=batches.held_out)
    strategy = replace(strategy, statistics=statistics)
    if isinstance(strategy, FixedRanks):
        allocation = strategy.choose(draft.candidates, draft.network)
        plan = measured(draft.to_plan(allocation, uses_statistics=strategy.uses_statistics), plan_loss)
    elif latency_planner is not None:
        plan = latency_planner.plan(strategy, plan_loss)
    else:
        plan = _plan_for_size(captured, draft, strategy, plan_loss, loss)
    warn_if_contradicted(plan)
    decompositions = {} if plan_loss is None else plan_loss.decompositions
    return SearchResult(_with_outputs(plan, statistics), statistics, decompositions)


def _evaluator(network: nn.Module, data: CalibrationData, batches: _SplitBatches) -> DivergenceEvaluator:
    """Read the outputs from the batches to learn from, and run the network on the batches to measure on."""
    readable = batches.learning if isinstance(batches.learning, list) else batches.measuring
    first = samples_of_all_processes(readable, READING_SAMPLES)
    return DivergenceEvaluator(network, batches.measuring, resolve_likelihood(_likelihood(data), network, first))


def _with_outputs(plan: Plan, statistics: Statistics | None) -> Plan:
    """Return the plan with what the statistics know about the outputs."""
    return plan if statistics is None else replace(plan, outputs=statistics.outputs)


def _plan_for_size(
    captured: Captured, draft: PlanDraft, allocator: BudgetAllocator, plan_loss: PlanLoss | None, loss: Loss | None
) -> Plan:
    """Return the plan for a budget of MACs or parameters, or the cheapest one within a bound on the loss."""
    if loss is None:
        allocator.check_budget(draft.candidates, draft.network)  # again: no gradient may have reached some layers
    layers = allocator.layer_options(draft.candidates)
    proposer = PlanProposer(draft, layers, draft.network, allocator.uses_statistics)
    if loss is None:
        return best_plan(allocator.budget, proposer.propose, plan_loss)
    return _cheapest_plan(loss, proposer.propose, plan_loss, Params if captured.macs is None else Macs)


def _cheapest_plan(loss: Loss, propose: Propose, plan_loss: PlanLoss | None, unit: type[Macs | Params]) -> Plan:
    """Return the cheapest plan whose measured loss increase is within the bound.

    The share of the dense cost is found by halving the interval between the cheapest network and the dense one eight
    times.
    """
    dense = best_plan(unit(1.0), propose, plan_loss)
    network = dense.network.macs or dense.network.params
    cheapest = dense.pareto_points[0].cost if dense.pareto_points else dense.network
    low, high = (cheapest.macs or cheapest.params) / network, 1.0
    best = dense
    if not _is_within(dense, loss):  # the loss cannot even bear the rewrites that are expected to cost nothing
        for decision in dense.rewrites:
            best = best.edited(decision.path, skip="the loss cannot bear it")
        best = replace(best, measured_loss_increase=0.0)
    for _ in range(_HALVINGS if dense.pareto_points else 0):
        middle = (low + high) / 2
        plan = best_plan(unit(middle), propose, plan_loss)
        if _is_within(plan, loss):
            best, high = plan, middle
        else:
            low = middle
    return best


def _is_within(plan: Plan, loss: Loss) -> bool:
    return plan.measured_loss_increase is not None and plan.measured_loss_increase <= loss.nats


def _check_requests(strategy: FixedRanks | BudgetAllocator, data: CalibrationData) -> None:
    """Raise ArgumentError or CalibrationError for arguments that would have no effect or cannot work together."""
    own_likelihood(data.likelihood)  # refuses what is none
    if data.likelihood is not None and data.held_out is None and isinstance(data.calibration, Statistics | None):
        raise ArgumentError(
            "likelihood says what outputs mean for batches, and there are none"
            + (": pass calibration." if data.calibration is None else ". The statistics know it. Remove it.")
        )
    has_batches = data.held_out is not None or not isinstance(data.calibration, Statistics | None)
    has_latency = isinstance(strategy, BudgetAllocator) and isinstance(strategy.budget, Latency)
    if has_latency and has_batches and rank_and_world_size()[1] > 1:
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
