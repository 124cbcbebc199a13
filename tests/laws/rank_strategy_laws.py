"""The laws of a rank strategy, as a test class to inherit from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.conv import Cost, Skip
from fxfact.errors import ArgumentError, BudgetError
from fxfact.planning import (
    Allocation,
    Candidate,
    Choice,
    ParetoPoint,
    PlanDraft,
    RankStrategy,
    SearchScope,
    build_plan,
    draft_plan,
)


class ManyLayers(nn.Module):
    """Plain, strided, grouped, depthwise, pointwise and transposed convolutions, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 24, 3, stride=2, groups=2)
        self.pointwise = nn.Conv2d(24, 32, 1)
        self.up = nn.ConvTranspose2d(32, 16, 3, stride=2)
        self.tied, self.dilated = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, dilation=2, bias=False)
        self.dilated.weight = self.tied.weight
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.plain(x))))
        x = torch.relu(self.up(torch.relu(self.pointwise(x))))
        return self.head(self.depthwise(torch.relu(self.dilated(torch.relu(self.tied(x))))).mean((2, 3)))


@cache  # all laws use one model, which no strategy may change
def make_model() -> ManyLayers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ManyLayers().eval()


@cache
def make_draft() -> PlanDraft:
    return draft_plan(capture(make_model(), torch.zeros(1, 3, 13, 13)), SearchScope())


def cost_after(candidates: Sequence[Candidate], allocation: Allocation, network: Cost) -> Cost:
    """The cost of the network with the chosen chains, with its milliseconds if those of all chains are known."""
    for candidate, choice in zip(candidates, allocation.choices, strict=True):
        if isinstance(choice, Choice):
            chain, dense = candidate.cost(choice.factorization, choice.rank), candidate.dense_cost
            if network.ms is not None and choice.latencies_ms is not None:
                dense_ms, chain_ms = choice.latencies_ms
                chain, dense = Cost(chain.params, chain.macs, chain_ms), Cost(dense.params, dense.macs, dense_ms)
            network = network + chain - dense
    return network


class RankStrategyLaws:
    """Inherit from this class, and say how the strategy is made. All laws become tests of your class.

    Override ``check_allocation`` if the strategy promises more: a budget, or a share of each layer.
    """

    def make(self, model: nn.Module, draft: PlanDraft) -> RankStrategy:
        raise NotImplementedError

    def check_allocation(self, draft: PlanDraft, allocation: Allocation) -> None:
        """Check what the strategy promises."""

    @pytest.fixture
    def model(self) -> nn.Module:
        return make_model()

    @pytest.fixture
    def draft(self, model: nn.Module) -> PlanDraft:
        return make_draft()

    def test_strategy_answers_for_each_candidate_in_order(self, model: nn.Module, draft: PlanDraft) -> None:
        strategy = self.make(model, draft)
        for candidates in (draft.candidates, draft.candidates[::-1]):
            choices = strategy.choose(candidates, draft.network).choices
            assert len(choices) == len(candidates)
            assert any(isinstance(choice, Choice) for choice in choices)
            for candidate, choice in zip(candidates, choices, strict=True):
                if isinstance(choice, Skip):
                    assert choice.reason
                else:
                    assert choice.factorization.rejects(candidate.spec) is None

    def test_strategy_chooses_only_feasible_ranks(self, model: nn.Module, draft: PlanDraft) -> None:
        for candidate, choice in zip(
            draft.candidates, self.make(model, draft).choose(draft.candidates, draft.network).choices, strict=True
        ):
            if isinstance(choice, Choice):
                for spec, _ in candidate.calls:
                    largest = choice.factorization.max_rank(spec)
                    assert all(1 <= rank <= most for rank, most in zip(choice.rank, largest, strict=True))
                    assert len(choice.factorization.layout(spec, choice.rank)) >= 1  # raises for another rank
                chain = choice.factorization.decompose(candidate.layer, choice.rank)
                assert chain.specs == choice.factorization.layout(candidate.spec, choice.rank)

    def test_plan_never_grows(self, model: nn.Module, draft: PlanDraft) -> None:
        plan = build_plan(draft.captured, self.make(model, draft), draft.scope)
        assert plan.rewrites
        assert not plan.after.exceeds(plan.network)
        for group in draft.groups:
            decisions = [plan[path] for path in group]
            before = sum((decision.before for decision in decisions), Cost(0, 0))
            after = sum((decision.after for decision in decisions), Cost(0, 0))
            assert not after.exceeds(before)

    def test_strategy_is_deterministic_and_uses_no_random_numbers(self, model: nn.Module, draft: PlanDraft) -> None:
        strategy, state = self.make(model, draft), torch.get_rng_state()
        first = strategy.choose(draft.candidates, draft.network)
        assert torch.get_rng_state().equal(state)
        torch.rand(5)
        assert strategy.choose(draft.candidates, draft.network) == first
        assert self.make(model, draft).choose(draft.candidates, draft.network) == first

    def test_strategy_leaves_its_arguments_unchanged(self, model: nn.Module, draft: PlanDraft) -> None:
        weights = [candidate.layer.weight.detach().clone() for candidate in draft.candidates]
        decisions, network = draft.decisions, copy.copy(draft.network)
        self.make(model, draft).choose(draft.candidates, draft.network)
        assert all(w.equal(c.layer.weight) for w, c in zip(weights, draft.candidates, strict=True))
        assert all(candidate.layer.weight.grad is None for candidate in draft.candidates)
        assert (draft.decisions, draft.network) == (decisions, network)

    def test_strategy_keeps_its_promise(self, model: nn.Module, draft: PlanDraft) -> None:
        allocation = self.make(model, draft).choose(draft.candidates, draft.network)
        self.check_allocation(draft, allocation)

    def test_plan_has_the_choices_of_the_strategy(self, model: nn.Module, draft: PlanDraft) -> None:
        strategy = self.make(model, draft)
        plan = build_plan(draft.captured, strategy, draft.scope)
        assert plan.uses_statistics == strategy.uses_statistics
        choices = strategy.choose(draft.candidates, draft.network).choices
        for group, choice in zip(draft.groups, choices, strict=True):
            for decision in (plan[path] for path in group):
                if isinstance(choice, Skip):
                    assert decision.reason == choice.reason
                elif decision.factorization is not None:
                    assert (decision.factorization, decision.rank) == (choice.factorization, choice.rank)
        statistics = getattr(strategy, "statistics", None)
        small = fxfact.apply(plan, model, calibration=statistics)
        assert sum(parameter.numel() for parameter in small.parameters()) == plan.after.params

    def test_pareto_points_are_ordered(self, model: nn.Module, draft: PlanDraft) -> None:
        points: Sequence[ParetoPoint] = self.make(model, draft).choose(draft.candidates, draft.network).pareto_points
        increases = [point.predicted_loss_increase for point in points]
        assert increases == sorted(increases, reverse=True)
        assert all(not point.cost.exceeds(draft.network) for point in points)

    def test_strategy_without_candidates_chooses_nothing_or_refuses_the_request(
        self, model: nn.Module, draft: PlanDraft
    ) -> None:
        try:
            allocation = self.make(model, draft).choose([], draft.network)
        except (ArgumentError, BudgetError):  # a pattern fits nothing, or the network as it is exceeds the budget
            return
        assert (allocation.choices, allocation.pareto_points) == ((), ())
