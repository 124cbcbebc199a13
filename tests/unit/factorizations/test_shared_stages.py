"""Chains of several layers that share all stages but one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxfact.conv import ConvLayer, ConvSpec, KroneckerFisher, KroneckerMoment, LowRankMoment, compose
from fxfact.errors import RankError, RefusedError, SpecError, WeightError
from fxfact.factorizations import SVD, ChannelSVD, CPMobilenet, Factorization, Rank, Tucker
from tests.support import apart, by_name, random_fisher, random_layer

CONV = ConvSpec.parse(6, 8, (3, 3), padding=1, bias=True)
CASES: list[tuple[Factorization, ConvSpec, Rank]] = [
    (Tucker(), CONV, (5, 4)),
    (Tucker(), CONV, (8, 4)),
    (Tucker(), CONV, (5, 6)),
    (Tucker(keep_full_sides=True), CONV, (5, 6)),
    (ChannelSVD(), CONV, (5,)),
    (SVD(), ConvSpec.parse(6, 8, (1, 1)), (4,)),
    (SVD(), ConvSpec.parse(6, 8, ()), (4,)),
    (SVD(), ConvSpec.parse(8, 6, (), bias=True), (4,)),
    (SVD(), ConvSpec.parse(6, 8, (), transposed=True), (4,)),
]


def layers_of(spec: ConvSpec, count: int = 3, dtype: torch.dtype = torch.float32) -> list[ConvLayer]:
    return [random_layer(spec, dtype, seed) for seed in range(count)]


@pytest.mark.parametrize(("factorization", "spec", "rank"), CASES)
@pytest.mark.parametrize("in_metric", [False, True])
def test_a_set_of_one_layer_is_as_close_as_its_own_chain(
    factorization: Factorization, spec: ConvSpec, rank: Rank, in_metric: bool
) -> None:
    (layer,), metric = layers_of(spec, 1), random_fisher(spec)
    (joint,) = factorization.decompose_jointly([layer], rank, [metric if in_metric else None])
    alone = factorization.decompose(layer, rank, metric=metric if in_metric else None)
    joint_error, error = (
        metric.loss_increase(spec, compose(chain) - layer.weight) if in_metric else apart(layer.weight, compose(chain))
        for chain in (joint, alone)
    )
    slack = 1.5 if in_metric and factorization.is_fitted else 1.01  # Tucker's own chain is fitted as well
    assert joint_error <= slack * error + 1e-6


@pytest.mark.parametrize(("factorization", "spec", "rank"), CASES)
def test_equal_layers_lose_nothing_by_sharing(factorization: Factorization, spec: ConvSpec, rank: Rank) -> None:
    (layer,), metric = layers_of(spec, 1), random_fisher(spec)
    alone, *_ = factorization.decompose_jointly([layer], rank, [metric])
    larger = replace(layer, weight=3 * layer.weight)
    for chain, each in zip(
        factorization.decompose_jointly([layer, larger], rank, [metric] * 2), (layer, larger), strict=True
    ):
        assert apart(compose(alone) * (each.weight.norm() / layer.weight.norm()), compose(chain)) < 1e-4


@pytest.mark.parametrize(
    ("factorization", "spec"),
    [
        (Tucker(keep_full_sides=True), CONV),
        (SVD(), ConvSpec.parse(6, 8, (1, 1))),
        (SVD(), ConvSpec.parse(6, 6, (), bias=True)),
    ],
    ids=["tucker", "svd", "linear"],
)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_full_rank_is_exact(factorization: Factorization, spec: ConvSpec, scale: float) -> None:
    layers = [replace(each, weight=each.weight * scale) for each in layers_of(spec)]
    for metrics in ([None] * 3, [random_fisher(spec)] * 3):
        for chain, layer in zip(
            factorization.decompose_jointly(layers, factorization.max_rank(spec), metrics), layers, strict=True
        ):
            assert apart(layer.weight, compose(chain)) < 1e-5


def test_the_first_stage_of_an_svd_is_the_best_for_layers_with_one_input() -> None:
    """As for queries, keys and values: the error is that of the SVD of their stacked weight."""
    spec, stacked = ConvSpec.parse(6, 8, ()), ConvSpec.parse(6, 24, ())
    layers, metric = layers_of(spec), random_fisher(spec)
    whole = ConvLayer(stacked, torch.cat([layer.weight for layer in layers]))
    blocks = KroneckerMoment((torch.block_diag(*[metric.output.factors[0][0]] * 3)[None],))
    wide = KroneckerFisher(metric.input, blocks)
    for rank in range(1, 6):
        chains = SVD().decompose_jointly(layers, (rank,), [metric] * 3)
        found = sum(
            metric.loss_increase(spec, compose(c) - each.weight) for c, each in zip(chains, layers, strict=True)
        )
        best = wide.loss_increase(stacked, compose(SVD().decompose(whole, (rank,), metric=wide)) - whole.weight)
        assert found == pytest.approx(best, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("factorization", "spec", "rank"), CASES)
def test_a_layer_that_matters_more_is_closer(factorization: Factorization, spec: ConvSpec, rank: Rank) -> None:
    layers, metric = layers_of(spec, 2), random_fisher(spec)
    loud = KroneckerFisher(metric.input, KroneckerMoment(tuple(1e4 * factor for factor in metric.output.factors)))
    first = [
        metric.loss_increase(
            spec, compose(factorization.decompose_jointly(layers, rank, metrics)[0]) - layers[0].weight
        )
        for metrics in ([loud, metric], [metric, metric], [metric, loud])
    ]
    assert first[0] < first[1] < first[2]


@pytest.mark.parametrize(("factorization", "spec", "rank"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_equal_stages(
    factorization: Factorization, spec: ConvSpec, rank: Rank, dtype: torch.dtype
) -> None:
    layers = [replace(each, weight=each.weight * (100 * 8**k)) for k, each in enumerate(layers_of(spec, dtype=dtype))]
    chains = factorization.decompose_jointly(layers, rank, [None] * 3)
    exact = factorization.decompose_jointly([replace(x, weight=x.weight.double()) for x in layers], rank, [None] * 3)
    for chain, other in zip(chains, exact, strict=True):
        assert all(stage.weight.dtype == dtype for stage in chain.layers)
        assert apart(compose(other), compose(chain).double()) < 0.05
        for k in factorization.shared_stages(spec, rank):
            assert torch.equal(chain.layers[k].weight, chains[0].layers[k].weight)


def test_moments_may_be_of_any_form() -> None:
    spec = ConvSpec.parse(6, 8, ())
    metric, rows = random_fisher(spec), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    low = KroneckerFisher(LowRankMoment(rows, 0.1), metric.output)
    dense = KroneckerFisher(KroneckerMoment(low.input.factors), metric.output)
    found, expected = (SVD().decompose_jointly(layers_of(spec), (3,), [each] * 3) for each in (low, dense))
    for one, other in zip(found, expected, strict=True):
        assert apart(compose(other), compose(one)) < 1e-4


@pytest.mark.parametrize("factorization", [Tucker(), ChannelSVD()], ids=by_name)
def test_layers_of_zero_weight_or_zero_metric_do_not_count(factorization: Factorization) -> None:
    layers, metric = layers_of(CONV), random_fisher(CONV)
    zero = KroneckerFisher(metric.input, KroneckerMoment(tuple(0 * factor for factor in metric.output.factors)))
    layers[1] = replace(layers[1], weight=torch.zeros_like(layers[1].weight))
    rank = factorization.ranks(CONV)[3]
    chains = factorization.decompose_jointly(layers, rank, [metric, metric, zero])
    assert all(bool(stage.weight.isfinite().all()) for chain in chains for stage in chain.layers)
    assert float(compose(chains[1]).norm()) < 1e-4


def test_what_cannot_be_shared_is_refused() -> None:
    layers = layers_of(CONV)
    nothing: list[KroneckerFisher | None] = [None] * 3
    with pytest.raises(RefusedError, match=r"cp_mobilenet of rank .* has no stages that layers can share"):
        CPMobilenet().decompose_jointly(layers, (4,), nothing)
    with pytest.raises(RankError, match="tucker rank must be within"):
        Tucker().decompose_jointly(layers, (9, 4), nothing)
    with pytest.raises(SpecError, match="needs moments of sizes"):
        Tucker().decompose_jointly(layers, (4, 4), [random_fisher(ConvSpec.parse(4, 4, (3, 3))), None, None])
    layers[1].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(WeightError, match="NaN"):
        Tucker().decompose_jointly(layers, (4, 4), nothing)
    for spec in (replace(CONV, transposed=True), replace(CONV, groups=2)):
        assert Tucker().shared_stages(spec, (2, 2)) == ()
    assert Tucker().shared_stages(CONV, (8, 6)) == ()  # one stage, the convolution itself
