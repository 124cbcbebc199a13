"""What every factorization does with the values of weights: checks, scales, precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fxfact.conv import ConvLayer, ConvSpec, KroneckerFisher, KroneckerMoment, compose
from fxfact.errors import ArgumentTypeError, RankError, WeightError
from fxfact.factorizations import ChannelSVD, CPMobilenet, Tucker, WeightedLayer, check_generator, weight_scale
from fxfact.planning.error_curves import relative_square_error
from fxfact.utils import no_reduced_precision
from tests.support import random_layer


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "NaN"), (float("inf"), "1 NaN or Inf of 432"), ("meta", "meta device")]
)
def test_weight_without_finite_values_is_refused(value: float | str, words: str) -> None:
    layer = random_layer(ConvSpec.parse(6, 8, (3, 3)))
    if isinstance(value, str):
        layer = replace(layer, weight=layer.weight.to("meta"))
    else:
        layer.weight[1, 2, 0, 0] = value
    with pytest.raises(WeightError, match=words):
        Tucker().decompose(layer, (2, 2))


def test_weight_of_integers_is_refused() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    with pytest.raises(WeightError, match="int64"):
        Tucker().decompose(ConvLayer(spec, torch.ones(spec.weight_shape, dtype=torch.int64)), (2, 2))


@pytest.mark.parametrize("factor", [1e-25, 1e-18, 1.0, 1e22])
def test_errors_are_relative_for_any_size_of_the_weights(factor: float) -> None:
    spec = ConvSpec.parse(8, 8, (3, 3))
    layer = ConvLayer(spec, factor * torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(0)))
    unit = ConvLayer(spec, layer.weight / factor)
    (estimate,) = ChannelSVD().error_estimates(layer, [(2,)]) or ()
    (expected,) = ChannelSVD().error_estimates(unit, [(2,)]) or ()
    assert estimate == pytest.approx(expected, rel=1e-3)
    assert relative_square_error(layer, ChannelSVD(), (2,)) == pytest.approx(expected, rel=1e-3)
    metric = KroneckerFisher(KroneckerMoment((torch.eye(72)[None],)), KroneckerMoment((torch.eye(8)[None],)))
    if factor < 1e19:  # above, the squares overflow
        for method in (ChannelSVD(), CPMobilenet()):
            (nats,) = method.loss_increases(WeightedLayer(layer, metric), [(2,)])
            (unit_nats,) = method.loss_increases(WeightedLayer(unit, metric), [(2,)])
            assert nats / factor**2 == pytest.approx(unit_nats, rel=1e-2)


@pytest.mark.parametrize(("largest", "scale"), [(1.0, 1.0), (1e9, 1.0), (1e12, 1e12), (1e-12, 1e-12), (0.0, 1.0)])
def test_weight_scale_is_one_unless_squares_leave_single_precision(largest: float, scale: float) -> None:
    assert weight_scale(torch.tensor([0.0, -largest], dtype=torch.float64)) == scale


def test_generator_must_be_one_of_torch() -> None:
    check_generator(None)
    check_generator(torch.Generator())
    with pytest.raises(ArgumentTypeError, match="got int"):
        check_generator(3)


def test_settings_of_precision_do_not_matter_and_are_restored() -> None:
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
                assert settings() == ["ieee"] * 3  # restored when the outermost context ends
            with pytest.raises(RankError), no_reduced_precision(torch.device("cpu")):
                Tucker().decompose(layer, (9, 9))
            assert settings() == before
            assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(usual)
