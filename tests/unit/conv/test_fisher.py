"""Decomposition in a metric: the error that counts is the one that the loss sees."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxfact.conv import ConvChain, ConvLayer, ConvSpec, KroneckerFisher, KroneckerMoment, as_matrix, compose
from fxfact.errors import SpecError
from fxfact.factorizations import Factorization
from fxfact.factorizations.matrix_svd import ChannelSVD
from tests.support import ALL, SPECS, by_name, random_layer


def moment(groups: int, size: int, generator: torch.Generator, rank: int | None = None) -> Tensor:
    columns = torch.randn(groups, size, rank or 2 * size, generator=generator, dtype=torch.float64)
    columns = columns * torch.logspace(0, -2, size, dtype=torch.float64)[:, None]
    return columns @ columns.transpose(1, 2)


def random_metric(spec: ConvSpec, *, rank: int | None = None) -> KroneckerFisher:
    generator, block = torch.Generator().manual_seed(1), spec.block
    positions = math.prod(spec.kernel_size)
    into, out = (1, positions) if spec.transposed else (positions, 1)
    sizes = (block.in_channels * into, block.out_channels * out)
    first, second = (KroneckerMoment((moment(spec.groups, size, generator, rank),)) for size in sizes)
    return KroneckerFisher(first, second).damped(1e-3)


def increase_of(layer: ConvLayer, chain: ConvChain, metric: KroneckerFisher) -> float:
    return metric.loss_increase(layer.spec, compose(chain) - layer.weight)


@pytest.mark.parametrize("factorization", ALL, ids=by_name)
def test_it_is_nearer_in_the_metric_than_the_nearest_in_the_frobenius_norm(
    factorization: Factorization, spec: ConvSpec
) -> None:
    if factorization.rejects(spec):
        return
    layer, metric = random_layer(spec), random_metric(spec)
    ranks = factorization.ranks(spec)
    rank = ranks[len(ranks) // 3]
    plain, whole = factorization.decompose(layer, rank), metric.loss_increase(spec, layer.weight)
    chain = factorization.decompose(layer, rank, metric=metric)
    assert chain.specs == factorization.layout(spec, rank)
    assert increase_of(layer, chain, metric) <= increase_of(layer, plain, metric) + 1e-4 * whole
    (found,) = factorization.increases(layer, metric, [rank])
    reached = increase_of(layer, chain, metric)
    assert 0.95 * reached - 1e-5 * whole <= found <= 2 * reached + 1e-3 * whole


@pytest.mark.parametrize("name", ["plain", "groups", "transposed", "transposed, grouped, dilated", "3-D", "1-D"])
def test_channel_svd_is_the_best_there_is(name: str) -> None:

    spec = SPECS[name]
    layer, metric = random_layer(spec), random_metric(spec)
    ranks = ChannelSVD().ranks(spec)
    known = ChannelSVD().increases(layer, metric, ranks)
    for rank, expected in zip(ranks, known, strict=True):
        chain = ChannelSVD().decompose(layer, rank, metric=metric)
        assert increase_of(layer, chain, metric) == pytest.approx(expected, rel=1e-4, abs=1e-5 * known[0])
    # no linear map of the columns does better: a small step in any direction costs
    chain = ChannelSVD().decompose(layer, ranks[0], metric=metric)
    best = increase_of(layer, chain, metric)
    for seed in range(5):
        moved = tuple(
            ConvLayer(
                stage.spec,
                stage.weight
                + 1e-2
                * stage.weight.norm()
                / stage.weight.numel() ** 0.5
                * torch.randn(stage.weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
                stage.bias,
            )
            for stage in chain.layers
        )
        assert increase_of(layer, ConvChain(moved), metric) > best


def test_a_metric_of_ones_is_the_frobenius_norm() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    layer = random_layer(spec)
    ones = KroneckerFisher(
        KroneckerMoment((torch.eye(54, dtype=torch.float64)[None],)),
        KroneckerMoment((torch.eye(8, dtype=torch.float64)[None],)),
    )
    plain = ChannelSVD().decompose(layer, (3,))
    chain = ChannelSVD().decompose(layer, (3,), metric=ones)
    assert torch.allclose(compose(plain), compose(chain), atol=1e-8)
    assert increase_of(layer, chain, ones) == pytest.approx(float((compose(chain) - layer.weight).square().sum()) / 2)


@pytest.mark.parametrize("factorization", ALL, ids=by_name)
def test_moments_without_full_rank_or_that_vanish(factorization: Factorization) -> None:
    spec = ConvSpec.parse(6, 8, (1, 1) if factorization.name == "pointwise_svd" else (3, 3), groups=2)
    layer, metric = random_layer(spec), random_metric(spec, rank=2)
    rank = factorization.ranks(spec)[1]
    chain = factorization.decompose(layer, rank, metric=metric)
    assert all(stage.weight.isfinite().all() for stage in chain.layers)
    nothing = KroneckerFisher(metric.input, KroneckerMoment(tuple(0 * factor for factor in metric.output.factors)))
    plain = factorization.decompose(layer, rank)
    assert torch.equal(compose(factorization.decompose(layer, rank, metric=nothing)), compose(plain))


def test_a_kronecker_product_is_the_moment_that_it_stands_for() -> None:
    generator = torch.Generator().manual_seed(0)
    channels, positions = moment(1, 6, generator), moment(1, 9, generator)
    spec = ConvSpec.parse(6, 8, (3, 3))
    output = KroneckerMoment((moment(1, 8, generator),))
    factored = KroneckerFisher(KroneckerMoment((channels, positions)), output)
    whole = KroneckerFisher(KroneckerMoment((torch.kron(channels[0], positions[0])[None],)), output)
    layer = random_layer(spec)
    assert factored.loss_increase(spec, layer.weight) == pytest.approx(whole.loss_increase(spec, layer.weight))
    assert torch.allclose(factored.input.channels(6), whole.input.channels(6))
    one, other = (ChannelSVD().decompose(layer, (3,), metric=metric) for metric in (factored, whole))
    assert torch.allclose(compose(one), compose(other), atol=1e-6)


def test_a_metric_of_another_convolution_is_refused() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    with pytest.raises(SpecError, match=r"\(54, 8\)"):
        ChannelSVD().decompose(random_layer(spec), (3,), metric=random_metric(ConvSpec.parse(4, 8, (3, 3))))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_matrix_is_what_the_moments_are_of(transposed: bool) -> None:
    spec = ConvSpec.parse(4, 6, (3, 3), transposed=transposed)
    rows = 4 if transposed else 6
    assert as_matrix(spec, random_layer(spec).weight).shape == (rows, 24 // rows * 9)


def test_a_moment_shrinks_to_the_identity_of_the_same_trace() -> None:
    whole = KroneckerMoment((moment(2, 6, torch.Generator().manual_seed(0)),))
    (half,), (own,) = whole.shrunk(10**9, least=0.5).factors, whole.factors
    mean = own.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(6, dtype=own.dtype)
    torch.testing.assert_close(half, (own + mean) / 2)
    torch.testing.assert_close(whole.shrunk(10**9, least=1.0).factors[0], mean)
    torch.testing.assert_close(whole.shrunk(10**12).factors[0], own)


@pytest.mark.parametrize(("samples", "steep"), [(20, 1.0), (20, 8.0), (200, 1.0), (200, 8.0)])
def test_a_moment_shrinks_by_about_what_is_best_for_so_many_samples(samples: int, steep: float) -> None:
    random = torch.Generator().manual_seed(0)
    true = torch.exp(-torch.linspace(0, steep, 40, dtype=torch.float64))
    drawn = torch.randn(8, samples, 40, generator=random, dtype=torch.float64) * true.sqrt()
    moments = drawn.mT @ drawn / samples
    eye = torch.eye(40, dtype=torch.float64) * moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]

    def missed(share: float) -> float:
        return float(((1 - share) * moments + share * eye - true.diag()).square().sum())

    found = float((KroneckerMoment((moments,)).shrunk(samples).factors[0] - true.diag()).square().sum())
    best = min(missed(k / 100) for k in range(101))
    assert found < 1.1 * best
    assert found < 0.95 * missed(0)
