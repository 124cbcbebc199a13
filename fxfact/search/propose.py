"""Plans for budgets by what is known of the layers, and the choice between two of them by their loss on data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fxfact.conv import Cost
from fxfact.planning import Budget, LayerOptions, Plan, PlanDraft, allocate
from fxfact.search.plan_loss import PlanLoss

_USUAL_NORMALIZATION = 0.5  # of ``allocate``
_EVEN_NORMALIZATION = 1.0  # spreads the loss increases more evenly over the layers

Propose = Callable[[Budget, float], Plan]  # for a budget and a normalization


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

    def propose(self, budget: Budget, normalization: float = _USUAL_NORMALIZATION) -> Plan:
        """Return the plan for a budget. Raises BudgetError if no network meets it."""
        allocation = allocate(self.layers, self.network, budget, normalization)
        plan = self.draft.to_plan(allocation, uses_statistics=self.uses_statistics)
        return replace(plan, network=self.network, inference_passes=self.inference_passes)


def best_plan(budget: Budget, propose: Propose, plan_loss: PlanLoss | None) -> Plan:
    """Return the plan that is expected to be best, or a more even one if that measures clearly better."""
    plan = propose(budget, _USUAL_NORMALIZATION)
    if plan_loss is None:
        return plan
    even = propose(budget, _EVEN_NORMALIZATION)
    if plan_loss.is_clearly_better(even, plan):
        plan = replace(even, pareto_points=plan.pareto_points)
    return replace(plan, measured_loss_increase=plan_loss.mean(plan)) if plan_loss.on_held_out else plan
