"""Budgets: what they accept, and that plans meet them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.conv import Cost
from fxfact.errors import BudgetError, CalibrationError
from fxfact.factorizations.cp import CPMobilenet
from fxfact.planning import ErrorCurveCache
from fxfact.utils import Timer
from tests.support import Classifier, FakeTimer


@pytest.mark.parametrize(
    "budget", [fxfact.Macs(0.5), fxfact.Params(0.5), fxfact.Params(at_most=1500), fxfact.Macs(0.9)]
)
@pytest.mark.parametrize("data", [True, False])
def test_budget_is_met(
    model: nn.Module, x: Tensor, budget: fxfact.planning.Budget, data: bool, error_curves: ErrorCurveCache
) -> None:
    calibration = x.split(8) if data else None
    small = fxfact.factorize(
        model, budget=budget, calibration=calibration, example_inputs=x[:1], error_curves=error_curves, verify=True
    )
    plan = fxfact.plan_of(small)
    assert plan.rewrites
    assert budget.amount(plan.after) <= budget.allowed(plan.network)
    assert (plan.predicted_loss_increase is not None) == data
    if isinstance(budget, fxfact.Params):
        assert sum(p.numel() for p in small.parameters()) == plan.after.params
    assert ("loss +" if data else "energy lost") in str(plan.pareto_front)
    increases = [point.predicted_loss_increase for point in plan.pareto_front.points]
    assert increases == sorted(increases, reverse=True)


def test_budget_is_met_in_inference_mode(model: nn.Module, x: Tensor) -> None:
    asked: dict[str, Any] = {
        "factorization": ["tucker", CPMobilenet(sweeps=5)],
        "budget": fxfact.Macs(0.8),
        "calibration": x.split(8),
        "include": "first",
    }
    with torch.inference_mode():
        small = fxfact.factorize(model, **asked)
    assert fxfact.plan_of(small).rewrites
    assert fxfact.plan_of(small) == fxfact.plan_of(fxfact.factorize(model, **asked))
    assert not any(parameter.is_inference() for parameter in small.parameters())


def test_ranks_within_a_budget_are_multiples(model: nn.Module, x: Tensor, error_curves: ErrorCurveCache) -> None:
    plan = fxfact.plan(
        model,
        budget=fxfact.Macs(0.6),
        calibration=x.split(8),
        example_inputs=x[:1],
        multiple_of=4,
        error_curves=error_curves,
    )
    for decision in plan.rewrites:
        most = decision.factorization.max_rank(decision.spec)
        assert all(rank % 4 == 0 or rank == top for rank, top in zip(decision.rank, most, strict=True))


def test_budget_that_is_impossible_or_malformed_is_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(BudgetError, match="can go down to"):
        fxfact.plan(model, "tucker", budget=fxfact.Macs(0.001), calibration=[x], example_inputs=x[:1])
    for bad in (0, 1.5, "half", True, float("nan")):
        with pytest.raises(BudgetError, match=r"Macs\(at_most=900_000\)"):
            fxfact.Macs(bad)
    with pytest.raises(BudgetError, match=r"at_most_ms=None\).*Latency\(at_most_ms=12\)"):
        fxfact.Latency(2)
    with pytest.raises(BudgetError, match="compiled is True or False"):
        fxfact.Latency(0.5, compiled="yes")  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=r"timer must be a fxfact\.utils\.Timer, got 3"):
        fxfact.Latency(0.5, timer=3)  # type: ignore[arg-type]
    assert fxfact.Macs(np.float32(0.5)).fraction == 0.5
    with pytest.raises(BudgetError):
        fxfact.Params()
    with pytest.raises(BudgetError):
        fxfact.Loss(-1)
    with pytest.raises(CalibrationError, match="at least two batches are needed, got 1"):
        fxfact.plan(model, budget=fxfact.Loss(0.1), calibration=[x], example_inputs=x[:1])
    other, statistics = Classifier(), fxfact.calibrate(model, [x])
    other.first = nn.Conv2d(3, 12, 5, padding=2)
    with pytest.raises(CalibrationError, match="the statistics are of"):
        fxfact.plan(other, budget=fxfact.Params(0.5), calibration=statistics)


def test_latency_budget_needs_example_inputs(model: nn.Module) -> None:
    with pytest.raises(BudgetError, match="example_inputs"):
        fxfact.plan(model, budget=fxfact.Latency(0.5))
    with pytest.raises(BudgetError, match="no budget"):
        fxfact.Latency(1.5)
    with pytest.raises(BudgetError, match="no budget"):
        fxfact.Latency(0.5, at_most_ms=3)


def test_budgets_bound_one_part_of_a_cost() -> None:
    network = Cost(1000, 20_000, 8.0)
    bounds = [fxfact.Macs(0.5), fxfact.Params(at_most=300), fxfact.Latency(0.25), fxfact.Latency(at_most_ms=3.0)]
    assert [budget.amount(network) for budget in bounds] == [20_000, 1000, 8.0, 8.0]
    assert [budget.allowed(network) for budget in bounds] == [10_000, 300, 2.0, 3.0]
    for budget in (fxfact.Macs(0.5), fxfact.Latency(0.5)):
        with pytest.raises(BudgetError, match="needs example_inputs"):
            budget.amount(Cost(1000, None))


def test_budget_error_says_how_far_a_network_can_go_down() -> None:
    error = fxfact.Latency(0.25).unmet_error(4.0, Cost(1000, None, 8.0))
    assert str(error).startswith("the budget is 2 ms, and these factorizations can go down to about 4 (0.500 of 8)")
    assert error.least == 4.0


def test_latency_budget_has_a_timer_that_does_not_count_in_comparisons() -> None:
    timer = FakeTimer()
    budget = fxfact.Latency(0.5, timer=timer)
    assert budget.timer is timer
    assert type(fxfact.Latency(0.5).timer) is Timer
    assert budget == fxfact.Latency(0.5) != fxfact.Latency(0.5, compiled=True)
    assert repr(budget) == "Latency(fraction=0.5, at_most=None, compiled=False)"


def test_speedup_is_its_share_of_the_milliseconds() -> None:
    timer = Timer()
    assert fxfact.Speedup(2) == fxfact.Latency(0.5)
    assert fxfact.Speedup(4.0, compiled=True, timer=timer) == fxfact.Latency(0.25, compiled=True)
    assert fxfact.Speedup(4.0, timer=timer).timer is timer
    for factor in (0.5, 0, -1, float("inf"), None, True):
        with pytest.raises(BudgetError, match=r"Speedup\(2\) is twice as fast"):
            fxfact.Speedup(factor)
