"""Factorized layers of order 1 to 5: each equals the dense convolution with its composed kernel."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact.nn as fnn
from fxfact.errors import ArgumentError
from tests.support import apart

KERNEL = (3, 2, 1, 3, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "strided": {"stride": (2, 1, 3, 1, 2)},
    "padded": {"padding": (1, 0, 2, 1, 1)},
    "dilated": {"dilation": (1, 2, 3, 1, 2), "padding": 1},
    "same": {"padding": "same"},
    "groups": {"groups": 2, "stride": 2},
    "reflect": {"padding": (1, 0, 1, 1, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": "same", "padding_mode": "circular"},
    "transposed": {"transposed": True, "stride": 2, "output_padding": 1, "dilation": (1, 2, 1, 1, 2)},
    "transposed, cropped": {"transposed": True, "padding": (2, 1, 0, 2, 1), "groups": 2},
}
VARIANTS = [
    ("cp", "factorized"),
    ("cp", "mobilenet"),
    ("cp", "reconstructed"),
    ("tucker", "factorized"),
    ("tucker", "reconstructed"),
    ("tt", "factorized"),
    ("tt", "reconstructed"),
]
variants = pytest.mark.parametrize(("factorization", "implementation"), VARIANTS, ids=str)


def dense(order: int, name: str) -> fnn.ConvNd:
    settings = {key: value[:order] if isinstance(value, tuple) else value for key, value in SETTINGS[name].items()}
    return fnn.ConvNd(4, 8, KERNEL[:order], dtype=torch.float64, **settings)


def sample(order: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, *[6, 5, 4, 6, 5][:order], generator=generator, dtype=torch.float64)


def layer_of(conv: nn.Module, factorization: str, implementation: str, rank: Any = 0.7) -> fnn.FactorizedConv:
    return fnn.FactorizedConv.from_conv(
        conv, rank, factorization=factorization, implementation=implementation, decompose_weights=False
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("order", [1, 2, 3, 4, pytest.param(5, marks=pytest.mark.integration)])
@variants
def test_layer_equals_the_dense_convolution_with_its_kernel(
    factorization: str, implementation: str, order: int, name: str
) -> None:
    layer, x = layer_of(dense(order, name), factorization, implementation), sample(order)
    back = layer.to_conv()
    assert isinstance(back, fnn.ConvNd) == (order > 3)
    assert apart(back(x), layer(x)) < 1e-10
    assert apart(back(x[0]), layer(x[0])) < 1e-10


@pytest.mark.parametrize("name", ["padded", "groups", "circular", "transposed"])
@pytest.mark.parametrize(
    ("kind", "order"), [(fnn.CPConv, 4), (fnn.TuckerConv, 4), (fnn.TTConv, 4), (fnn.TuckerConv, 5), (fnn.TTConv, 5)]
)
def test_layer_of_a_kernel_of_high_order_equals_it_at_the_largest_rank(
    kind: type[fnn.FactorizedConv], order: int, name: str
) -> None:
    conv, x = dense(order, name), sample(order)
    probe = kind.from_conv(conv, 1, decompose_weights=False)
    layer = kind.from_conv(conv, probe.factorization.max_rank(probe.spec))
    assert apart(conv(x), layer(x)) < 1e-10
    assert apart(conv.weight, layer.to_conv().weight) < 1e-10


@pytest.mark.parametrize("order", [4, 5])
@variants
def test_layer_of_high_order_from_random_has_the_output_variance_of_the_dense_layer(
    factorization: str, implementation: str, order: int
) -> None:
    x = torch.randn(2, 8, *[4] * order)
    conv = fnn.ConvNd(8, 8, 2, order=order)
    layers = [
        fnn.FactorizedConv(8, 8, 2, order=order, factorization=factorization, implementation=implementation)
        for _ in range(10)
    ]
    ours = torch.stack([layer(x).var() for layer in layers]).mean()
    assert 0.5 < float((ours / conv(x).var()).detach()) < 2


@pytest.mark.integration
@variants
def test_layer_of_order_4_can_be_traced_compiled_exported_copied_and_trained(
    factorization: str, implementation: str
) -> None:
    layer = layer_of(dense(4, "padded"), factorization, implementation).float()
    x = sample(4).float()
    y = layer(x)
    torch.compiler.reset()
    assert torch.fx.symbolic_trace(layer)(x).equal(y)
    assert apart(y, torch.compile(layer, fullgraph=True, backend="aot_eager")(x)) < 1e-6
    assert apart(y, torch.export.export(layer, (x,)).module()(x)) < 1e-6
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other(x).equal(y)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("order", [1, 2, 3, 4, pytest.param(5, marks=pytest.mark.integration)])
@variants
def test_gradients_are_those_of_finite_differences(factorization: str, implementation: str, order: int) -> None:
    conv = fnn.ConvNd(2, 2, (2, 1, 2, 2, 1)[:order], padding=(1, 0, 1, 0, 1)[:order], stride=2, dtype=torch.float64)
    layer = layer_of(conv, factorization, implementation, rank=2)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(1, 2, *[3, 3, 2, 3, 2][:order], dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


def test_factors_of_order_4_have_six_modes() -> None:
    for kind in (fnn.CPConv, fnn.TuckerConv, fnn.TTConv):
        layer = kind.from_conv(dense(4, "plain"), 0.5)
        assert len(layer.factors.factors) == 6
        again = kind.from_factors(layer.factors, bias=layer.bias)
        assert apart(layer(sample(4)), again(sample(4))) < 1e-10


def test_weight_of_a_layer_of_order_4_takes_scaled_channels() -> None:
    layer = fnn.TuckerConv.from_conv(dense(4, "no bias"), 0.5)
    expected = 3 * layer(sample(4))
    with torch.no_grad():
        layer.weight.mul_(3)
    assert apart(expected, layer(sample(4))) < 1e-10


def test_kernels_beyond_the_memory_are_refused_before_they_are_allocated() -> None:
    with pytest.raises(ArgumentError, match=r"GiB, and the device cpu has"):
        fnn.TuckerConv(64, 64, 3, order=30, rank=32)
    layer = fnn.CPConv(64, 64, 3, order=30, rank=32)  # whose factors are small
    assert sum(p.numel() for p in layer.parameters()) == 32 * (64 + 64 + 30 * 3) + 64
    with pytest.raises(ArgumentError, match=r"GiB"):
        layer.to_conv()
    with pytest.raises(ArgumentError, match=r"GiB"):
        fnn.CPConv(64, 64, 3, order=30, rank=32, implementation="reconstructed")
    assert fnn.TuckerConv(64, 64, 3, order=30, rank=32, device="meta").order == 30
