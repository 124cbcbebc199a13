"""Spatial SVDs."""

from __future__ import annotations

import torch

from fxfact.conv import ConvLayer, ConvSpec, compose, run
from fxfact.factorizations.spatial_svd import SpatialSVD
from tests.support import apart, random_input, random_layer


def test_spatial_svd_takes_either_order_of_axes() -> None:
    spec = ConvSpec.parse(4, 4, (3, 5), stride=(2, 1), padding=(1, 2))
    first, last = SpatialSVD().layout(spec, (2,)), SpatialSVD(last_axes_first=True).layout(spec, (2,))
    assert [stage.kernel_size for stage in first] == [(3, 1), (1, 5)]
    assert [stage.kernel_size for stage in last] == [(1, 5), (3, 1)]
    cube = ConvSpec.parse(4, 4, (3, 3, 3))
    assert [stage.kernel_size for stage in SpatialSVD().layout(cube, (2,))] == [(3, 1, 1), (1, 3, 3)]
    layer, x = random_layer(spec), random_input(spec)
    for order in (SpatialSVD(), SpatialSVD(last_axes_first=True)):
        assert apart(run(layer, x), run(order.decompose(layer, order.max_rank(spec)), x)) < 1e-12


def test_spatial_svd_splits_a_depthwise_kernel() -> None:
    spec = ConvSpec.parse(5, 5, (3, 3), groups=5)
    weight = torch.einsum("ca,cb->cab", torch.randn(5, 3).double(), torch.randn(5, 3).double())[:, None]
    chain = SpatialSVD().decompose(ConvLayer(spec, weight), (1,))
    assert chain.params == 5 * 6
    assert apart(weight, compose(chain)) < 1e-12
