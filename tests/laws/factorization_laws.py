"""The laws of a factorization, as a test class to inherit from."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxfact.conv import (
    ConvChain,
    ConvLayer,
    ConvSpec,
    KroneckerFisher,
    KroneckerMoment,
    Skip,
    compose,
    composed_spec,
    run,
)
from fxfact.errors import RefusedError
from fxfact.factorizations import Factorization, WeightedLayer, resolve_rank
from tests.support import SPECS, apart, random_fisher, random_input, random_layer

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@st.composite
def convolutions(draw: st.DrawFn, longest: int) -> ConvSpec:
    """Any convolution that is not transposed, its kernel at most so long along every axis."""
    order = draw(st.integers(1, 3))
    axes = st.tuples(*[st.integers(1, 4)] * order)
    groups = draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(1, longest)] * order))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * order))
    return ConvSpec(
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


class FactorizationLaws:
    """Inherit from this class, and say how the factorization is made. All laws become tests of your class.

    Attributes:
        rejected: the names of the convolutions in ``tests.support.SPECS`` that the factorization rejects.
        kernel_size: of a convolution that it accepts.
        estimates: whether ``error_estimates`` is 'exact', not less than the error ('upper'), or 'none'.
        stages_at_full_rank: the least number of stages at ``max_rank``.
    """

    rejected: frozenset[str] = frozenset()
    kernel_size: tuple[int, ...] = (3, 3)
    estimates: Literal["exact", "upper", "none"] = "none"
    stages_at_full_rank: int = 2

    def make(self) -> Factorization:
        raise NotImplementedError

    def make_quick(self) -> Factorization:
        """Make one that may approximate less well, for laws that hold whatever the quality."""
        return self.make()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise ``accepted`` over the convolutions that the factorization is expected to accept."""
        if "accepted" in metafunc.fixturenames:
            names = [name for name in SPECS if name not in self.rejected]
            metafunc.parametrize("accepted", [SPECS[name] for name in names], ids=names)

    def usual_spec(self, in_channels: int, out_channels: int, *, bias: bool = False) -> ConvSpec:
        return ConvSpec.parse(in_channels, out_channels, self.kernel_size, bias=bias)

    @pytest.mark.parametrize("name", SPECS)
    def test_rejects_only_some_convolutions_and_says_why(self, name: str) -> None:
        factorization, spec = self.make(), SPECS[name]
        refused = factorization.rejects(spec)
        assert (refused is not None) == (name in self.rejected)
        if refused is not None:
            assert len(refused.reason) > 20
            with pytest.raises(RefusedError):
                factorization.layout(spec, (1,))

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
    def test_chain_computes_its_composed_kernel_at_every_rank(self, accepted: ConvSpec, dtype: torch.dtype) -> None:
        factorization = self.make_quick()
        layer, x = random_layer(accepted, dtype), random_input(accepted, dtype)
        allowed = TOLERANCE[dtype]
        expected_shape = run(layer, x).shape
        for rank in factorization.ranks(accepted):
            chain = factorization.decompose(layer, rank)
            assert chain.specs == factorization.layout(accepted, rank)
            kernel = compose(chain)
            dense = run(ConvLayer(accepted, kernel, layer.bias), x)
            assert dense.shape == expected_shape
            assert apart(dense, run(chain, x)) < allowed
            assert apart(dense[0], run(chain, x[0])) < allowed
            assert kernel.isfinite().all()

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
    def test_chain_at_full_rank_is_the_convolution(self, accepted: ConvSpec, dtype: torch.dtype) -> None:
        factorization = self.make()
        layer, x = random_layer(accepted, dtype), random_input(accepted, dtype)
        chain = factorization.decompose(layer, factorization.max_rank(accepted))
        assert len(chain.layers) >= self.stages_at_full_rank
        assert apart(layer.weight, compose(chain)) < TOLERANCE[dtype]
        assert apart(run(layer, x), run(chain, x)) < TOLERANCE[dtype]

    def test_larger_rank_is_closer(self) -> None:
        factorization, spec = self.make(), self.usual_spec(4, 5)
        layer, ranks = random_layer(spec), dict.fromkeys((*factorization.ranks(spec), factorization.max_rank(spec)))
        errors = [apart(layer.weight, compose(factorization.decompose(layer, rank))) for rank in ranks]
        assert errors[-1] < 1e-3
        assert all(later < earlier + 0.05 for earlier, later in pairwise(errors))
        assert errors[0] < 1

    def test_layout_is_the_same_convolution(self, accepted: ConvSpec) -> None:
        factorization = self.make()
        whole = composed_spec(factorization.layout(accepted, factorization.smallest_rank(accepted)))
        size = (17, 15, 16)[: accepted.order]
        assert whole.output_size(size) == accepted.output_size(size)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "padding_mode"):
            assert getattr(whole, name) == getattr(accepted, name)
        assert whole.bias == accepted.bias

    def test_layouts_are_those_of_each_rank(self, accepted: ConvSpec) -> None:
        factorization = self.make()
        ranks = factorization.ranks(accepted)
        assert factorization.layouts(accepted, ranks) == [factorization.layout(accepted, rank) for rank in ranks]
        assert all(factorization.clip(accepted, rank) == rank for rank in ranks)

    def test_fraction_is_the_largest_rank_within_it(self, accepted: ConvSpec) -> None:
        factorization = self.make()
        ranks = factorization.ranks(accepted)
        params = [sum(stage.params for stage in factorization.layout(accepted, rank)) for rank in ranks]
        assert params == sorted(params)
        for fraction in (0.1, 0.25, 0.5, 0.75, 1.0, 1.7):
            fitting = [rank for rank, cost in zip(ranks, params, strict=True) if cost <= fraction * accepted.params]
            assert factorization.ranks_within(accepted, fraction) == tuple(fitting)
            found = factorization.rank_within(accepted, fraction)
            assert found == (fitting[-1] if fitting else None)
            if found is None:
                assert isinstance(resolve_rank(factorization, accepted, fraction, clip=True), Skip)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_decomposed_in_single(self, dtype: torch.dtype) -> None:
        factorization, spec = self.make(), self.usual_spec(8, 8, bias=True)
        layer = random_layer(spec, dtype)
        chain = factorization.decompose(layer, factorization.max_rank(spec))
        assert {stage.weight.dtype for stage in chain.layers} == {dtype}
        assert apart(layer.weight, compose(chain)) < 0.05

    def test_decompose_changes_nothing_and_is_repeatable(self) -> None:
        factorization, spec = self.make(), self.usual_spec(6, 8, bias=True)
        layer = random_layer(spec)
        weight = layer.weight.clone()
        rank = factorization.ranks(spec)[2]
        first, second = (factorization.decompose(layer, rank) for _ in range(2))
        assert layer.weight.equal(weight)
        for one, other in zip(first.layers, second.layers, strict=True):
            assert one.weight.equal(other.weight)
            assert not one.weight.requires_grad

    @pytest.mark.parametrize("size", [1e-25, 1e25])
    def test_scale_of_the_weights_and_autocast_do_not_matter(self, size: float) -> None:
        factorization, spec = self.make(), self.usual_spec(6, 8)
        layer = random_layer(spec, torch.float32)
        scaled = replace(layer, weight=layer.weight * size)
        rank = factorization.ranks(spec)[2]
        expected, found = (compose(factorization.decompose(one, rank)) for one in (layer, scaled))
        assert apart(expected, found.double() / size) < 1e-3
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = factorization.decompose(layer, rank)
        assert apart(expected, compose(under_autocast)) < 1e-6

    @settings(
        max_examples=50,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(data=st.data(), height=st.floats(0, 1))
    def test_laws_hold_for_any_convolution(self, data: st.DataObject, height: float) -> None:
        factorization = self.make_quick()
        spec = data.draw(convolutions(longest=4 if max(self.kernel_size) > 1 else 1))
        if factorization.rejects(spec):
            return
        ranks = factorization.ranks(spec)
        rank = ranks[math.floor(height * (len(ranks) - 1))]
        layer, x = random_layer(spec), random_input(spec)
        chain = factorization.decompose(layer, rank)
        dense = run(ConvLayer(spec, compose(chain), layer.bias), x)
        assert chain.specs == factorization.layout(spec, rank)
        assert dense.shape[2:] == spec.output_size(tuple(x.shape[2:])) == chain.output_size(tuple(x.shape[2:]))
        assert (run(chain, x) - dense).norm() <= 1e-11 * dense.norm()

    @pytest.mark.parametrize("name", ["plain", "groups", "transposed", "3-D", "pointwise", "one axis"])
    def test_error_is_within_its_estimate(self, name: str) -> None:
        factorization, spec = self.make(), SPECS[name]
        if name in self.rejected:
            return
        layer, ranks = random_layer(spec), factorization.ranks(spec)
        estimates = factorization.error_estimates(layer, ranks)
        assert (estimates is None) == (self.estimates == "none")
        if estimates is None:
            return
        for rank, estimate in list(zip(ranks, estimates, strict=True))[:: max(1, len(ranks) // 4)]:
            error = apart(layer.weight, compose(factorization.decompose(layer, rank))) ** 2
            assert error <= 1.001 * estimate + 1e-5
            if self.estimates == "exact":
                assert error == pytest.approx(estimate, abs=1e-5)
        assert estimates == sorted(estimates, reverse=True)

    def test_chain_in_a_metric_is_closer_in_it_than_that_in_the_frobenius_norm(self, accepted: ConvSpec) -> None:
        factorization, layer, metric = self.make(), random_layer(accepted), random_fisher(accepted)
        ranks = factorization.ranks(accepted)
        rank = ranks[len(ranks) // 3]
        chain, plain = (factorization.decompose(layer, rank, metric=given) for given in (metric, None))
        assert chain.specs == factorization.layout(accepted, rank)
        reached, reached_plain = (
            metric.loss_increase(accepted, compose(found) - layer.weight) for found in (chain, plain)
        )
        whole = metric.loss_increase(accepted, layer.weight)
        assert reached <= reached_plain + 1e-4 * whole
        (estimate,) = factorization.loss_increases(WeightedLayer(layer, metric), [rank])
        assert 0.95 * reached - 1e-5 * whole <= estimate <= 2 * reached + 1e-3 * whole

    def test_metric_may_lack_rank_or_vanish(self) -> None:
        factorization = self.make()
        spec = replace(self.usual_spec(6, 8), groups=2)
        layer, metric = random_layer(spec), random_fisher(spec, rank=2)
        rank = factorization.ranks(spec)[1]
        chain = factorization.decompose(layer, rank, metric=metric)
        assert all(stage.weight.isfinite().all() for stage in chain.layers)
        zero = KroneckerFisher(metric.input, KroneckerMoment(tuple(0 * factor for factor in metric.output.factors)))
        plain = factorization.decompose(layer, rank)
        assert torch.equal(compose(factorization.decompose(layer, rank, metric=zero)), compose(plain))

    def test_metric_may_vanish_for_some_groups(self) -> None:
        factorization = self.make()
        spec = replace(self.usual_spec(6, 8), groups=2)
        layer, metric = random_layer(spec), random_fisher(spec)
        rank = factorization.ranks(spec)[1]
        plain, whole = (factorization.decompose(layer, rank, metric=given) for given in (None, metric))
        half = KroneckerMoment(tuple(torch.stack([factor[0], 0 * factor[1]]) for factor in metric.output.factors))
        found = factorization.decompose(layer, rank, metric=KroneckerFisher(metric.input, half))
        first, second = compose(found).chunk(2)
        torch.testing.assert_close(first, compose(whole).chunk(2)[0])
        torch.testing.assert_close(second, compose(plain).chunk(2)[1])

    def test_joint_chains_hold_equal_shared_stages_and_the_best_own_one(self, accepted: ConvSpec) -> None:
        factorization, metric = self.make(), random_fisher(accepted)
        layers, ranks = [random_layer(accepted, seed=seed) for seed in range(3)], factorization.ranks(accepted)
        for each in ranks:
            stages, shared = factorization.layout(accepted, each), factorization.shared_stages(accepted, each)
            held = sum(math.prod(stages[k].weight_shape) for k in shared)
            assert factorization.shared_params(accepted, each) == held
        rank = ranks[len(ranks) // 2]
        shared = factorization.shared_stages(accepted, rank)
        assert len(shared) in (0, len(factorization.layout(accepted, rank)) - 1)
        metrics = [metric, metric, None]
        if not shared:
            with pytest.raises(RefusedError, match="no stages that layers can share"):
                factorization.decompose_jointly(layers, rank, metrics)
            return
        chains = factorization.decompose_jointly(layers, rank, metrics)
        own = next(k for k in range(len(chains[0].layers)) if k not in shared)
        for chain, layer, own_metric in zip(chains, layers, metrics, strict=True):
            assert chain.specs == factorization.layout(accepted, rank)
            assert chain.bias is layer.bias
            assert all(torch.equal(chain.layers[k].weight, chains[0].layers[k].weight) for k in shared)
            least = _distance(layer, compose(chain), own_metric)
            for seed in range(3):  # own stages of other values are worse
                stages = list(chain.layers)
                noise = random_layer(stages[own].spec, seed=seed).weight
                stages[own] = replace(stages[own], weight=stages[own].weight + 0.02 * noise)
                assert _distance(layer, compose(ConvChain(tuple(stages))), own_metric) > least


def _distance(layer: ConvLayer, kernel: Tensor, metric: KroneckerFisher | None) -> float:
    difference = kernel - layer.weight
    return float(difference.norm()) if metric is None else metric.loss_increase(layer.spec, difference)
