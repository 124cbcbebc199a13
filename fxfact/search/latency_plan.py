"""Plans for a budget of milliseconds: layers are timed, then whole networks; by MACs if the machine is too busy."""

from __future__ import annotations

from dataclasses import replace

from fxfact.capture import Captured
from fxfact.conv import Cost
from fxfact.planning import BudgetAllocator, Latency, LayerOptions, Macs, Plan, PlanDraft, least_amount
from fxfact.search.inference import DenseBaseline, best_inference_passes
from fxfact.search.latency_model import MeasuredLatencyModel
from fxfact.search.latency_search import LatencySearch
from fxfact.search.plan_loss import PlanLoss
from fxfact.search.propose import PlanProposer, best_plan
from fxfact.utils import warn_caller

_MAX_ATTEMPTS = 2  # of timing all layers
_CERTAIN_SHARE = 0.7  # of what the fastest chains save alone; networks save so much without a trial


class LatencyPlanner:
    """Makes plans for a budget of milliseconds.

    Args:
        captured: the network. It is timed here, in every exact variant.
        draft: the plan before ranks are chosen.
        budget: the bound.

    Raises:
        BudgetError: if there are no example inputs.
        TimingError: if the network does not run.
    """

    def __init__(self, captured: Captured, draft: PlanDraft, budget: Latency) -> None:
        compiled, timer = budget.compiled, budget.timer
        fastest = best_inference_passes(captured, compiled=compiled, timer=timer)
        self._captured, self._draft, self._budget, self._network_ms = captured, draft, budget, fastest.ms
        self._model = MeasuredLatencyModel(captured.sites, fastest, compiled=compiled, timer=timer)
        self._baseline = DenseBaseline(captured, self._model.passes, compiled=compiled, timer=timer)

    def check_budget(self, allocator: BudgetAllocator) -> None:
        """Raise BudgetError if the network of the fastest chains clearly misses the budget. Computes no errors."""
        layers = replace(allocator, latency_model=self._model).smallest_options(self._draft.candidates)
        network = self._network()
        possible = self._network_ms - least_amount(layers, network, self._budget)
        needed = self._network_ms - self._budget.allowed(network)
        if needed > _CERTAIN_SHARE * possible and not self._model.is_noisy:
            self._network_ms = min(self._network_ms, self._baseline.milliseconds())
            self._search(self._proposer(layers, allocator)).check_reachable(self._budget)

    def plan(self, allocator: BudgetAllocator, plan_loss: PlanLoss | None) -> Plan:
        """Return the plan for the budget, or warn and return the one for a budget of MACs if times cannot be trusted.

        If the times of a network contradict those of its layers, all layers are timed again first.

        Raises:
            BudgetError: if even the network of the fastest chains measures more than the budget.
        """
        for _ in range(_MAX_ATTEMPTS):
            layers = replace(allocator, latency_model=self._model).layer_options(self._draft.candidates)
            self._network_ms = min(self._network_ms, self._baseline.milliseconds())  # at the speed of the layers
            if self._model.is_noisy:
                return self._plan_by_macs(allocator, plan_loss, "spread too much to plan by")
            search = self._search(self._proposer(layers, allocator))
            try:
                plan = best_plan(self._budget, search.propose, plan_loss)
            finally:
                if not search.is_implausible:
                    self._model.save()
            if not search.is_implausible:
                return replace(plan, measured_points=tuple(search.points))
            self._model.forget()
        return self._plan_by_macs(allocator, plan_loss, "of the network contradict those of its layers")

    def proposer(self, allocator: BudgetAllocator) -> PlanProposer:
        """Return what proposes plans by the times of single layers and chains, with a warning if these are inexact."""
        layers = replace(allocator, latency_model=self._model).layer_options(self._draft.candidates)
        self._network_ms = min(self._network_ms, self._baseline.milliseconds())  # at the speed of the layers
        if self._model.is_noisy:
            warn_caller("the machine is under load, so its times are inexact. Try again when it is idle.")
        self._model.save()
        return self._proposer(layers, allocator)

    def as_measured(self, plan: Plan, allocator: BudgetAllocator) -> Plan:
        """Return a plan with milliseconds that agree with those of its network."""
        return self._search(self._proposer((), allocator)).as_measured(plan)

    def _plan_by_macs(self, allocator: BudgetAllocator, plan_loss: PlanLoss | None, why: str) -> Plan:
        share = min(1.0, self._budget.allowed(self._network()) / self._network_ms)
        warn_caller(
            f"the machine is under load, times {why}: the budget is {share:.2f} of the MACs instead. Try again when it "
            "is idle."
        )
        proposer = self._proposer(allocator.layer_options(self._draft.candidates), allocator)
        return best_plan(Macs(share), proposer.propose, plan_loss)

    def _network(self) -> Cost:
        return replace(self._draft.network, ms=self._network_ms)

    def _proposer(self, layers: tuple[LayerOptions, ...], allocator: BudgetAllocator) -> PlanProposer:
        return PlanProposer(self._draft, layers, self._network(), allocator.uses_statistics, self._model.passes)

    def _search(self, proposer: PlanProposer) -> LatencySearch:
        return LatencySearch(self._captured, self._baseline, proposer.propose, self._network_ms)
