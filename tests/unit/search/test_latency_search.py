"""Budgets of milliseconds: plans are proposed and timed until a network meets the budget."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfact
from fxfact.errors import BudgetError
from fxfact.search import latency_search
from fxfact.search.latency_search import RegulaFalsi
from tests.support import BranchingThreeConvs, FakeTimer, ThreeConvs, millions_of_macs

Calls = Sequence[Callable[[], Any]]


@pytest.fixture
def planned(three_convs: ThreeConvs, x: Tensor, error_curves: fxfact.ErrorCurveCache) -> Callable[..., fxfact.Plan]:
    """Returns the plan for a network of three convolutions, within a share of its time or some milliseconds."""

    def plan(share: float | None = None, *, timer: FakeTimer, **bound: float) -> fxfact.Plan:
        budget = fxfact.Latency(share, timer=timer, **bound)
        return fxfact.plan(three_convs, kinds="conv", budget=budget, example_inputs=x, error_curves=error_curves)

    return plan


def dense_and_chains(dense_ms: float, chain_ms: float) -> Callable[[Calls], list[list[float]]]:
    """Every layer takes ``dense_ms``, and every chain ``chain_ms``."""
    return lambda calls: [[dense_ms] * 3, *[[chain_ms] * 3] * (len(calls) - 1)]


def first_of(*ms: float) -> Callable[[Calls], list[float]]:
    """Networks that are timed together take the first of these milliseconds."""
    return lambda calls: list(ms[: len(calls)])


@pytest.mark.parametrize("kind", [ThreeConvs, BranchingThreeConvs])
@pytest.mark.parametrize("bound", [{"fraction": 0.5}, {"at_most_ms": 2.0}], ids=["share", "milliseconds"])
def test_latency_budget_is_met_as_measured(
    kind: type[ThreeConvs],
    bound: dict[str, float],
    three_convs: ThreeConvs,
    x: Tensor,
    error_curves: fxfact.ErrorCurveCache,
) -> None:
    budget = fxfact.Latency(**bound, timer=FakeTimer())
    model = kind().eval()
    model.load_state_dict(three_convs.state_dict())
    random_state = torch.get_rng_state()
    small = fxfact.factorize(model, budget=budget, example_inputs=x, verify=True, error_curves=error_curves)
    plan = fxfact.plan_of(small)
    assert plan.network.ms == pytest.approx(2 * plan.network.macs / 1e6 + 0.01)
    assert plan.after.ms is not None
    assert plan.after.ms <= budget.allowed(plan.network)
    assert plan.measured_ms is not None
    assert plan.measured_ms[1] == pytest.approx(plan.after.ms, rel=0.05)
    timed = [point.milliseconds for point in plan.measured_points]
    assert min(abs(ms - plan.after.ms) for ms in timed if ms is not None) < 1e-6
    assert None not in timed
    assert not small.training
    large = [decision for decision in plan.rewrites if decision.path != "first"]  # which has few ranks, so any will do
    assert large
    assert all(rank % 8 == 0 or rank in (32, 48, 3) for decision in large for rank in decision.rank or ())
    assert "ms" in str(plan)
    assert fxfact.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    again = fxfact.apply(plan, model)
    torch.testing.assert_close(again(x), small(x))
    assert fxfact.verify(model, small, x).ok
    assert fxfact.report(model, small, x).ok
    assert torch.get_rng_state().equal(random_state)


def test_latency_budget_is_met_by_an_exported_program(
    three_convs: ThreeConvs, x: Tensor, error_curves: fxfact.ErrorCurveCache, caplog: pytest.LogCaptureFixture
) -> None:
    timer, program = FakeTimer(), torch.export.export(three_convs, (x,))
    with caplog.at_level(logging.INFO, logger="fxfact"):
        small = fxfact.factorize(program, budget=fxfact.Latency(0.5, timer=timer), error_curves=error_curves)
    *trials, last = [text for text in caplog.messages if "FactorizeConvs applied" in text]
    assert trials
    assert all("with random numbers to measure its time" in text for text in trials)
    assert "random numbers" not in last
    plan = fxfact.plan_of(small)
    assert plan.after.ms is not None
    assert plan.network.ms is not None
    assert plan.after.ms <= 0.5 * 1.03 * plan.network.ms
    assert timer.calls_timed[-1] == 2  # the last trial
    assert isinstance(small, torch.export.ExportedProgram)
    assert fxfact.verify(torch.export.export(three_convs, (x,)), small, x).ok


def test_latency_search_predicts_no_chain_to_take_less_than_nothing(planned: Callable[..., fxfact.Plan]) -> None:
    plan = planned(0.9, timer=FakeTimer(side_by_side=first_of(10.0, 0.5, 10.0, 10.0)))
    assert plan.rewrites
    assert all(decision.latencies_ms for decision in plan.rewrites)
    assert all(decision.latencies_ms[1] > 0 for decision in plan.rewrites if decision.latencies_ms)


def test_latency_search_gives_savings_that_a_chain_cannot_have_to_the_others(
    planned: Callable[..., fxfact.Plan],
) -> None:
    shares = iter([0.1, *[0.9] * 99])  # of a layer's milliseconds, for its chains
    timer = FakeTimer(
        lambda calls: [[1.0] * 3, *[[next(shares)] * 3] * (len(calls) - 1)],
        lambda calls: [10.0, 5.0, 10.0, 7.1][-len(calls) :],
    )
    plan = planned(at_most_ms=3.55, timer=timer)
    assert len(plan.rewrites) == 3
    assert plan.after.ms == pytest.approx(plan.network.ms * 0.71)
    assert sorted(decision.latencies_ms[1] for decision in plan.rewrites) == pytest.approx([0.05, 0.75, 0.75])


def test_latency_search_tries_plans_until_a_network_meets_the_budget(planned: Callable[..., fxfact.Plan]) -> None:
    measured: list[float] = []

    def chains_save_half(calls: Calls) -> list[float]:
        """In the network a chain saves half of what it saves alone."""
        dense, *others = (millions_of_macs(call) for call in calls)
        measured.extend(found := [dense, *(dense - (dense - ms) / 2 for ms in others)])
        return found

    timer = FakeTimer(side_by_side=chains_save_half)
    plan = planned(0.7, timer=timer)
    assert plan.network.ms is not None
    assert plan.after.ms is not None
    assert plan.after.ms == pytest.approx(measured[-1])
    assert 0.6 * plan.network.ms < plan.after.ms <= 0.7 * 1.03 * plan.network.ms
    assert plan.after.macs is not None
    assert plan.network.macs is not None
    assert plan.after.macs < 0.5 * plan.network.macs
    with pytest.raises(BudgetError, match="can go down to"):
        planned(0.3, timer=timer)


def test_latency_search_finds_plans_that_save_more_in_the_network_than_predicted(
    planned: Callable[..., fxfact.Plan],
) -> None:
    timer = FakeTimer(dense_and_chains(1.0, 0.9), first_of(10.0, 5.0, 10.0, 10.0))
    with pytest.raises(BudgetError, match="can go down to"):  # 9.7 ms, by the latencies of single layers
        planned(0.3, timer=timer)
    plan = planned(at_most_ms=2.52, timer=timer)
    assert plan.after.ms == pytest.approx(2.5)
    assert len(plan.rewrites) == 3


def test_latency_search_meets_budgets_although_savings_are_not_proportional(
    planned: Callable[..., fxfact.Plan],
) -> None:
    """Mild chains save nothing in the network, and strong ones twice of what they save alone."""

    def little_or_much(calls: Calls) -> list[float]:
        dense, *others = map(millions_of_macs, calls)
        return [dense, *(dense - max(0.0, 1.6 * (dense - ms) - 0.6 * dense) for ms in others)]

    timer = FakeTimer(side_by_side=little_or_much)
    for share in (0.9, 0.7, 0.5):
        plan = planned(share, timer=timer)
        assert plan.after.ms is not None
        assert plan.network.ms is not None
        assert (share - 0.1) * plan.network.ms < plan.after.ms <= share * 1.03 * plan.network.ms
        front = [point.cost.ms / plan.network.ms for point in plan.pareto_points if point.cost.ms]
        assert min(front) < share < max(front)
        assert " ms " in str(plan.pareto_front).split("\n")[0]


def test_latency_search_does_not_refuse_a_budget_for_one_disturbed_measurement(
    planned: Callable[..., fxfact.Plan],
) -> None:
    trials: list[float] = []

    def disturbed_at_first(calls: Calls) -> list[float]:
        found = list(map(millions_of_macs, calls))
        if len(calls) == 2:
            trials.append(found[1])
            found[1] = 0.97 * found[0] if len(trials) == 1 else found[1]
        return found

    plan = planned(0.5, timer=FakeTimer(side_by_side=disturbed_at_first))
    assert plan.after.ms is not None
    assert plan.network.ms is not None
    assert 0.4 * plan.network.ms < plan.after.ms <= 0.5 * 1.03 * plan.network.ms
    assert trials[1] < trials[0]  # the fastest plan, before the budget is refused


def test_latency_search_refuses_a_budget_by_the_median_of_three_measurements_of_the_fastest_plan(
    planned: Callable[..., fxfact.Plan],
) -> None:
    shares = iter([0.9, 0.55, 0.7, 0.6])  # of the first plan, and three times of the fastest one

    def trials(calls: Calls) -> list[float]:
        dense, *others = map(millions_of_macs, calls)
        return [dense, dense * next(shares)] if len(calls) == 2 else [dense, *others]

    with pytest.raises(BudgetError, match=r"can go down to about [\d.]+ \(0\.600 of"):
        planned(0.5, timer=FakeTimer(side_by_side=trials))
    assert next(shares, None) is None


def test_latency_search_warns_if_no_trial_meets_the_budget(
    planned: Callable[..., fxfact.Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_search, "_MAX_TRIALS", 1)
    with pytest.warns(UserWarning, match=r"the budget is 6\.3 ms.*fastest measures 8\.1 ms"):
        plan = planned(0.7, timer=FakeTimer(side_by_side=first_of(10.0, 9.0, 9.5, 9.7)))
    assert plan.after.ms == pytest.approx(8.1)


# Regula falsi


def search(measure: Callable[[float], float], target: float, steps: int = 12) -> list[tuple[float, float]]:
    """The milliseconds that were asked for and measured in each step, for a dense network of 10 ms."""
    interval, asked, seen = RegulaFalsi(10.0, target), target, []
    for _ in range(steps):
        seen.append((asked, measure(asked)))
        if abs(seen[-1][1] / target - 1) < 0.01:
            break
        asked = interval.next_asked(*seen[-1])
    return seen


def test_regula_falsi_finds_proportional_savings_in_one_step() -> None:
    (first, second) = search(lambda asked: 10 - (10 - asked) / 2, 8.0)
    assert first == (8.0, 9.0)
    assert second == pytest.approx((6.0, 8.0))


@pytest.mark.parametrize("target", [9.0, 7.0, 5.0])
@pytest.mark.parametrize(
    "measure",
    [
        lambda asked: 10 - (10 - asked) ** 2 / 10,
        lambda asked: 10 - 10 ** 0.5 * (10 - asked) ** 0.5,
        lambda asked: 10 - max(0.0, 1.6 * (10 - asked) - 6),
        lambda asked: asked + 0.3,
        lambda asked: asked - 0.3,
    ],
    ids=["late savings", "early savings", "no mild savings", "always slower", "always faster"],
)  # fmt: skip
def test_regula_falsi_finds_any_increasing_function(measure: Callable[[float], float], target: float) -> None:
    seen = search(measure, target)
    assert seen[-1][1] == pytest.approx(target, rel=0.01)
    slow = [asked for asked, ms in seen if ms > target]
    fast = [asked for asked, ms in seen if ms <= target]
    assert max(fast) < min([*slow, 10.0])


def test_regula_falsi_asks_for_less_after_a_slow_plan_and_for_more_after_a_fast_one() -> None:
    for (asked, ms), (following, _) in pairwise(search(lambda asked: 10 - (10 - asked) ** 2 / 10, 7.0)):
        assert (following < asked) == (ms > 7.0)


def test_regula_falsi_never_asks_for_nothing_or_less() -> None:
    interval = RegulaFalsi(10.0, 1.0)
    asked = 1.0
    for _ in range(6):
        asked = interval.next_asked(asked, 10.0)  # no plan saves anything
        assert 0 < asked < 10
