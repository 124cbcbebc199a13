"""The laws that every factorization inherits, over a grid of convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfact.conv import ConvLayer, ConvSpec, KroneckerFisher, KroneckerMoment, Skip, compose, composed_spec, run
from fxfact.errors import ArgumentError, RankError, RefusedError, WeightError
from fxfact.factorizations import Factorization, SpatialSVD, Tucker, parse_factorization, resolve_rank
from fxfact.factorizations.cp import CPMobilenet
from fxfact.factorizations.matrix_svd import ChannelSVD, PointwiseSVD
from fxfact.planning.error_curves import relative_square
from fxfact.planning.rank_rules import Energy
from fxfact.planning.strategy import Candidate
from fxfact.utils import no_reduced_precision
from tests.support import ALL, EVERY_STAGE, SPECS, apart, by_name, quick, random_input, random_layer

POINTWISE = {"pointwise", "pointwise, grouped", "transposed pointwise"}
DEPTHWISE = {"depthwise", "transposed depthwise"}
REFUSED = {
    "cp_mobilenet": POINTWISE | DEPTHWISE,
    "cp_factorized": POINTWISE | DEPTHWISE,
    "tucker": POINTWISE | DEPTHWISE,
    "tt": POINTWISE | DEPTHWISE,
    "spatial_svd": POINTWISE | {"1-D", "1-D circular", "one axis", "transposed 1-D"},
    "channel_svd": POINTWISE | DEPTHWISE | {"one output channel"},
}


pairs = pytest.mark.parametrize(
    ("factorization", "spec"),
    [
        pytest.param(factorization, spec, id=f"{factorization.name}, {name}")
        for factorization in EVERY_STAGE
        for name, spec in SPECS.items()
        if not factorization.rejects(spec)
    ],
)


@pytest.mark.parametrize("factorization", ALL, ids=by_name)
@pytest.mark.parametrize("name", SPECS)
def test_it_takes_all_but_what_it_refuses_with_a_reason(factorization: Factorization, name: str) -> None:
    spec = SPECS[name]
    refused = factorization.rejects(spec)
    if factorization.name == "pointwise_svd":
        assert (refused is None) == ("pointwise" in name)
    else:
        assert (refused is not None) == (name in REFUSED[factorization.name])
    if refused is not None:
        assert len(refused.reason) > 20
        with pytest.raises(RefusedError):
            factorization.layout(spec, (1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pairs
def test_the_chain_computes_what_it_composes_to_at_every_rank(
    factorization: Factorization, spec: ConvSpec, dtype: torch.dtype
) -> None:
    factorization = quick(factorization)
    layer, x = random_layer(spec, dtype), random_input(spec, dtype)
    allowed = 1e-5 if dtype == torch.float32 else 1e-12
    expected_shape = run(layer, x).shape
    for rank in factorization.ranks(spec):
        chain = factorization.decompose(layer, rank)
        assert chain.specs == factorization.layout(spec, rank)
        kernel = compose(chain)
        dense = run(ConvLayer(spec, kernel, layer.bias), x)
        assert dense.shape == expected_shape
        assert apart(dense, run(chain, x)) < allowed
        assert apart(dense[0], run(chain, x[0])) < allowed
        assert kernel.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pairs
def test_at_full_rank_with_every_stage_it_is_the_convolution_itself(
    factorization: Factorization, spec: ConvSpec, dtype: torch.dtype
) -> None:
    layer, x = random_layer(spec, dtype), random_input(spec, dtype)
    chain = factorization.decompose(layer, factorization.max_rank(spec))
    allowed = 1e-5 if dtype == torch.float32 else 1e-12
    assert len(chain.layers) > 1
    assert apart(layer.weight, compose(chain)) < allowed
    assert apart(run(layer, x), run(chain, x)) < allowed


@pytest.mark.parametrize("factorization", EVERY_STAGE, ids=by_name)
def test_a_larger_rank_is_nearer(factorization: Factorization) -> None:
    spec = ConvSpec.parse(6, 8, (1, 1) if factorization.name == "pointwise_svd" else (3, 3))
    layer = random_layer(spec)
    errors = [apart(layer.weight, compose(factorization.decompose(layer, rank))) for rank in factorization.ranks(spec)]
    assert errors[-1] < 1e-3
    assert all(later < earlier + 0.05 for earlier, later in pairwise(errors))
    assert errors[0] < 1


@pairs
def test_a_layout_is_the_same_convolution_as_the_spec(factorization: Factorization, spec: ConvSpec) -> None:
    stages = factorization.layout(spec, factorization.smallest_rank(spec))
    whole = composed_spec(stages)
    size = (17, 15, 16)[: spec.order]
    assert whole.output_size(size) == spec.output_size(size)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "padding_mode", "bias"):
        assert getattr(whole, name) == getattr(spec, name)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.75, 1.0, 1.7])
@pairs
def test_a_fraction_is_the_largest_rank_within_it(
    factorization: Factorization, spec: ConvSpec, fraction: float
) -> None:
    ranks = factorization.ranks(spec)
    params = [sum(stage.params for stage in factorization.layout(spec, rank)) for rank in ranks]
    assert params == sorted(params)
    found = factorization.rank_within(spec, fraction)
    fitting = [rank for rank, cost in zip(ranks, params, strict=True) if cost <= fraction * spec.params]
    assert found == (fitting[-1] if fitting else None)
    if found is None:
        assert isinstance(resolve_rank(factorization, spec, fraction, clip=True), Skip)


@pytest.mark.parametrize("factorization", EVERY_STAGE, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_single(factorization: Factorization, dtype: torch.dtype) -> None:
    spec = ConvSpec.parse(8, 8, (1, 1) if factorization.name == "pointwise_svd" else (3, 3), bias=True)
    layer = random_layer(spec, dtype)
    chain = factorization.decompose(layer, factorization.max_rank(spec))
    assert {stage.weight.dtype for stage in chain.layers} == {dtype}
    assert apart(layer.weight, compose(chain)) < 0.05


@pytest.mark.parametrize("factorization", EVERY_STAGE, ids=by_name)
def test_decomposing_writes_to_nothing_and_is_repeatable(factorization: Factorization) -> None:
    spec = ConvSpec.parse(6, 8, (1, 1) if factorization.name == "pointwise_svd" else (3, 3), bias=True)
    layer = random_layer(spec)
    weight = layer.weight.clone()
    rank = factorization.ranks(spec)[2]
    first, second = (factorization.decompose(layer, rank) for _ in range(2))
    assert layer.weight.equal(weight)
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one.weight.equal(other.weight)
        assert not one.weight.requires_grad


def test_tucker_drops_the_pointwise_stage_of_a_full_side() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    assert [str(s) for s in Tucker().layout(spec, (8, 3))] == ["Conv2d(6→3, 1×1)", "Conv2d(3→8, 3×3)"]
    assert [str(s) for s in Tucker().layout(spec, (4, 6))] == ["Conv2d(6→4, 3×3)", "Conv2d(4→8, 1×1)"]
    assert len(Tucker().layout(spec, (8, 6))) == 1
    assert len(Tucker(keep_full_sides=True).layout(spec, (8, 6))) == 3
    layer = random_layer(spec)
    for rank in ((8, 3), (4, 6), (8, 6)):
        kept, dropped = (apart(layer.weight, compose(t.decompose(layer, rank))) for t in (EVERY_TUCKER, Tucker()))
        assert abs(kept - dropped) < 1e-12


EVERY_TUCKER = Tucker(keep_full_sides=True)


def test_spatial_svd_takes_either_order() -> None:
    spec = ConvSpec.parse(4, 4, (3, 5), stride=(2, 1), padding=(1, 2))
    first, last = SpatialSVD().layout(spec, (2,)), SpatialSVD(last_axes_first=True).layout(spec, (2,))
    assert [stage.kernel_size for stage in first] == [(3, 1), (1, 5)]
    assert [stage.kernel_size for stage in last] == [(1, 5), (3, 1)]
    cube = ConvSpec.parse(4, 4, (3, 3, 3))
    assert [stage.kernel_size for stage in SpatialSVD().layout(cube, (2,))] == [(3, 1, 1), (1, 3, 3)]
    layer, x = random_layer(spec), random_input(spec)
    for order in (SpatialSVD(), SpatialSVD(last_axes_first=True)):
        assert apart(run(layer, x), run(order.decompose(layer, order.max_rank(spec)), x)) < 1e-12


def test_spatial_svd_splits_even_a_depthwise_kernel() -> None:
    spec = ConvSpec.parse(5, 5, (3, 3), groups=5)
    weight = torch.einsum("ca,cb->cab", torch.randn(5, 3).double(), torch.randn(5, 3).double())[:, None]
    chain = SpatialSVD().decompose(ConvLayer(spec, weight), (1,))
    assert chain.params == 5 * 6
    assert apart(weight, compose(chain)) < 1e-12


@pytest.mark.parametrize("name", ["cp_mobilenet", "cp_factorized"])
@pytest.mark.parametrize("groups", [1, 2])
def test_cp_recovers_a_kernel_of_its_rank(name: str, groups: int) -> None:
    spec = ConvSpec.parse(16 * groups, 12 * groups, (3, 3), groups=groups)
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(n, 4, generator=generator) for n in (12 * groups, 16, 3, 3)]
    layer = ConvLayer(spec, torch.einsum("or,ir,ar,br->oiab", *factors))
    chain = parse_factorization(name).decompose(layer, (4,))
    assert apart(layer.weight, compose(chain)) < 1e-3


def test_cp_begins_at_random_only_with_a_generator() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    layer, method = random_layer(spec), CPMobilenet(init="random", sweeps=3)
    with pytest.raises(ArgumentError, match="generator"):
        method.decompose(layer, (4,))
    one, again, other = (
        compose(method.decompose(layer, (4,), generator=torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    )
    assert one.equal(again)
    assert not one.equal(other)


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "NaN"), (float("inf"), "1 NaN or Inf of 432"), ("meta", "meta device")]
)
def test_weights_without_values_are_refused(value: float | str, words: str) -> None:
    layer = random_layer(ConvSpec.parse(6, 8, (3, 3)))
    if isinstance(value, str):
        layer = replace(layer, weight=layer.weight.to("meta"))
    else:
        layer.weight[1, 2, 0, 0] = value
    with pytest.raises(WeightError, match=words):
        Tucker().decompose(layer, (2, 2))


@pytest.mark.parametrize("rank", [(0, 2), (2, -1), (9, 2), (2, 7), (2,), (2, 2, 2)])
def test_an_impossible_rank_is_refused(rank: tuple[int, ...]) -> None:
    with pytest.raises(RankError, match="tucker"):
        Tucker().layout(ConvSpec.parse(6, 8, (3, 3)), rank)


def test_tt_ranks_that_bound_each_other_are_refused_or_lowered() -> None:
    spec, tt = ConvSpec.parse(6, 8, (3, 3)), parse_factorization("tt")
    with pytest.raises(RankError, match="bound each other"):
        tt.layout(spec, (1, 9, 8))
    assert tt.clip(spec, (1, 9, 8)) == (1, 3, 8)
    assert tt.clip(spec, (100, 100, 1)) == (6, 3, 1)


@pytest.mark.parametrize("factorization", EVERY_STAGE, ids=by_name)
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_no_scale_is_too_small_or_too_large(factorization: Factorization, size: float) -> None:
    spec = ConvSpec.parse(6, 8, (1, 1) if factorization.name == "pointwise_svd" else (3, 3))
    layer = random_layer(spec, torch.float32)
    scaled = replace(layer, weight=layer.weight * size)
    rank = factorization.ranks(spec)[2]
    expected, found = (compose(factorization.decompose(one, rank)) for one in (layer, scaled))
    assert apart(expected, found.double() / size) < 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = factorization.decompose(layer, rank)
    assert apart(expected, compose(under_autocast)) < 1e-6


@pytest.mark.parametrize("options", [{"init": "ones"}, {"sweeps": 0}, {"sweeps": "9"}, {"tolerance": -1.0}])
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        CPMobilenet(**options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError):
        Tucker(sweeps=-1)


def test_a_factorization_of_ones_own_inherits_everything() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Halves(Factorization):
        """An own class needs these four and no registration."""

        name = "halves"

        def _rejects(self, block: ConvSpec) -> str | None:
            return PointwiseSVD()._rejects(block)

        def _max_rank(self, block: ConvSpec) -> tuple[int, ...]:
            return PointwiseSVD()._max_rank(block)

        def _stages(self, block: ConvSpec, rank: tuple[int, ...]) -> tuple[ConvSpec, ...]:
            return PointwiseSVD()._stages(block, rank)

        def _weights(self, block, weight, rank, random):  # type: ignore[no-untyped-def]
            return PointwiseSVD()._weights(block, weight, rank, random)

    spec = ConvSpec.parse(6, 12, (1, 1), groups=3, bias=True)
    layer = random_layer(spec)
    assert apart(layer.weight, compose(Halves().decompose(layer, (2,)))) < 1e-12


@st.composite
def cases(draw: st.DrawFn) -> tuple[Factorization, ConvSpec, float]:
    order = draw(st.integers(1, 3))
    axes = st.tuples(*[st.integers(1, 4)] * order)
    groups = draw(st.integers(1, 3))
    kernel = draw(axes)
    dilation = draw(st.tuples(*[st.integers(1, 2)] * order))
    spec = ConvSpec(
        in_channels=groups * draw(st.integers(1, 5)),
        out_channels=groups * draw(st.integers(1, 5)),
        kernel_size=kernel,
        stride=draw(axes),
        padding=draw(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * order)),
        dilation=dilation,
        groups=groups,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )
    return draw(st.sampled_from(EVERY_STAGE)), spec, draw(st.floats(0, 1))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
def test_laws_on_any_convolution(case: tuple[Factorization, ConvSpec, float]) -> None:
    factorization, spec, height = case
    if factorization.rejects(spec):
        return
    ranks = factorization.ranks(spec)
    rank = ranks[math.floor(height * (len(ranks) - 1))]
    layer, x = random_layer(spec), random_input(spec)
    chain = quick(factorization).decompose(layer, rank)
    dense = run(ConvLayer(spec, compose(chain), layer.bias), x)
    assert chain.specs == factorization.layout(spec, rank)
    assert dense.shape[2:] == spec.output_size(tuple(x.shape[2:])) == chain.output_size(tuple(x.shape[2:]))
    assert (run(chain, x) - dense).norm() <= 1e-11 * dense.norm()


@pytest.mark.parametrize("factorization", ALL, ids=by_name)
@pytest.mark.parametrize("name", ["plain", "groups", "transposed", "3-D", "pointwise", "one axis"])
def test_the_error_is_within_its_bound_which_is_exact_for_svds(name: str, factorization: Factorization) -> None:
    spec = SPECS[name]
    if factorization.rejects(spec):
        pytest.skip("it is for other convolutions")
    layer = random_layer(spec)
    ranks = factorization.ranks(spec)
    bounds = factorization.bounds(layer, ranks)
    assert bounds is not None
    for rank, bound in list(zip(ranks, bounds, strict=True))[:: max(1, len(ranks) // 4)]:
        found = relative_square(layer, factorization, rank)
        assert found <= 1.001 * bound + 1e-5
        if factorization.name.endswith("svd"):
            assert found == pytest.approx(bound, abs=1e-5)
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("factor", [1e-25, 1e-18, 1.0, 1e22])
def test_errors_are_relative_whatever_the_size_of_the_weights(factor: float) -> None:
    spec = ConvSpec.parse(8, 8, (3, 3))
    layer = ConvLayer(spec, factor * torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(0)))
    unit = ConvLayer(spec, layer.weight / factor)
    (bound,) = ChannelSVD().bounds(layer, [(2,)]) or ()
    (expected,) = ChannelSVD().bounds(unit, [(2,)]) or ()
    assert bound == pytest.approx(expected, rel=1e-3)
    assert relative_square(layer, ChannelSVD(), (2,)) == pytest.approx(expected, rel=1e-3)
    metric = KroneckerFisher(KroneckerMoment((torch.eye(72)[None],)), KroneckerMoment((torch.eye(8)[None],)))
    if factor < 1e19:  # whose squares can be told
        for method in (ChannelSVD(), CPMobilenet()):
            (nats,) = method.increases(layer, metric, [(2,)])
            (unit_nats,) = method.increases(unit, metric, [(2,)])
            assert nats / factor**2 == pytest.approx(unit_nats, rel=1e-2)


@pytest.mark.parametrize("rank", [[2, 2], 4, (2,), (2, 2, 2)])
def test_ranks_of_another_kind_get_errors_of_ours(rank: Any) -> None:
    layer = random_layer(ConvSpec.parse(8, 8, (3, 3)))
    calls: list[Callable[[], Any]] = [
        lambda: Tucker().decompose(layer, rank),
        lambda: Tucker().layout(layer.spec, rank),
        lambda: Tucker().clip(layer.spec, rank),
    ]
    for call in calls:
        with pytest.raises(RankError, match="has 2 ranks"):
            call()


def test_all_of_the_energy_can_be_asked_for_where_a_rank_keeps_it() -> None:
    spec = ConvSpec.parse(16, 16, (1, 1))
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(16, 4, generator=random) @ torch.randn(4, 16, generator=random))[..., None, None]
    candidate = Candidate("conv", ConvLayer(spec, weight), ((spec, None),))
    assert Energy(1.0).rank_for(PointwiseSVD(), candidate) == (4,)


def test_settings_of_precision_are_left_as_they_were_and_do_not_matter() -> None:
    def settings() -> list[str]:
        backends: Any = torch.backends
        return [place.fp32_precision for place in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)]

    layer = random_layer(ConvSpec.parse(8, 8, (3, 3)))
    expected, usual = compose(Tucker().decompose(layer, (3, 3))), torch.get_float32_matmul_precision()
    try:
        for chosen in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(chosen)
            before = settings()
            with no_reduced_precision(torch.device("cpu")):
                assert settings() == ["ieee"] * 3
                assert compose(Tucker().decompose(layer, (3, 3))).equal(expected)
                assert settings() == ["ieee"] * 3  # until the last has left
            with pytest.raises(RankError), no_reduced_precision(torch.device("cpu")):
                Tucker().decompose(layer, (9, 9))
            assert settings() == before
            assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(usual)
