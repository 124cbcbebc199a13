"""Decomposition in a Fisher metric, which measures an error by the increase of the loss."""

from __future__ import annotations

import pytest
import torch

from fxfact.conv import ConvChain, ConvLayer, ConvSpec, KroneckerFisher, KroneckerMoment, compose
from fxfact.errors import SpecError
from fxfact.factorizations import (
    TT,
    ChannelSVD,
    CPFactorized,
    CPMobilenet,
    Factorization,
    SpatialSVD,
    Tucker,
    WeightedLayer,
)
from tests.support import SPECS, equal_fishers, random_fisher, random_layer


def increase_of(layer: ConvLayer, chain: ConvChain, metric: KroneckerFisher) -> float:
    return metric.loss_increase(layer.spec, compose(chain) - layer.weight)


@pytest.mark.parametrize("name", ["plain", "groups", "transposed", "transposed, grouped, dilated", "3-D", "1-D"])
def test_channel_svd_is_optimal_in_the_metric(name: str) -> None:
    spec = SPECS[name]
    layer, metric = random_layer(spec), random_fisher(spec)
    ranks = ChannelSVD().ranks(spec)
    known = ChannelSVD().loss_increases(WeightedLayer(layer, metric), ranks)
    for rank, expected in zip(ranks, known, strict=True):
        chain = ChannelSVD().decompose(layer, rank, metric=metric)
        assert increase_of(layer, chain, metric) == pytest.approx(expected, rel=1e-4, abs=1e-5 * known[0])
    # a small step in any direction makes it worse
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


def test_identity_metric_is_the_frobenius_norm() -> None:
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


def test_kronecker_product_gives_the_chain_of_the_whole_moment() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    factored, whole = equal_fishers()
    layer = random_layer(spec)
    one, other = (ChannelSVD().decompose(layer, (3,), metric=metric) for metric in (factored, whole))
    assert torch.allclose(compose(one), compose(other), atol=1e-6)


def test_metric_of_another_convolution_is_refused() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    with pytest.raises(SpecError, match=r"\(54, 8\)"):
        ChannelSVD().decompose(random_layer(spec), (3,), metric=random_fisher(ConvSpec.parse(4, 8, (3, 3))))


def test_fit_that_overflows_keeps_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(SPECS["plain"])
    metric = random_fisher(layer.spec)
    method = CPMobilenet()

    def overflow(*arguments: object) -> None:
        raise RuntimeError("value cannot be converted to type float without overflow")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.LBFGS, "step", overflow)
        start = compose(method.decompose(layer, (3,), metric=metric))
    fitted = compose(method.decompose(layer, (3,), metric=metric))
    increases = [float(metric.loss_increase(layer.spec, kernel - layer.weight)) for kernel in (start, fitted)]
    assert torch.isfinite(start).all()
    assert increases[1] < increases[0]


@pytest.mark.parametrize("method", [CPMobilenet(), CPFactorized(), Tucker(), TT(), SpatialSVD()])
def test_stages_have_like_norms_because_they_train_best(method: Factorization) -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    layer, metric = random_layer(spec, torch.float32), random_fisher(spec)
    chain = method.decompose(layer, method.ranks(spec)[3], metric=metric)
    norms = [float(stage.weight.norm()) for stage in chain.layers]
    assert max(norms) <= 1.01 * min(norms)
