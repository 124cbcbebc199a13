"""Every rank strategy satisfies the laws. A new one gets a class here that says how it is made."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import fxfact
from fxfact.capture import capture
from fxfact.conv import Cost, Skip
from fxfact.factorizations import FACTORIZATIONS, Factorization
from fxfact.factorizations.matrix_svd import ChannelSVD
from fxfact.planning import (
    Allocation,
    Budget,
    BudgetAllocator,
    ByPath,
    Candidate,
    Choice,
    FixedRanks,
    Layout,
    PlanDraft,
    RankStrategy,
    SearchScope,
    draft_plan,
    parse_factorizations,
)
from tests.laws.rank_strategy_laws import RankStrategyLaws, cost_after, make_model
from tests.support import quick

METHODS: list[Factorization] = [quick(kind()) for kind in FACTORIZATIONS]
CURVES = fxfact.ErrorCurveCache()  # all tests allocate for the same layers


# Fixed ranks


class TestFixedRanksForAShareOfTheParameters(RankStrategyLaws):
    def make(self, model: nn.Module, draft: PlanDraft) -> RankStrategy:
        return FixedRanks.parse(METHODS, 0.4)

    def check_allocation(self, draft: PlanDraft, allocation: Allocation) -> None:
        for candidate, choice in zip(draft.candidates, allocation.choices, strict=True):
            if isinstance(choice, Choice):
                (spec, sizes), *_ = candidate.calls
                alone = Candidate(candidate.path, candidate.layer, ((spec, sizes),))
                assert alone.cost(choice.factorization, choice.rank).params <= 0.4 * alone.dense_cost.params


class TestFixedRanksForAnInt(RankStrategyLaws):
    def make(self, model: nn.Module, draft: PlanDraft) -> RankStrategy:
        return FixedRanks.parse(["channel_svd", "svd"], {"*": 99, "plain": 2})

    def check_allocation(self, draft: PlanDraft, allocation: Allocation) -> None:
        plain, *others = (choice for choice in allocation.choices if isinstance(choice, Choice))
        assert (plain.rank, plain.note) == ((2,), "")
        assert all("rank 99 lowered" in choice.note for choice in others)


class TestFixedRanksThatAreMultiples(RankStrategyLaws):
    def make(self, model: nn.Module, draft: PlanDraft) -> RankStrategy:
        return FixedRanks.parse("tucker", 0.5, multiple=4)

    def check_allocation(self, draft: PlanDraft, allocation: Allocation) -> None:
        for candidate, choice in zip(draft.candidates, allocation.choices, strict=True):
            if isinstance(choice, Choice):
                largest = choice.factorization.max_rank(candidate.spec)
                assert all(r % 4 == 0 or r == most for r, most in zip(choice.rank, largest, strict=True))


class TestEnergy(RankStrategyLaws):
    def make(self, model: nn.Module, draft: PlanDraft) -> RankStrategy:
        return FixedRanks.parse(["tucker", "svd"], fxfact.ranks.Energy(0.3))


class TestVBMF(RankStrategyLaws):
    """On kernels of rank 2 with little noise, because VBMF finds no rank in noise alone."""

    @pytest.fixture
    def model(self) -> nn.Module:
        model = copy.deepcopy(make_model())
        for parameter in model.parameters():
            matrix = parameter.detach().flatten(1) if parameter.ndim > 1 else parameter.detach()[:, None]
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            parameter.data = ((u[:, :2] * s[:2]) @ v[:2] + 1e-3 * matrix).reshape(parameter.shape)
        return model

    @pytest.fixture
    def draft(self, model: nn.Module) -> PlanDraft:
        return draft_plan(capture(model, torch.zeros(1, 3, 13, 13)), SearchScope())

    def make(self, model: nn.Module, draft: PlanDraft) -> RankStrategy:
        return FixedRanks.parse("channel_svd", fxfact.ranks.VBMF())


class TestLargestThatPays(RankStrategyLaws):
    def make(self, model: nn.Module, draft: PlanDraft) -> RankStrategy:
        return FixedRanks.parse(["spatial_svd", "svd"], fxfact.ranks.LargestThatPays())


# Budgets


class BudgetLaws(RankStrategyLaws):
    """The laws, and that the budget is met."""

    budget: Budget

    def options(self, model: nn.Module, draft: PlanDraft) -> dict[str, Any]:
        return {}

    def network(self, draft: PlanDraft) -> Cost:
        return draft.network

    def make(self, model: nn.Module, draft: PlanDraft) -> RankStrategy:
        methods = ByPath.parse(METHODS, parse_factorizations)
        options = self.options(model, draft)
        return BudgetAllocator(budget=self.budget, factorizations=methods, error_curves=CURVES, **options)

    def check_allocation(self, draft: PlanDraft, allocation: Allocation) -> None:
        network = self.network(draft)
        amount = self.budget.amount(cost_after(draft.candidates, allocation, network))
        assert amount <= self.budget.allowed(network)
        assert amount > 0.8 * self.budget.allowed(network)  # most of it is used
        assert len(allocation.pareto_points) > 5


class TestMacs(BudgetLaws):
    budget = fxfact.Macs(0.6)


class TestParams(BudgetLaws):
    budget = fxfact.Params(0.6)


class TestMacsAtMost(BudgetLaws):
    budget = fxfact.Macs(at_most=500_000)


class TestMacsWithMultiples(BudgetLaws):
    budget = fxfact.Macs(0.7)

    def options(self, model: nn.Module, draft: PlanDraft) -> dict[str, Any]:
        return {"multiple": 4, "normalization": 1.0}


@cache
def statistics() -> fxfact.Statistics:
    batches = torch.randn(8, 3, 13, 13, generator=torch.Generator().manual_seed(1)).split(4)
    return fxfact.calibrate(make_model(), batches)


class TestMacsWithStatistics(BudgetLaws):
    budget = fxfact.Macs(0.6)

    def options(self, model: nn.Module, draft: PlanDraft) -> dict[str, Any]:
        return {"statistics": statistics()}


class LatencyByMacs:
    """A million multiply-accumulates take a millisecond; stages take 0.01 ms more."""

    def __init__(self, draft: PlanDraft) -> None:
        assert draft.network.macs is not None
        self.network_ms = draft.network.macs / 1e6
        self._candidates = {candidate.path: candidate for candidate in draft.candidates}

    def latencies_ms(self, path: str, layouts: Sequence[Layout]) -> list[float]:
        return [self._latency_ms(self._candidates[path], layout) for layout in layouts]

    def _latency_ms(self, candidate: Candidate, layout: Layout) -> float:
        total = 0.0
        for spec, sizes in candidate.calls:
            for size in sizes or ():
                for stage in layout(spec):
                    total += stage.macs(size) / 1e6 + 0.01
                    size = stage.output_size(size)  # noqa: PLW2901
        return total


class TestLatency(BudgetLaws):
    budget = fxfact.Latency(0.8)

    def options(self, model: nn.Module, draft: PlanDraft) -> dict[str, Any]:
        return {"latency_model": LatencyByMacs(draft)}

    def network(self, draft: PlanDraft) -> Cost:
        return Cost(draft.network.params, draft.network.macs, LatencyByMacs(draft).network_ms)


# A strategy of one's own


class HalfOfTheParameters(RankStrategy):
    """Channel SVD at half of the parameters, for layers whose path is not the first one."""

    def choose(self, candidates: Sequence[Candidate], network: Cost) -> Allocation:
        return Allocation(tuple(self._choose_one(candidate) for candidate in candidates))

    def _choose_one(self, candidate: Candidate) -> Choice | Skip:
        method = ChannelSVD()
        refused = method.rejects(candidate.spec)
        rank = None if refused else method.rank_within(candidate.spec, 0.5)
        return Choice(method, rank) if rank else refused or Skip("even rank 1 has more than half of the parameters")


class TestStrategyOfOnesOwn(RankStrategyLaws):
    def make(self, model: nn.Module, draft: PlanDraft) -> RankStrategy:
        return HalfOfTheParameters()
