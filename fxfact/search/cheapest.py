"""The cheapest plan within a limit on something that must be measured: the loss, or the caller's own metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fxfact.conv import Cost
from fxfact.planning import Budget, ParetoPoint, Plan

_TOLERANCE = 0.005  # of the dense cost, between the best plan and the next cheaper one that is not within the limit
_SMALLEST_INCREASE = 1e-6  # of the largest predicted increase; below it the front is not told apart
_LEAST_SLOPE = 0.25  # the least power of the predicted increase that the value is taken to be
_MARGIN = 0.1  # of the bracket, at both ends, where no plan is tried


@dataclass(frozen=True, eq=False)
class Limit:
    """What is measured of plans, and how large it may be.

    Attributes:
        measure: returns the value for a plan.
        at_most: how large the value may be.
        trials: how many plans are measured at most.
        slope: the power of the predicted loss increase that the value usually is.
        subject: what is measured, in a word.
    """

    measure: Callable[[Plan], float]
    at_most: float
    trials: int
    slope: float
    subject: str


class CostOfIncrease:
    """The Pareto front as a function: the cost, as a share of the dense one, at the logarithm of the loss increase."""

    def __init__(self, points: Sequence[ParetoPoint], network: Cost, unit: type[Budget]) -> None:
        budget = unit(1.0)
        increases = np.asarray([point.predicted_loss_increase for point in reversed(points)])
        self._logs = np.log(np.maximum(increases, max(_SMALLEST_INCREASE * increases.max(), 1e-300)))
        self._shares = np.asarray([budget.amount(p.cost) / budget.amount(network) for p in reversed(points)])
        self.ends = float(self._logs[0]), float(self._logs[-1])

    def share(self, log_increase: float) -> float:
        """Return the share of the cost at which this increase is predicted."""
        return float(np.interp(log_increase, self._logs, self._shares))

    def middle(self) -> float:
        """Return the logarithm of the increase that is predicted in the middle between the ends of the costs."""
        middle = (self._shares[0] + self._shares[-1]) / 2
        return float(np.interp(-middle, -self._shares, self._logs))


def cheapest_within(limit: Limit, front: CostOfIncrease, plan_at: Callable[[float], Plan]) -> Plan | None:
    """Return the cheapest plan measured within the limit, or None if there is none.

    Along the Pareto front, the value is about a power of the predicted loss increase. The plan in the middle of the
    front is measured first. The next one is always where the power that fits the last measurements meets the limit.

    Args:
        limit: what to measure.
        front: the costs of the plans.
        plan_at: returns the plan for a share of the dense cost.
    """
    values: dict[float, float] = {}  # by the logarithm of the predicted increase
    best: Plan | None = None
    place = front.middle()
    for _ in range(limit.trials):
        plan = plan_at(front.share(place))
        values[place] = limit.measure(plan)
        within = max((p for p, value in values.items() if value <= limit.at_most), default=None)
        beyond = min((p for p in values if (within is None or p > within) and values[p] > limit.at_most), default=None)
        if within == place:
            best = plan
        left, right = front.ends[0] if within is None else within, front.ends[1] if beyond is None else beyond
        is_tight = within is not None and front.share(left) - front.share(right) < _TOLERANCE
        if is_tight or beyond == front.ends[0]:
            break
        place = _next_place(limit, values, left, right)
    return best


def _next_place(limit: Limit, values: Mapping[float, float], left: float, right: float) -> float:
    """Return the logarithm of the predicted increase, between two others, of the plan to measure next."""
    place = (left + right) / 2
    logs = {p: math.log(value / limit.at_most) for p, value in values.items() if 0 < value < math.inf and limit.at_most}
    if logs:
        nearest, *others = sorted(logs, key=lambda p: (p not in (left, right), abs(logs[p])))
        slope = (logs[others[0]] - logs[nearest]) / (others[0] - nearest) if others else limit.slope
        place = nearest - logs[nearest] / max(slope, _LEAST_SLOPE)
    margin = _MARGIN * (right - left)
    least, most = (left + margin if left in values else left), (right - margin if right in values else right)
    return min(max(place, least), most)
