"""Budgets: what they accept, and that plans meet them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import BudgetError, CalibrationError
from fxfact.planning import ErrorCurveCache
from tests.support import Classifier


@pytest.fixture
def model(classifier: Classifier) -> nn.Module:
    return classifier


@pytest.fixture
def x(color_images: Tensor) -> Tensor:
    return color_images


@pytest.fixture(scope="module")
def error_curves() -> ErrorCurveCache:
    """Saves time: all tests plan the same network on the same data."""
    return ErrorCurveCache()


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
    assert "loss +" in str(plan.pareto_front)
    increases = [point.predicted_loss_increase for point in plan.pareto_front.points]
    assert increases == sorted(increases, reverse=True)


def test_budget_is_met_in_inference_mode(model: nn.Module, x: Tensor) -> None:
    asked: dict[str, Any] = {"factorization": ["tucker", "cp"], "budget": fxfact.Macs(0.6), "calibration": x.split(8)}
    with torch.inference_mode():
        small = fxfact.factorize(model, **asked)
    assert fxfact.plan_of(small) == fxfact.plan_of(fxfact.factorize(model, **asked))
    assert not any(parameter.is_inference() for parameter in small.parameters())


def test_ranks_within_a_budget_are_multiples(model: nn.Module, x: Tensor, error_curves: ErrorCurveCache) -> None:
    plan = fxfact.plan(
        model, budget=fxfact.Macs(0.6), calibration=[x], example_inputs=x[:1], multiple_of=4, error_curves=error_curves
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
