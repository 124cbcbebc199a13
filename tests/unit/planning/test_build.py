"""From a captured network to a plan: the candidates, the selection, and the decisions for an allocation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.conv import ConvSpec, Skip
from fxfact.errors import ArgumentError, BudgetError
from fxfact.factorizations.matrix_svd import ChannelSVD
from fxfact.planning import Allocation, Choice, SearchScope, draft_plan
from tests.support import Small


class Tied(nn.Module):
    """Two convolutions share a weight; the second one has a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 8, 1)
        self.two, self.three = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, bias=False)
        self.three.weight = self.two.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.two(self.one(x))))


# The scope


def test_include_and_exclude_take_globs_and_predicates(small: Small) -> None:
    def rewritten(**selection: object) -> list[str]:
        return [decision.path for decision in fxfact.plan(small, **selection).rewrites]  # type: ignore[arg-type]

    assert rewritten(include="first") == ["first"]
    assert rewritten(include=["f*", "s*"], exclude="*d") == ["first"]
    assert rewritten(exclude=lambda path, spec: spec.stride != (1, 1)) == ["first"]
    assert rewritten(include=lambda path, spec: isinstance(spec, ConvSpec) and path == "second") == ["second"]
    assert "excluded" in fxfact.plan(small, exclude="first")["first"].reason
    assert "not included" in fxfact.plan(small, include="first")["second"].reason


def test_excluded_layer_needs_no_rank() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, (3, 1)))  # TT has three ranks on one, two on the other
    assert [d.path for d in fxfact.plan(model, "tt", rank=(4, 4, 4), exclude="1").rewrites] == ["0"]


def test_layers_that_share_a_weight_are_left_out_together(image: Tensor) -> None:
    plan = fxfact.plan(Tied(), rank=0.5, exclude="three", example_inputs=image)
    assert not plan["two"].rank
    assert plan["two"].reason == "excluded (three, which shares its weight)"


def test_scope_of_a_part_of_a_network_may_have_globs_that_fit_nothing(small: Small) -> None:
    captured = capture(small, None)
    with pytest.raises(ArgumentError, match=r"include: no layer at 'elsewhere'\. There are: first, second"):
        draft_plan(captured, SearchScope(include=["first", "elsewhere"]))
    draft = draft_plan(captured, SearchScope(include=["first", "elsewhere"], partial=True))
    assert [candidate.path for candidate in draft.candidates] == ["first"]


# The draft


def test_draft_lists_candidates_in_the_order_of_the_graph_with_their_calls(image: Tensor) -> None:
    draft = draft_plan(capture(Tied(), image), SearchScope())
    assert [candidate.path for candidate in draft.candidates] == ["one", "two"]
    assert draft.groups == (("one",), ("two", "three"))
    assert [decision.path for decision in draft.decisions] == ["one", "two", "three"]
    two, three = draft.candidates[1].calls
    assert (two[0].stride, two[1]) == ((1, 1), ((10, 10),))
    assert (three[0].stride, three[1]) == ((2, 2), ((10, 10),))
    cost = draft.candidates[1].dense_cost
    assert cost.params == 8 * 8 * 9 + 8  # the weight counts once
    assert cost.macs == (100 + 16) * 8 * 8 * 9
    assert draft.network.params == sum(candidate.dense_cost.params for candidate in draft.candidates)


def test_draft_keeps_the_reasons_of_layers_that_may_not_change(small: Small, image: Tensor) -> None:
    draft = draft_plan(capture(small, image), SearchScope(exclude="first"))
    assert [candidate.path for candidate in draft.candidates] == ["second", "head"]
    assert [decision.reason for decision in draft.decisions] == ["excluded", "", ""]


def test_draft_has_candidates_of_some_kinds_only(small: Small, image: Tensor) -> None:
    for kinds, paths in (("conv", ["first", "second"]), (["linear"], ["head"]), (("conv", "linear"), None)):
        draft = draft_plan(capture(small, image), SearchScope(kinds=kinds))
        assert [candidate.path for candidate in draft.candidates] == (paths or ["first", "second", "head"])
        left_out = {decision.reason for decision in draft.decisions if decision.reason}
        assert left_out == ({f"kinds={''.join(kinds)} leaves it out"} if paths else set())
    for kinds in ("convs", (), 3, ["linear", "rnn"]):
        with pytest.raises(ArgumentError, match="kinds must be 'conv', 'linear' or a list of these"):
            SearchScope(kinds=kinds)  # type: ignore[arg-type]


