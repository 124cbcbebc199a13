"""No stage of a chain returns much larger values than the chain: half precision overflows in none of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.conv import ConvChain, ConvLayer, ConvSpec, compose, compose_weights, run
from fxfact.errors import WeightError
from fxfact.factorizations import Factorization, Rank, pointwise
from fxfact.factorizations.balance import balance_stages
from tests.support import ALL, EVERY_STAGE, SPECS, by_name, equal_fishers, quick, random_input, random_layer


def random_weight(spec: ConvSpec, generator: torch.Generator, common: float) -> Tensor:
    """A weight that keeps the variance of its input. ``common`` is added to it, in units of its deviation."""
    weight = torch.randn(spec.weight_shape, generator=generator) + common
    return weight / math.prod(spec.weight_shape[1:]) ** 0.5


def inner_peak(chain: ConvChain, x: Tensor) -> float:
    """The largest absolute value between the stages, as a share of the largest one of the output."""
    peaks = []
    for layer in chain.layers:
        x = run(ConvLayer(replace(layer.spec, bias=False), layer.weight.float()), x)
        peaks.append(float(x.abs().max()))
    return max(peaks[:-1], default=0.0) / peaks[-1]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("factorization", EVERY_STAGE, ids=by_name)
def test_peaks_between_the_stages_are_about_those_of_the_output(factorization: Factorization, name: str) -> None:
    spec, generator = SPECS[name], torch.Generator().manual_seed(0)
    if factorization.rejects(spec):
        return
    shape = random_input(spec).shape
    noise = torch.randn(shape, generator=generator)
    by_channel = 2 * torch.randn(1, spec.in_channels, *[1] * spec.order, generator=generator)
    inputs = {"noise": noise, "rectified": noise.relu(), "constant": 0.3 * noise + 1, "by channel": noise + by_channel}
    ranks = factorization.ranks(spec)
    cases = (
        (0.0, ranks[0], torch.float16),
        (0.3, ranks[len(ranks) // 2], torch.bfloat16),
        (-2.0, ranks[-1], torch.half),
    )
    for common, rank, dtype in cases:
        layer = ConvLayer(replace(spec, bias=False), random_weight(spec, generator, common).to(dtype))
        chain = quick(factorization).decompose(layer, rank)
        for kind, x in inputs.items():
            assert inner_peak(chain, x) < 2, (kind, common, rank)


def with_scaled_channels(stages: Sequence[ConvSpec], weights: Sequence[Tensor], factor: float) -> list[Tensor]:
    """The weights of an equal chain whose channels between the stages are larger by powers of two up to ``factor``."""
    parts = [weight.clone() for weight in weights]
    for k, after in enumerate(stages[1:]):
        scale = factor ** (torch.arange(after.in_channels) % 3 / 2)
        parts[k] *= scale.reshape(-1, *[1] * (parts[k].ndim - 1))
        columns = scale.reshape(after.groups, 1, -1).expand(-1, after.out_channels // after.groups, -1)
        parts[k + 1] /= columns.reshape(*parts[k + 1].shape[:2], *[1] * (parts[k].ndim - 2))
    return parts


@pytest.mark.parametrize("name", ["plain", "groups", "1-D", "3-D", "transposed", "transposed, grouped, dilated"])
@pytest.mark.parametrize("factorization", ALL, ids=by_name)
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_balance_does_not_change_a_bit_of_the_composed_kernel(
    factorization: Factorization, name: str, factor: float
) -> None:
    spec = SPECS[name]
    if factorization.rejects(spec):
        return
    layer = ConvLayer(replace(spec, bias=False), random_weight(spec, torch.Generator().manual_seed(0), 0.2))
    chain = quick(factorization).decompose(layer, factorization.ranks(spec)[2])
    unbalanced = with_scaled_channels(chain.specs, [stage.weight for stage in chain.layers], factor)
    assert compose_weights(chain.specs, unbalanced).equal(compose(chain))
    balanced = balance_stages(chain.specs, unbalanced)
    assert compose_weights(chain.specs, balanced).equal(compose(chain))
    for one, other in zip(unbalanced, balanced, strict=True):
        steps = (other / one)[one != 0].log2()
        assert steps.equal(steps.round())
    again = ConvChain(tuple(map(ConvLayer, chain.specs, balanced)))
    assert inner_peak(again, random_input(spec).float()) < 2


def test_balanced_stages_stay_as_they_are() -> None:
    layer = random_layer(SPECS["groups"], torch.float32)
    for factorization in ALL:
        if factorization.rejects(layer.spec) is None:
            chain = quick(factorization).decompose(layer, factorization.ranks(layer.spec)[1])
            weights = balance_stages(chain.specs, [stage.weight for stage in chain.layers])
            assert all(map(torch.equal, balance_stages(chain.specs, weights), weights))


@dataclass(frozen=True, kw_only=True)
class Split(Factorization):
    """The kernel times ``last``, and a diagonal pointwise stage that undoes it: a factorization of somebody else."""

    name = "split"
    last: float = 1.0

    def _rejects(self, block: ConvSpec) -> str | None:
        return None

    def _max_rank(self, block: ConvSpec) -> Rank:
        return (block.out_channels,)

    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        return (block, pointwise(block, block.out_channels, block.out_channels))

    def _weights(
        self, block: ConvSpec, weight: Tensor, rank: Rank, generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        return (weight / self.last, self.last * torch.eye(block.out_channels))


@pytest.mark.parametrize("last", [1e-7, 1e-3, 1e3, 1e9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "groups", "1-D", "transposed 3-D"])
def test_stages_of_another_factorization_keep_their_accuracy_in_half_precision(
    name: str, dtype: torch.dtype, last: float
) -> None:
    layer = random_layer(SPECS[name], dtype)
    chain = Split(last=last).decompose(layer, (layer.spec.block.out_channels,))
    x = random_input(layer.spec, dtype)
    expected, found = run(layer, x), run(chain, x)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_weights_are_kept_in_the_range_of_half_precision() -> None:
    spec = ConvSpec.parse(8, 8, (3, 3))
    stages = Split()._stages(spec, (8,))
    kernel, eye = random_weight(spec, torch.Generator().manual_seed(0), 0.0), torch.eye(8).reshape(8, 8, 1, 1)
    for large in (2.0**-24, 2.0**30):  # in the last stage, then in the first one
        first, last = balance_stages(stages, [kernel * large, eye / large])
        assert max(first.abs().max(), last.abs().max()) < 2**16
        assert compose_weights(stages, [first, last]).equal(compose_weights(stages, [kernel, eye]))
    tiny = kernel * 2.0**-12  # rows are not made smaller than half precision holds
    first, last = balance_stages(stages, [eye.expand(8, 8, 1, 1).new_ones(8, 8, 3, 3) * tiny, eye])
    assert first.equal(tiny)
    large = kernel * 2.0**20  # a kernel that half precision does not hold
    assert balance_stages(stages, [large, eye])[0].abs().max() > 2**16


@pytest.mark.parametrize("values", ["zero", "one channel"])
def test_zeros_are_balanced(values: str) -> None:
    for factorization in ALL:
        spec = SPECS["pointwise" if factorization.name == "svd" else "plain"]
        weight = torch.zeros(spec.weight_shape)
        if values == "one channel":
            weight[3] = 1.0
        chain = factorization.decompose(ConvLayer(replace(spec, bias=False), weight), factorization.ranks(spec)[1])
        assert all(layer.weight.isfinite().all() for layer in chain.layers)
        assert (compose(chain) - weight).abs().max() < 1e-3


def test_factors_that_half_precision_cannot_hold_are_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cancelling(Split):
        """Two large products that nearly cancel out."""

        name = "cancelling"

        def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
            pair = replace(block, out_channels=2)
            return (pair, pointwise(block, 2, block.out_channels))

        def _weights(
            self, block: ConvSpec, weight: Tensor, rank: Rank, generator: torch.Generator | None
        ) -> Sequence[Tensor]:
            return (weight[:1].repeat(2, 1, 1, 1) * 1e6, torch.tensor([1e6, -1e6]).repeat(block.out_channels, 1))

    layer = random_layer(ConvSpec.parse(4, 4, (3, 3)), torch.float16)
    with pytest.raises(WeightError, match=r"a factor reaches .* more than torch.float16 holds. Convert the model"):
        Cancelling().decompose(layer, (1,))


@pytest.mark.parametrize("factorization", ALL, ids=by_name)
def test_stages_fitted_to_a_metric_are_balanced(factorization: Factorization) -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    if factorization.rejects(spec):
        return
    metric, _ = equal_fishers()
    layer = ConvLayer(spec, random_weight(spec, torch.Generator().manual_seed(0), 0.3))
    chain = quick(factorization).decompose(layer, factorization.ranks(spec)[0], metric=metric)
    assert inner_peak(chain, random_input(spec).float() + 1) < 2


@pytest.mark.parametrize("method", ["tucker", "tt", "channel_svd", "spatial_svd", "cp", "cp_factorized"])
def test_half_precision_does_not_overflow_where_the_dense_layer_does_not(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 256, 3, padding=1, bias=False)).eval().requires_grad_(False)
    model[0].weight.copy_(torch.randn(256, 32, 3, 3, generator=generator) * 288**-0.5 + 0.02)
    x = (torch.randn(1, 32, 6, 6, generator=generator).relu() * 9000).half()
    expected = model.half()(x)
    assert 3e4 < float(expected.abs().max()) < 65504
    found = fxfact.factorize(model, method, rank=0.5, example_inputs=x[:, :, :1, :1])(x)
    assert found.isfinite().all()


@pytest.mark.parametrize("method", ["tucker", "channel_svd", "spatial_svd", "cp"])
def test_stages_in_single_precision_have_similar_norms(method: str) -> None:
    """Gradient descent with one learning rate trains such stages well."""
    layer = random_layer(SPECS["plain"], torch.float32)
    factorization = next(known for known in ALL if known.name == {"cp": "cp_mobilenet"}.get(method, method))
    chain = quick(factorization).decompose(layer, factorization.ranks(layer.spec)[-1])
    norms = [float(stage.weight.norm()) for stage in chain.layers]
    assert max(norms) < 10 * min(norms)
