"""Moments held by their rows, which act as the same moments held as matrices."""

from __future__ import annotations

import pytest
import torch

from fxfact.conv import ConvLayer, ConvSpec, KroneckerFisher, KroneckerMoment, LowRankMoment
from fxfact.factorizations import SVD
from fxfact.factorizations.weighted_kernel import WeightedLayer
from tests.support import apart


def both(rows: int, size: int, seed: int = 0) -> tuple[LowRankMoment, KroneckerMoment]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    matrix = matrix * torch.logspace(0, -1, size, dtype=torch.float64)
    return LowRankMoment(matrix), KroneckerMoment(((matrix.T @ matrix)[None],))


@pytest.mark.parametrize(("rows", "size"), [(5, 12), (12, 12), (1, 7)])
def test_a_moment_of_rows_is_regularized_as_the_matrix_is(rows: int, size: int) -> None:
    low, dense = both(rows, size)
    x = torch.randn(4, size, dtype=torch.float64)
    for _ in range(2):
        assert (low.size, low.groups) == (dense.size, dense.groups) == (size, 1)
        assert apart(dense.factors[0], low.factors[0]) < 1e-12
        assert apart(dense.left_multiply(x), low.left_multiply(x)) < 1e-12
        assert apart(dense.channel_moment(size), low.channel_moment(size)) < 1e-12
        assert apart(dense.diagonals[0], low.diagonals[0]) < 1e-12
        low, dense = low.shrunk(30, 0.1).damped(1e-3), dense.shrunk(30, 0.1).damped(1e-3)
    for expected, found in zip(dense.root_and_inverse(), low.root_and_inverse(), strict=True):
        assert apart(expected, found) < 1e-9


def test_a_moment_of_rows_has_a_root_without_regularization() -> None:
    low, dense = both(3, 9)
    root, inverse = low.root_and_inverse()
    assert apart(dense.factors[0][0], root @ root) < 1e-6
    assert inverse.isfinite().all()
    zero = LowRankMoment(torch.zeros(2, 4)).shrunk(5).damped(1e-3)
    assert float(zero.factors[0].abs().max()) == 0.0


@pytest.mark.parametrize(("into", "out"), [(40, 12), (12, 40), (30, 30)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_layer_is_factorized_alike_in_both_forms(into: int, out: int, transposed: bool) -> None:
    spec = ConvSpec.linear(into, out, transposed=transposed)
    layer = ConvLayer(spec, torch.randn(out, into, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    inputs, outputs = both(9, into), both(8, out, seed=1)
    metrics = [KroneckerFisher(*pair).damped(1e-2) for pair in zip(inputs, outputs, strict=True)]
    expected, found = (SVD().decompose(layer, (4,), metric=metric) for metric in metrics[::-1])
    for one, other in zip(expected.layers, found.layers, strict=True):
        assert apart(one.weight.abs(), other.weight.abs()) < 1e-8
    ranks = SVD().ranks(spec)
    curves = [SVD().loss_increases(WeightedLayer(layer, metric), ranks) for metric in metrics]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-6 * curves[1][0])
    assert metrics[0].loss_increase(spec, layer.weight) == pytest.approx(metrics[1].loss_increase(spec, layer.weight))
