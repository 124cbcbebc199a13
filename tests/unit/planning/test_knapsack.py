"""The multiple-choice knapsack: small cases by hand, and random ones against an exact solver."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from fxfact.planning.knapsack import Class, Knapsack


def test_knapsack_is_within_a_hundredth_of_the_optimum() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    random = np.random.default_rng(0)
    for _ in range(20):
        classes = []
        for _ in range(8):
            costs = np.sort(random.uniform(1, 100, 12))
            classes.append(
                Class(costs.tolist(), (random.uniform(1, 10) * np.exp(-costs / random.uniform(10, 60))).tolist())
            )
        knapsack = Knapsack(classes)
        bound = random.uniform(knapsack.least, sum(max(c.costs) for c in classes))
        picked = knapsack.at(bound)
        assert sum(c.costs[k] for c, k in zip(classes, picked, strict=True)) <= bound
        value = sum(c.values[k] for c, k in zip(classes, picked, strict=True))
        costs, values = (np.concatenate([getattr(c, name) for c in classes]) for name in ("costs", "values"))
        one_of_each = np.kron(np.eye(8), np.ones(12))
        constraints = [optimize.LinearConstraint(one_of_each, 1, 1), optimize.LinearConstraint(costs[None], 0, bound)]
        exact = optimize.milp(values, constraints=constraints, integrality=1, bounds=optimize.Bounds(0, 1))
        assert value <= 1.01 * exact.fun
        assert knapsack.at(knapsack.least - 1) is None


def test_knapsack_takes_the_best_values_within_the_bound() -> None:
    """Costs are rounded up to steps, so the best options may need a bound that is a little larger."""
    knapsack = Knapsack([Class([10.0, 5.0, 1.0], [0.0, 1.0, 3.0]), Class([10.0, 1.0], [0.0, 1.5])])
    assert knapsack.least == 2.0
    assert [knapsack.at(bound) for bound in (20, 15.01, 15, 10, 6.01, 2, 1)] == [
        [0, 0], [1, 0], [0, 1], [1, 1], [1, 1], [2, 1], None
    ]  # fmt: skip


def test_knapsack_never_takes_an_option_that_is_worse_in_cost_and_value() -> None:
    knapsack = Knapsack([Class([5.0, 6.0, 1.0], [1.0, 1.0, 2.0])])
    assert [knapsack.at(bound) for bound in (100, 5, 4)] == [[0], [0], [2]]


def test_knapsack_spends_what_rounding_to_steps_leaves() -> None:
    classes = [Class([1e6, 0.4, 0.0], [0.0, 1.0, 2.0]), Class([0.4, 0.0], [1.0, 2.0])]
    assert Knapsack(classes).at(0.8) == [1, 0]


def test_knapsack_without_classes_costs_nothing() -> None:
    knapsack = Knapsack([])
    assert (knapsack.at(0.0), knapsack.at(-1.0)) == ([], None)


def test_front_has_the_best_choice_of_every_class_at_many_bounds() -> None:
    generator = np.random.default_rng(0)
    classes = [Class([0.0, *generator.integers(1, 50, 6)], [9.0, *generator.uniform(0, 9, 6)]) for _ in range(3)]
    knapsack = Knapsack(classes)

    def cost_and_value(picked: Sequence[int]) -> tuple[float, float]:
        pairs = list(zip(classes, picked, strict=True))
        return sum(each.costs[k] for each, k in pairs), sum(each.values[k] for each, k in pairs)

    costs_and_values = [cost_and_value(picked) for picked in knapsack.front(1000)]
    every = [cost_and_value(picked) for picked in itertools.product(range(7), repeat=3)]
    for cost, value in costs_and_values:
        assert value >= min(v for c, v in every if c <= cost) - 1e-9
        assert value <= min((v for c, v in every if c <= cost - 0.1), default=np.inf) + 1e-9  # costs are rounded
    best = min(value for _, value in every)
    assert min(value for _, value in costs_and_values) == pytest.approx(best)
    assert len(knapsack.front(3)) in (3, 4)
    assert knapsack.front(3)[0] == knapsack.front(1000)[0]
    assert knapsack.front(3)[-1] == knapsack.front(1000)[-1]
