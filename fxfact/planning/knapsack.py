"""The multiple-choice knapsack: one option of each class, the least total value, the total cost within a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEPS = 20_000  # into which the range of costs is divided


@dataclass(frozen=True)
class Class:
    """The ``costs`` and ``values`` of options of which exactly one must be taken."""

    costs: Sequence[float]
    values: Sequence[float]


class Knapsack:
    """Solves the problem for every bound at once, by dynamic programming over the cost (Pisinger and Toth 1998).

    Costs are rounded up to one of 20,000 steps. The remainder that rounding leaves is then spent greedily.
    """

    def __init__(self, classes: Sequence[Class]) -> None:
        self._costs = [np.asarray(each.costs, dtype=np.float64) for each in classes]
        self._values = [np.asarray(each.values, dtype=np.float64) for each in classes]
        self._undominated = [_undominated(c, v) for c, v in zip(self._costs, self._values, strict=True)]
        self._dearest = [int(options[-1]) for options in self._undominated]
        self.least = float(sum(costs.min() for costs in self._costs))
        most = float(sum(costs[options[-1]] for costs, options in zip(self._costs, self._undominated, strict=True)))
        self._step = max((most - self.least) / _STEPS, 1e-300)
        pairs = zip(self._costs, self._undominated, strict=True)
        self._steps = [self._whole_steps(costs[options]) for costs, options in pairs]
        self._taken, self._best = self._solve()

    def at(self, bound: float) -> list[int] | None:
        """Return the index of an option for every class, or None if not even the cheapest options fit."""
        if bound < self.least:
            return None
        if sum(float(costs[k]) for costs, k in zip(self._costs, self._dearest, strict=True)) <= bound:
            return list(self._dearest)
        place = int(min((bound - self.least) / self._step, _STEPS))
        return self._spend(self._picked_at(place), bound)

    def front(self, most: int) -> list[list[int]]:
        """Return the index of an option for every class, at ``most`` bounds or fewer, then for a bound that allows all.

        Among the bounds at which the least value changes, they are evenly spread.
        """
        places = np.flatnonzero(np.diff(self._best, prepend=np.inf) < 0)
        chosen = np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int))
        found = [self._picked_at(int(places[k])) for k in chosen]
        return found if self._dearest in found else [*found, self._dearest]  # rounding may leave it beyond the steps

    def _picked_at(self, place: int) -> list[int]:
        """Return the best option of every class for this number of steps."""
        picked: list[int] = []
        for k in reversed(range(len(self._undominated))):
            option = int(self._taken[k][place])
            picked.append(int(self._undominated[k][option]))
            place -= int(self._steps[k][option])
        return picked[::-1]

    def _whole_steps(self, costs: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the costs of the options of a class above the cheapest one, in whole steps."""
        steps: NDArray[np.int64] = np.ceil((costs - costs[0]) / self._step - 1e-9).astype(np.int64)
        return steps

    def _solve(self) -> tuple[list[NDArray[np.int32]], NDArray[np.float64]]:
        """Return, for every class, its best option for each number of steps spent on it and the classes before it.

        The second result is the least value of all classes for each number of steps.
        """
        best = np.zeros(_STEPS + 1)
        all_taken = []
        for k, options in enumerate(self._undominated):
            found, taken = np.full(_STEPS + 1, np.inf), np.zeros(_STEPS + 1, dtype=np.int32)
            for option, (steps, value) in enumerate(zip(self._steps[k], self._values[k][options], strict=True)):
                if steps > _STEPS:
                    continue
                shifted = best[: _STEPS + 1 - steps] + value
                better = shifted < found[steps:]
                found[steps:][better] = shifted[better]
                taken[steps:][better] = option
            best = found
            all_taken.append(taken)
        return all_taken, best

    def _spend(self, picked: list[int], bound: float) -> list[int]:
        """Take more expensive options as long as one fits, always the one that lowers the value most."""
        left = bound - sum(float(costs[p]) for costs, p in zip(self._costs, picked, strict=True))
        while True:
            gains = [
                (float(self._values[k][picked[k]] - self._values[k][option]), k, int(option))
                for k, options in enumerate(self._undominated)
                for option in options
                if 0 < self._costs[k][option] - self._costs[k][picked[k]] <= left
            ]
            gain, k, option = max(gains, default=(0.0, 0, 0))
            if not gain > 0:
                return picked
            left -= float(self._costs[k][option] - self._costs[k][picked[k]])
            picked[k] = option


def _undominated(costs: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the options that are not worse than another one in both cost and value, cheapest first."""
    order = np.lexsort((values, costs))
    lowest = np.minimum.accumulate(values[order])
    first = np.concatenate([[True], values[order][1:] < lowest[:-1]])
    options: NDArray[np.int64] = order[first]
    return options
