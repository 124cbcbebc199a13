"""The search along the Pareto front: how near it comes to the limit, and in how many measurements."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

import fxfact
from fxfact.conv import Cost
from fxfact.planning import ParetoPoint, Plan
from fxfact.search.cheapest import CostOfIncrease, Limit, cheapest_within

DENSE = Cost(1000, 1_000_000)
POINTS = [ParetoPoint(Cost(0, 25_000 * k), 20.0 * math.exp(-0.3 * k)) for k in range(4, 41)]  # a tenth to all


@dataclass
class Front:
    """Plans are their shares of the cost; ``measured`` are the shares in the order of measurement."""

    value_at: Callable[[float], float]
    measured: list[float] = field(default_factory=list)

    def cheapest(self, at_most: float, trials: int = 8, slope: float = 0.5) -> float | None:
        front = CostOfIncrease(POINTS, DENSE, fxfact.Macs)
        limit = Limit(self._measure, at_most, trials, slope=slope, subject="value")
        found: Any = cheapest_within(limit, front, lambda share: cast(Plan, share))
        return cast(float | None, found)

    def _measure(self, share: Any) -> float:
        self.measured.append(share)
        return self.value_at(share)


def power(share: float, slope: float) -> float:
    return float(20.0 * math.exp(-0.3 * 40 * share)) ** slope


@pytest.mark.parametrize("slope", [0.3, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.52, 0.7, 0.9])
def test_search_finds_where_a_power_of_the_increase_meets_the_limit(slope: float, share: float) -> None:
    front = Front(lambda x: power(x, slope))
    found = front.cheapest(power(share, slope))
    assert found is not None
    assert share - 1e-9 <= found <= share + 0.02
    assert len(front.measured) <= 6


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_search_comes_near_a_step(share: float) -> None:
    """Values of either side say nothing of where the step is."""
    found = Front(lambda x: 0.1 if x >= share else 10.0).cheapest(1.0)
    assert found is not None
    assert share <= found <= share + 0.05


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf])
def test_search_handles_values_without_logarithm(value: float) -> None:
    good, bad = (value, 3.0) if value <= 0 else (0.5, value)
    found = Front(lambda x: good if x >= 0.4 else bad).cheapest(1.0)
    assert found is not None
    assert 0.4 <= found <= 0.5


def test_search_for_no_increase_at_all_halves_the_interval() -> None:
    found = Front(lambda x: max(0.0, 0.6 - x)).cheapest(0.0)
    assert found is not None
    assert 0.6 <= found <= 0.65


def test_search_stops_at_the_cheapest_plan_that_is_within_the_limit() -> None:
    front = Front(lambda x: 0.001)
    assert front.cheapest(1.0) == pytest.approx(0.1)
    assert len(front.measured) == 2


def test_search_finds_nothing_if_the_costliest_plan_exceeds_the_limit() -> None:
    front = Front(lambda x: 5.0)
    assert front.cheapest(1.0) is None
    assert front.measured[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("trials", [1, 2, 5])
def test_search_measures_no_more_plans_than_allowed(trials: int) -> None:
    front = Front(lambda x: power(x, 0.5))
    found = front.cheapest(power(0.77, 0.5), trials)
    assert len(front.measured) <= trials
    assert found is None or found in front.measured
