"""The knapsack of a network: one option for every layer, where the layers of a joint set may take one together."""

from __future__ import annotations

from collections.abc import Sequence

from fxfact.planning.budgets import Budget
from fxfact.planning.knapsack import Class, Knapsack
from fxfact.planning.layer_options import LayerOptions, Option

_FRONT_POINTS = 500  # of the choices that the layers of a joint set can make alone


class NetworkKnapsack:
    """Chooses for all layers of a network, so that the weighted loss increase is least within a bound on the cost.

    Args:
        layers: the options of every layer.
        budget: says in which unit costs are counted.
        normalization: see ``allocate``.

    Attributes:
        least: the cost of the cheapest choice.
    """

    def __init__(self, layers: Sequence[LayerOptions], budget: Budget, normalization: float) -> None:
        self._alone = [_class_of(layer, layer.options, budget, normalization) for layer in layers]
        self._joint = [_class_of(layer, layer.joint, budget, normalization) for layer in layers]
        self._sets = joint_sets(layers)
        self._single = [k for k, layer in enumerate(layers) if layer.joint_set is None]
        self._together = [_JointSet([self._alone[k] for k in s], [self._joint[k] for k in s]) for s in self._sets]
        singles, together = [self._alone[k] for k in self._single], [each.options for each in self._together]
        self._knapsack = Knapsack([*singles, *together])
        self.least = self._knapsack.least

    def at(self, bound: float) -> list[int] | None:
        """Return for every layer the index in ``LayerOptions.every``, or None if not even the cheapest options fit."""
        picked = self._knapsack.at(bound)
        if picked is None:
            return None
        found = dict(zip(self._single, picked, strict=False))
        for own, joint_set, k in zip(self._sets, self._together, picked[len(self._single) :], strict=True):
            found |= zip(own, joint_set.picks[k], strict=True)
        return [found[index] for index in range(len(self._alone))]

    def value(self, picked: Sequence[int]) -> float:
        """Return the weighted loss increase of what ``at`` returned."""
        values = ([*alone.values, *joint.values] for alone, joint in zip(self._alone, self._joint, strict=True))
        return sum(own[k] for own, k in zip(values, picked, strict=True))


def joint_sets(layers: Sequence[LayerOptions]) -> list[list[int]]:
    """Return the indices of the layers of each joint set that has options."""
    sets: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        if layer.joint_set is not None:
            sets.setdefault(layer.joint_set, []).append(index)
    return list(sets.values())


class _JointSet:
    """What the layers of a joint set can choose: the best choices of each alone, and those together.

    ``picks`` has the index in ``LayerOptions.every`` of each layer, for every one of the ``options``.
    """

    def __init__(self, alone: Sequence[Class], joint: Sequence[Class]) -> None:
        self.picks = [*Knapsack(alone).front(_FRONT_POINTS)]
        self.picks += [[len(own.costs) + k for own in alone] for k in range(len(joint[0].costs))]
        costs = [[*a.costs, *j.costs] for a, j in zip(alone, joint, strict=True)]
        values = [[*a.values, *j.values] for a, j in zip(alone, joint, strict=True)]
        self.options = Class(*([_sum_at(each, picks) for picks in self.picks] for each in (costs, values)))


def _sum_at(rows: Sequence[Sequence[float]], places: Sequence[int]) -> float:
    return sum(row[k] for row, k in zip(rows, places, strict=True))


def _class_of(layer: LayerOptions, options: Sequence[Option], budget: Budget, normalization: float) -> Class:
    divisor = max(layer.loss_without_layer, 1e-30) ** normalization
    amounts = [budget.amount(option.cost) for option in options]
    return Class(amounts, [option.predicted_loss_increase / divisor for option in options])