def test_a_budget_below_what_no_factorization_can_reach_is_refused_with_that_share(image: Tensor) -> None:
    class WithEmbedding(Small):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1000, 12)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.table.weight.sum()

    model = WithEmbedding().eval()
    plan = fxfact.plan(model, exclude="*", example_inputs=image)
    norm = 16
    assert plan.unreached.params == 12_000 + norm
    assert "90.7 % of the parameters are not in layers that can be factorized" in str(plan)
    data: list[Tensor] = []
    with pytest.raises(BudgetError, match=r"no factorization can reach 12,016 of 13,241 \(0.907\)") as caught:
        fxfact.plan(model, budget=fxfact.Params(0.5), calibration=data, example_inputs=image)
    assert caught.value.least == 12_016


def test_draft_makes_a_plan_for_any_allocation_and_stays_the_same(small: Small, image: Tensor) -> None:
    draft = draft_plan(capture(small, image), SearchScope(kinds="conv"))
    before = draft.decisions
    choice = Choice(ChannelSVD(), (3,), "a note", predicted_loss_increase=0.25, latencies_ms=(2.0, 1.0))
    plan = draft.to_plan(Allocation((Skip("for a reason"), choice)), uses_statistics=True)
    assert plan["first"].reason == "for a reason"
    assert plan["first"].factorization is None
    second = plan["second"]
    assert (second.factorization, second.rank, second.note) == (ChannelSVD(), (3,), "a note")
    assert (second.predicted_loss_increase, second.latencies_ms) == (0.25, (2.0, 1.0))
    assert plan.uses_statistics
    assert plan.predicted_loss_increase == 0.25
    assert (plan.model, plan.capture, plan.compared) == ("Small", "trace", True)
    dense = draft.to_plan(Allocation((Skip("one"), Skip("two"))), uses_statistics=False)
    assert not dense.rewrites
    assert draft.decisions == before
    assert draft.to_plan(Allocation((Skip("for a reason"), choice)), uses_statistics=True) == plan


def test_draft_gives_one_choice_to_all_layers_that_share_a_weight(image: Tensor) -> None:
    draft = draft_plan(capture(Tied(), image), SearchScope())
    choice = Choice(ChannelSVD(), (3,), predicted_loss_increase=0.5, latencies_ms=(3.0, 1.0))
    plan = draft.to_plan(Allocation((Skip("dense"), choice)), uses_statistics=True)
    assert [decision.rank for decision in plan] == [None, (3,), (3,)]
    assert plan["three"].tied_to == "two"
    assert (plan["two"].predicted_loss_increase, plan["three"].predicted_loss_increase) == (0.5, None)
    assert (plan["two"].latencies_ms, plan["three"].latencies_ms) == ((3.0, 1.0), (0.0, 0.0))  # counted once
    assert plan.predicted_loss_increase == 0.5


def test_draft_needs_one_choice_for_each_candidate(small: Small) -> None:
    draft = draft_plan(capture(small, None), SearchScope())
    with pytest.raises(ValueError, match="argument"):
        draft.to_plan(Allocation((Skip("only one"),)), uses_statistics=False)


# Growth


def test_growth_is_refused_unless_allowed(image: Tensor) -> None:
    model = nn.Conv2d(4, 4, 3, padding=1)
    (decision,) = fxfact.plan(model, "tt", rank=10**6, example_inputs=image)
    assert decision.factorization is None
    assert "parameters" in decision.reason
    assert "MACs" in decision.reason
    (grown,) = fxfact.plan(model, "tt", rank=10**6, example_inputs=image, allow_growth=True)
    assert grown.after.exceeds(grown.before)
    strided = nn.Conv2d(32, 32, 3, stride=4, padding=1)  # fewer parameters, but the first stage runs before the stride
    (decision,) = fxfact.plan(strided, rank=0.5, example_inputs=torch.zeros(1, 32, 16, 16))
    assert "parameters" not in decision.reason
    assert "MACs" in decision.reason
    assert fxfact.plan(strided, rank=0.5).rewrites


def test_growth_counts_layers_that_share_a_weight_together(image: Tensor) -> None:
    draft = draft_plan(capture(Tied(), image), SearchScope())
    grown = draft.to_plan(Allocation((Skip("dense"), Choice(ChannelSVD(), (8,)))), uses_statistics=False)
    assert [decision.rank for decision in grown] == [None, None, None]
    assert grown["two"].reason == grown["three"].reason
    assert "it would grow" in grown["two"].reason
    allowed = draft_plan(capture(Tied(), image), SearchScope(allow_growth=True))
    larger = allowed.to_plan(Allocation((Skip("dense"), Choice(ChannelSVD(), (8,)))), uses_statistics=False)
    assert larger["three"].rank == (8,)
