"""A kernel in its Fisher metric, and the error curves that need no fit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxfact.conv import ConvSpec, KroneckerFisher, KroneckerMoment, compose
from fxfact.errors import SpecError
from fxfact.factorizations import (
    TT,
    ChannelSVD,
    CPFactorized,
    CPMobilenet,
    Factorization,
    SpatialSVD,
    Tucker,
    WeightedKernel,
    WeightedLayer,
)
from fxfact.factorizations.weighted_kernel import largest_eigenvalues
from tests.support import random_fisher, random_layer, random_moment

KINDS = [CPMobilenet(), CPFactorized(), Tucker(), TT(), SpatialSVD(), SpatialSVD(last_axes_first=True), ChannelSVD()]
SHAPES = {
    "1-D": ConvSpec.parse(5, 7, (3,)),
    "2-D": ConvSpec.parse(6, 8, (3, 2)),
    "2-D transposed": ConvSpec.parse(6, 5, (2, 3), transposed=True),
    "3-D": ConvSpec.parse(4, 5, (2, 3, 2)),
    "3-D transposed": ConvSpec.parse(5, 4, (2, 1, 3), transposed=True),
    "grouped": ConvSpec.parse(8, 10, (3, 3), groups=2),
}


def separable(spec: ConvSpec) -> tuple[KroneckerFisher, KroneckerFisher]:
    """A metric with a moment of patches that is a Kronecker product: its factors, and multiplied out."""
    generator, block, positions = torch.Generator().manual_seed(2), spec.block, math.prod(spec.kernel_size)
    wide, narrow = block.in_channels, block.out_channels
    wide, narrow = (narrow, wide) if spec.transposed else (wide, narrow)
    channels, places = (random_moment(spec.groups, size, generator) for size in (wide, positions))
    other = KroneckerMoment((random_moment(spec.groups, narrow, generator),))
    product = torch.stack([torch.kron(a, b) for a, b in zip(channels, places, strict=True)])
    sides = [KroneckerMoment((channels, places)), KroneckerMoment((product,))]
    pairs = [(other, side) if spec.transposed else (side, other) for side in sides]
    return KroneckerFisher(*pairs[0]), KroneckerFisher(*pairs[1])


def fitting(shape: str) -> list[Factorization]:
    return [kind for kind in KINDS if not kind.rejects(SHAPES[shape])]


def some_ranks(kind: Factorization, spec: ConvSpec) -> list[tuple[int, ...]]:
    ranks = kind.ranks(spec)
    return list(dict.fromkeys([ranks[0], ranks[len(ranks) // 3], kind.max_rank(spec)]))


@pytest.mark.parametrize("shape", SHAPES)
def test_increases_are_those_of_chains_that_a_fit_can_only_bring_closer(shape: str) -> None:
    spec = SHAPES[shape]
    layer, metric = random_layer(spec, torch.float32), random_fisher(spec)
    whole = metric.loss_increase(spec, layer.weight)
    for kind in fitting(shape):
        ranks = some_ranks(kind, spec)
        increases = kind.loss_increases(WeightedLayer(layer, metric), ranks)
        assert increases[-1] <= 2e-3 * whole, f"{kind.name} is exact at the largest rank"
        for rank, nats in zip(ranks, increases, strict=True):
            fitted = metric.loss_increase(spec, compose(kind.decompose(layer, rank, metric=metric)) - layer.weight)
            assert 0.9 * fitted - 1e-3 * whole <= nats <= 1.6 * fitted + 0.02 * whole, (kind.name, rank)


@pytest.mark.parametrize("shape", SHAPES)
def test_kronecker_moments_need_not_be_multiplied_out(shape: str) -> None:
    spec = SHAPES[shape]
    layer, (factored, product) = random_layer(spec, torch.float32), separable(spec)
    whole = product.loss_increase(spec, layer.weight)
    for kind in fitting(shape):
        ranks = some_ranks(kind, spec)
        found, expected = (kind.loss_increases(WeightedLayer(layer, m), ranks) for m in (factored, product))
        close = 0.15 if isinstance(kind, CPMobilenet | CPFactorized) else 1e-3  # CP descends on other ways
        assert found == pytest.approx(expected, rel=close, abs=2e-3 * whole), kind.name


@pytest.mark.parametrize(("shape", "samples"), [("2-D", 1), ("2-D", 5), ("2-D transposed", 2), ("1-D", 3)])
def test_moments_of_few_samples_lead_to_the_increases_of_fits(shape: str, samples: int) -> None:
    spec = SHAPES[shape]
    layer, moments = random_layer(spec, torch.float32), random_fisher(spec, rank=samples)
    metric = KroneckerFisher(moments.input.shrunk(samples), moments.output.shrunk(samples, 0.5)).damped(1e-3)
    whole = metric.loss_increase(spec, layer.weight)
    for kind in fitting(shape):
        ranks = some_ranks(kind, spec)
        for rank, nats in zip(ranks, kind.loss_increases(WeightedLayer(layer, metric), ranks), strict=True):
            fitted = metric.loss_increase(spec, compose(kind.decompose(layer, rank, metric=metric)) - layer.weight)
            assert 0.9 * fitted - 2e-3 * whole <= nats <= 1.6 * fitted + 0.05 * whole, (kind.name, rank)


def test_dead_channels_and_kernels_of_zeros_cost_nothing() -> None:
    spec = SHAPES["2-D"]
    layer, metric = random_layer(spec, torch.float32), random_fisher(spec)
    layer.weight[:, 2:] = 0
    layer.weight[3:] = 0
    whole = metric.loss_increase(spec, layer.weight)
    (nats,) = Tucker().loss_increases(WeightedLayer(layer, metric), [(3, 2)])
    assert nats <= 1e-4 * whole
    layer.weight.zero_()
    for kind in fitting("2-D"):
        assert kind.loss_increases(WeightedLayer(layer, metric), [kind.smallest_rank(spec)]) == [0.0]


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_increases_scale_with_the_square_of_the_weight(scale: float) -> None:
    spec = SHAPES["2-D"]
    layer, metric = random_layer(spec, torch.float32), random_fisher(spec)
    scaled = type(layer)(spec, layer.weight * scale, layer.bias)
    (plain,), (found,) = (Tucker().loss_increases(WeightedLayer(one, metric), [(4, 3)]) for one in (layer, scaled))
    assert found == pytest.approx(plain * scale**2, rel=1e-3)


def kernel_of(spec: ConvSpec) -> tuple[WeightedKernel, Tensor]:
    layer, metric = random_layer(spec), random_fisher(spec)
    return WeightedKernel(spec, layer.weight, metric), metric.input.factors[0][0]


def test_explained_is_what_the_best_last_stage_keeps() -> None:
    kernel, moment = kernel_of(ConvSpec.parse(4, 6, (2, 2)))
    kernels = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    explained = kernel.explained(kernels)
    for count in (1, 3, 5):
        some = kernels[:count]
        best = torch.linalg.solve(some @ moment @ some.T, some @ moment @ kernel.target.T).T
        missed = best @ some - kernel.target
        expected = float((missed @ moment * missed).sum()) / 2
        assert kernel.missed(float(explained[:count].square().sum())) == pytest.approx(expected, rel=1e-5)


def test_two_last_stages_are_the_best_matrix_of_their_rank() -> None:
    kernel, _ = kernel_of(ConvSpec.parse(4, 6, (2, 2)))
    everything = kernel.explained(torch.eye(16, dtype=torch.float64))
    for rank in (1, 2, 4):
        missed = kernel.missed(largest_eigenvalues(everything, rank))
        assert missed == pytest.approx(float(kernel.spectrum[rank:].sum()) / 2, rel=1e-4)


def test_whitened_kernels_are_apart_by_the_loss_increase_if_the_moment_is_separable() -> None:
    spec = SHAPES["2-D"]
    layer, (metric, _) = random_layer(spec), separable(spec)
    kernel, other = (
        WeightedKernel(spec, weight, metric) for weight in (layer.weight, random_layer(spec, seed=5).weight)
    )
    assert kernel.is_separable((0, 1))
    assert not kernel.is_separable((0,), (1,))
    apart = kernel.whitened((0, 1)).tensor - other.whitened((0, 1)).tensor
    trace = float(metric.input.factors[1][0].trace())
    # the channels' moment is summed over positions, and that of the positions has a mean of 1 on its diagonal
    scale = spec.kernel_size[0] * spec.kernel_size[1] * trace / trace
    expected = metric.loss_increase(spec, layer.weight - other.weight)
    assert float(apart.square().sum()) / 2 == pytest.approx(scale * expected, rel=1e-4)


def test_metric_of_another_convolution_is_refused() -> None:
    with pytest.raises(SpecError, match="needs moments of sizes"):
        WeightedLayer(random_layer(SHAPES["2-D"]), random_fisher(SHAPES["1-D"]))


class MyTucker(Tucker):
    """Without a formula for its errors, as a factorization that was just added."""

    name = "my_tucker"

    def _loss_increases(self, kernel: WeightedKernel, ranks: object) -> None:
        return None


def test_factorization_without_a_formula_gets_its_curve_from_short_fits() -> None:
    spec = SHAPES["2-D"]
    layer, metric = random_layer(spec, torch.float32), random_fisher(spec)
    ranks = some_ranks(MyTucker(), spec)
    fitted = MyTucker().loss_increases(WeightedLayer(layer, metric), ranks)
    known = Tucker().loss_increases(WeightedLayer(layer, metric), ranks)
    assert fitted == pytest.approx(known, rel=0.3, abs=1e-3 * known[0])


def test_restricted_factorization_is_tried_beside_the_general_one_only_where_it_saves() -> None:
    wide, narrow, long = ConvSpec.parse(64, 64, (3, 3)), ConvSpec.parse(4, 8, (3, 3)), ConvSpec.parse(64, 64, (7, 7))
    both = [CPMobilenet(), CPFactorized()]
    assert [CPFactorized().is_worth_trying(spec, both) for spec in (wide, narrow, long)] == [False, True, True]
    assert CPFactorized().is_worth_trying(wide, [CPFactorized(), Tucker()])
    assert all(CPMobilenet().is_worth_trying(spec, both) for spec in (wide, narrow, long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", [CPMobilenet(), CPFactorized(), Tucker(), TT(), SpatialSVD(), ChannelSVD()])
@pytest.mark.parametrize("shape", ["2-D", "2-D transposed", "grouped"])
def test_fit_that_goes_on_from_a_quick_one_ends_where_the_whole_one_does(
    kind: Factorization, shape: str, dtype: torch.dtype
) -> None:
    spec = SHAPES[shape]
    layer, metric = random_layer(spec, dtype), random_fisher(spec)
    rank = some_ranks(kind, spec)[1]
    quick = kind.decompose(layer, rank, metric=metric, quick=True)
    start = [stage.weight for stage in quick.layers]
    whole = kind.decompose(layer, rank, metric=metric)
    continued = kind.decompose(layer, rank, metric=metric, start=start)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(whole.layers, continued.layers, strict=True))
    reached, before = (metric.loss_increase(spec, (compose(chain) - layer.weight).double()) for chain in (whole, quick))
    assert reached <= (1.02 if dtype == torch.float16 else 1.001) * before
