"""Layers of joint sets choose together or alone, whichever is better for the whole network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

import fxfact
from fxfact.conv import Cost, Skip
from fxfact.errors import BudgetError
from fxfact.factorizations import ChannelSVD
from fxfact.planning import Choice, LayerOptions, allocate, least_amount
from fxfact.planning.layer_options import Option
from fxfact.planning.network_knapsack import NetworkKnapsack, joint_sets

NETWORK = Cost(10_000, 100_000)


def option(rank: int, params: int, increase: float, shares_with: str | None = None) -> Option:
    choice = Choice(ChannelSVD(), (rank,), predicted_loss_increase=increase, shares_with=shares_with)
    return Option(choice, Cost(params, 10 * params), increase)


def random_layers(seed: int, *, sizes: Sequence[int] = (3, 2), count: int = 4) -> list[LayerOptions]:
    """Joint sets of these numbers of layers, then one layer alone. Joint chains are cheaper and worse."""
    random = np.random.default_rng(seed)
    layers = []
    for number, size in enumerate((*sizes, 1)):
        for k in range(size):
            params, losses = np.sort(random.integers(100, 900, count)), np.sort(random.uniform(0.1, 3, count))[::-1]
            alone = [option(r, int(p), float(x)) for r, (p, x) in enumerate(zip(params, losses, strict=True), 1)]
            dense = Option(Skip("dense"), Cost(1000, 10_000), 0.0)
            factor, first = random.uniform(0.9, 1.5), 1.0 if k == 0 else 0.5
            joint = [
                option(r, int(first * p), float(factor * x), f"set {number}")
                for r, (p, x) in enumerate(zip(params, losses, strict=True), 1)
            ]
            layers.append(LayerOptions((dense, *alone), float(random.uniform(1, 9)), tuple(joint) if size > 1 else ()))
    return layers


def every_choice(layers: Sequence[LayerOptions]) -> list[tuple[float, float]]:
    """The cost and the value of every choice of the network."""
    sets = joint_sets(layers)
    ways: list[list[dict[int, int]]] = []
    for own in sets:
        alone = itertools.product(*(range(len(layers[k].options)) for k in own))
        together = ([len(layers[k].options) + j for k in own] for j in range(len(layers[own[0]].joint)))
        ways.append([dict(zip(own, picked, strict=True)) for picked in (*alone, *together)])
    single = [k for k, layer in enumerate(layers) if layer.joint_set is None]
    ways += [[{k: place} for place in range(len(layers[k].options))] for k in single]
    found = []
    for combination in itertools.product(*ways):
        picked = {key: value for way in combination for key, value in way.items()}
        options = [(layer.every[picked[k]], layer.loss_without_layer) for k, layer in enumerate(layers)]
        value = sum(each.predicted_loss_increase / without**0.5 for each, without in options)
        found.append((sum(each.cost.params for each, _ in options), value))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_choice_is_nearly_the_best_of_all(seed: int) -> None:
    layers = random_layers(seed, sizes=(2, 2), count=3)
    knapsack, choices = NetworkKnapsack(layers, fxfact.Params(0.5), 0.5), every_choice(layers)
    assert knapsack.least == min(cost for cost, _ in choices)
    shared = 0
    for bound in np.linspace(knapsack.least, 5000, 12):
        picked = knapsack.at(bound)
        assert picked is not None
        assert sum(layer.every[k].cost.params for layer, k in zip(layers, picked, strict=True)) <= bound
        best = min(value for cost, value in choices if cost <= bound)
        assert knapsack.value(picked) == pytest.approx(best, rel=1e-2)
        for own in joint_sets(layers):
            together = {picked[k] - len(layers[k].options) for k in own}
            assert len(together) == 1 or max(together) < 0  # all take the same joint option, or none
            shared += max(together) >= 0
    assert shared
    assert knapsack.at(knapsack.least - 1) is None


def test_joint_options_that_do_not_pay_change_nothing() -> None:
    layers = random_layers(0)
    useless = [
        replace(layer, joint=tuple(o._replace(predicted_loss_increase=99.0) for o in layer.joint)) for layer in layers
    ]
    alone = [replace(layer, joint=()) for layer in layers]
    for share in (0.6, 0.7, 0.8, 0.9):
        budget = fxfact.Params(share)
        assert allocate(useless, NETWORK, budget).choices == allocate(alone, NETWORK, budget).choices


def test_shared_parameters_reach_smaller_budgets() -> None:
    layers = random_layers(1)
    budget = fxfact.Params(at_most=1)
    alone = [replace(layer, joint=()) for layer in layers]
    least, least_alone = (least_amount(each, NETWORK, budget) for each in (layers, alone))
    assert least < least_alone
    with pytest.raises(BudgetError) as caught:
        allocate(layers, NETWORK, budget)
    assert caught.value.least == least
    with pytest.raises(BudgetError):
        allocate(alone, NETWORK, fxfact.Params(at_most=least))
    allocation = allocate(layers, NETWORK, fxfact.Params(at_most=least))
    shares = {choice.shares_with for choice in allocation.choices if isinstance(choice, Choice)}
    assert "set 0" in shares
    increases = [point.predicted_loss_increase for point in allocation.pareto_points]
    assert increases == sorted(increases, reverse=True)
    assert allocation.pareto_points[0].cost.params == least


def test_alternatives_of_a_joint_choice_are_joint() -> None:
    layer = random_layers(2)[1]
    places = [k for k, each in enumerate(layer.every) if isinstance(each.choice, Choice) and each.choice.shares_with]
    found = layer.alternatives(places[1], fxfact.Params(0.5))
    assert {other.cost for other in found} == {layer.every[k].cost for k in places[:3]}
    assert layer.scaled(2.0).joint[1].predicted_loss_increase == 2 * layer.joint[1].predicted_loss_increase
