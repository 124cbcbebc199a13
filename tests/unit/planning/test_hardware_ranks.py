"""Ranks that hardware computes efficiently, and how their latencies are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from fxfact.conv import ConvLayer, ConvSpec
from fxfact.factorizations.matrix_svd import ChannelSVD
from fxfact.factorizations.spatial_svd import SpatialSVD
from fxfact.planning import Candidate, LatencyModel
from fxfact.planning.hardware_ranks import chain_latencies, hardware_friendly, multiples
from tests.support import random_layer

SINGLE = [(rank,) for rank in range(1, 129)]


def test_multiples_are_multiples_or_full_in_every_entry() -> None:
    ranks = [(8, 4), (8, 6), (10, 4), (10, 6), (16, 12)]
    assert multiples(ranks, 4, (10, 6)) == [(8, 4), (8, 6), (10, 4), (10, 6), (16, 12)]
    assert multiples(ranks, 8, (10, 12)) == [(16, 12)]
    assert multiples(ranks, 1, (99, 99)) == ranks


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (128, [8, 16, 24, 32, 64, 96, 128]),  # four multiples of 32, and smaller multiples of 8
        (100, [8, 16, 32, 48, 64, 80, 96]),  # only three multiples of 32, so multiples of 16
        (50, [8, 16, 24, 32, 40, 48]),  # only three multiples of 16
        (20, [1, 3, 4, 6, 8, 10, 11, 13, 15, 17, 18, 20]),  # too few multiples of 8
        (3, [1, 2, 3]),
    ],
)
def test_hardware_friendly_ranks_prefer_the_largest_multiple_that_leaves_four(count: int, expected: list[int]) -> None:
    assert [rank for (rank,) in hardware_friendly(SINGLE[:count], (999,))] == expected


def test_hardware_friendly_ranks_are_at_most_twelve_and_may_be_full() -> None:
    ranks = [(rank,) for rank in range(1, 1001)]
    found = hardware_friendly(ranks, (1000,))
    assert len(found) == 12
    assert found[0] == (8,)
    assert found[-1] == (1000,)
    assert all(rank % 8 == 0 or rank == 1000 for (rank,) in found)
    assert hardware_friendly([], (8,)) == []


class CountingModel:
    """A latency model by the number of parameters."""

    network_ms = 100.0

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def latencies_ms(self, path: str, layouts: Sequence[Callable[[ConvSpec], tuple[ConvSpec, ...]]]) -> list[float]:
        self.asked.append((path, len(layouts)))
        return [float(sum(stage.params for stage in layout(SPEC))) for layout in layouts]


SPEC = ConvSpec.parse(16, 24, (3, 3), padding=1)


def test_chain_latencies_are_asked_for_together_with_the_layer_first() -> None:
    layer: ConvLayer = random_layer(SPEC)
    candidate, model = Candidate("conv", layer, ((SPEC, ((8, 8),)),)), CountingModel()
    choices = [(ChannelSVD(), [(4,), (8,)]), (SpatialSVD(), [(5,)])]
    latency_model: LatencyModel = model
    dense, chains = chain_latencies(latency_model, candidate, choices)
    assert model.asked == [("conv", 4)]
    assert dense == SPEC.params
    assert chains == [
        [sum(stage.params for stage in method.layout(SPEC, rank)) for rank in ranks] for method, ranks in choices
    ]
    assert chain_latencies(latency_model, candidate, []) == (SPEC.params, [])
