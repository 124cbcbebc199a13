"""The multiple-choice knapsack: one option of each class, least value in all, cost in all within a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEPS = 20_000  # of the cost


@dataclass(frozen=True)
class Class:
    """``costs`` and ``values`` of the options among which one has to be taken."""

    costs: Sequence[float]
    values: Sequence[float]


class Knapsack:
    """Solved for every bound at once, by dynamic programming over the cost in 20,000 steps, each option's rounded up
    (Pisinger and Toth 1998); what rounding left over is then spent greedily.
    """

    def __init__(self, classes: Sequence[Class]) -> None:
        self._costs = [np.asarray(each.costs, dtype=np.float64) for each in classes]
        self._values = [np.asarray(each.values, dtype=np.float64) for each in classes]
        self._kept = [_undominated(c, v) for c, v in zip(self._costs, self._values, strict=True)]
        self.least = float(sum(costs.min() for costs in self._costs))
        most = float(sum(costs[kept[-1]] for costs, kept in zip(self._costs, self._kept, strict=True)))
        self._step = max((most - self.least) / _STEPS, 1e-300)
        self._taken = self._solve()

    def at(self, bound: float) -> list[int] | None:
        """The option of every class, None where not even the cheapest fit."""
        if bound < self.least:
            return None
        dearest = [int(kept[-1]) for kept in self._kept]
        if sum(float(costs[k]) for costs, k in zip(self._costs, dearest, strict=True)) <= bound:
            return dearest
        place = int(min((bound - self.least) / self._step, _STEPS))
        picked: list[int] = []
        for k in reversed(range(len(self._kept))):
            option = int(self._taken[k][place])
            picked.append(int(self._kept[k][option]))
            place -= int(self._steps(k)[option])
        return self._spend(picked[::-1], bound)

    def _steps(self, k: int) -> NDArray[np.int64]:
        """What the options of a class cost beyond its cheapest, in whole steps."""
        costs = self._costs[k][self._kept[k]]
        steps: NDArray[np.int64] = np.ceil((costs - costs[0]) / self._step - 1e-9).astype(np.int64)
        return steps

    def _solve(self) -> list[NDArray[np.int32]]:
        """For every class the option to take when so many steps may be spent on it and on those before it."""
        best = np.zeros(_STEPS + 1)
        all_taken = []
        for k, kept in enumerate(self._kept):
            found, taken = np.full(_STEPS + 1, np.inf), np.zeros(_STEPS + 1, dtype=np.int32)
            for option, (steps, value) in enumerate(zip(self._steps(k), self._values[k][kept], strict=True)):
                if steps > _STEPS:
                    continue
                shifted = best[: _STEPS + 1 - steps] + value
                better = shifted < found[steps:]
                found[steps:][better] = shifted[better]
                taken[steps:][better] = option
            best = found
            all_taken.append(taken)
        return all_taken

    def _spend(self, picked: list[int], bound: float) -> list[int]:
        """Take dearer options that still fit, as long as there are, those first that lower the value most."""
        left = bound - sum(float(costs[p]) for costs, p in zip(self._costs, picked, strict=True))
        while True:
            gains = [
                (float(self._values[k][picked[k]] - self._values[k][option]), k, int(option))
                for k, kept in enumerate(self._kept)
                for option in kept
                if 0 < self._costs[k][option] - self._costs[k][picked[k]] <= left
            ]
            gain, k, option = max(gains, default=(0.0, 0, 0))
            if not gain > 0:
                return picked
            left -= float(self._costs[k][option] - self._costs[k][picked[k]])
            picked[k] = option


def _undominated(costs: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The options that no other one beats in both, cheapest first."""
    order = np.lexsort((values, costs))
    lowest = np.minimum.accumulate(values[order])
    first = np.concatenate([[True], values[order][1:] < lowest[:-1]])
    kept: NDArray[np.int64] = order[first]
    return kept
