"""Plans for budgets by what is known of the layers, and the choice between some of them by their loss on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fxfact.conv import Cost
from fxfact.errors import AccuracyWarning
from fxfact.planning import Budget, LayerOptions, Plan, PlanDraft, allocate
from fxfact.search.plan_loss import PlanLoss
from fxfact.utils import warn_caller

_USUAL_NORMALIZATION = 0.5  # of ``allocate``
_EVEN_NORMALIZATION = 1.0  # spreads the loss increases more evenly over the layers
_TRUSTED_FACTOR = 3.0  # between the measured and the predicted loss increase
_NEGLIGIBLE_NATS = 1e-3  # measured increases below it contradict nothing
_CORRECTIONS = 3  # of the predictions, at most
_MEASURED_LAYERS = 8  # for each correction

Factors = Mapping[str, float]  # for the loss increases of layers, by path
Propose = Callable[[Budget, float, Factors], Plan]  # for a budget and a normalization
_NO_FACTORS: Factors = {}


@dataclass(frozen=True, eq=False)
class PlanProposer:
    """Proposes plans for budgets. Everything expensive was computed before; a proposal is one allocation.

    Attributes:
        draft: the plan before ranks are chosen.
        layers: what could become of each candidate.
        network: the cost of the whole dense network.
        uses_statistics: whether the options assume that chains are fitted in the metric of statistics.
        inference_passes: the exact passes that follow, if the network will only be run.
    """

    draft: PlanDraft
    layers: tuple[LayerOptions, ...]
    network: Cost
    uses_statistics: bool
    inference_passes: tuple[str, ...] = ()

    def propose(
        self, budget: Budget, normalization: float = _USUAL_NORMALIZATION, factors: Factors = _NO_FACTORS
    ) -> Plan:
        """Return the plan for a budget. Raises BudgetError if no network meets it."""
        paths = [candidate.path for candidate in self.draft.candidates]
        layers = [layer.scaled(factors.get(path, 1.0)) for path, layer in zip(paths, self.layers, strict=True)]
        allocation = allocate(layers, self.network, budget, normalization)
        plan = self.draft.to_plan(allocation, uses_statistics=self.uses_statistics)
        return replace(plan, network=self.network, inference_passes=self.inference_passes)


def best_plan(budget: Budget, propose: Propose, plan_loss: PlanLoss | None) -> Plan:
    """Return the plan that is expected to be best, or one that measures clearly better.

    A more even plan is tried. If the loss on data is more than three times the predicted one, the layers that should
    matter most are measured one by one, their predictions are corrected, and the search goes on from there.
    """
    plan = propose(budget, _USUAL_NORMALIZATION, _NO_FACTORS)
    if plan_loss is None:
        return plan
    even = propose(budget, _EVEN_NORMALIZATION, _NO_FACTORS)
    normalization, best = _USUAL_NORMALIZATION, plan
    if plan_loss.is_clearly_better(even, plan):
        normalization, best = _EVEN_NORMALIZATION, even
    factors: dict[str, float] = {}
    for _ in range(_CORRECTIONS):
        if not _contradicts(plan_loss.mean(best), best.predicted_loss_increase):
            break
        factors |= _measured_factors(best, factors, plan_loss)
        corrected = propose(budget, normalization, factors)
        if not plan_loss.is_clearly_better(corrected, best):
            break
        best = corrected
    return measured(replace(best, pareto_points=plan.pareto_points), plan_loss)


def measured(plan: Plan, plan_loss: PlanLoss | None) -> Plan:
    """Return the plan with its loss increase on the data, if there is something to measure it with."""
    if plan_loss is None:
        return plan
    plan_loss.finish(plan)
    increase = plan_loss.mean(plan)
    return replace(plan, measured_loss_increase=increase, measured_on_held_out=plan_loss.on_held_out)


def warn_if_contradicted(plan: Plan) -> None:
    """Warn if the loss of a plan measured much more than predicted."""
    predicted, measured = plan.predicted_loss_increase, plan.measured_loss_increase
    if measured is not None and _contradicts(measured, predicted):
        warn_caller(
            f"the loss grows by {measured:.3g} nats on the data, and {predicted:.3g} were predicted. Check the network "
            "on your own metric, or pass a larger budget or more data.",
            AccuracyWarning,
        )


def _contradicts(measured: float, predicted: float | None) -> bool:
    """Return whether the measured increase is much larger than the predicted one."""
    return predicted is not None and measured > max(_TRUSTED_FACTOR * predicted, _NEGLIGIBLE_NATS)


def _measured_factors(plan: Plan, factors: Factors, plan_loss: PlanLoss) -> dict[str, float]:
    """Return the factors for the predictions of the layers that should matter most, measured one by one."""
    leaders = [decision for decision in plan.rewrites if decision.tied_to is None]
    leaders.sort(key=lambda decision: -(decision.predicted_loss_increase or 0.0))
    found = {}
    for decision in leaders[:_MEASURED_LAYERS]:
        predicted = decision.predicted_loss_increase
        if predicted:
            ratio = plan_loss.mean_alone(plan, decision.path) / predicted
            found[decision.path] = factors.get(decision.path, 1.0) * max(1.0, ratio)
    return found
