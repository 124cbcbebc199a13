"""The knapsack against an exact solver."""

from __future__ import annotations

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
