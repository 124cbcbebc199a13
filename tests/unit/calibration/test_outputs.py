"""How outputs are read: categorical, Gaussian, or by a function of the caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.calibration.outputs import CATEGORICAL
from fxfact.errors import ArgumentError, CalibrationError
from tests.support import Classifier


def test_categorical_gradients_have_the_covariance_of_the_fisher_information_at_temperature_2() -> None:
    logits = torch.randn(1, 4).expand(200_000, 4)
    generator = torch.Generator().manual_seed(0)
    _, (gradients,) = CATEGORICAL.sample_gradients(logits, lambda t: torch.randn(t.shape, generator=generator))
    p = (logits[0] / 2).softmax(0)
    torch.testing.assert_close(
        gradients.T @ gradients / len(gradients), torch.diag(p) - p[:, None] * p, rtol=0.05, atol=2e-3
    )


class TwoTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), x


def test_output_that_does_not_determine_its_loss_is_refused(x: Tensor) -> None:
    with pytest.raises(CalibrationError, match="does not determine its loss"):
        fxfact.calibrate(TwoTensors(), [x])
    with pytest.raises(CalibrationError, match="cannot be 'poisson'"):
        fxfact.calibrate(TwoTensors(), [x], likelihood="poisson")
    with pytest.raises(CalibrationError, match="the function failed on the model's output: TypeError"):
        fxfact.calibrate(TwoTensors(), [x], likelihood=nn.CrossEntropyLoss())
    assert set(fxfact.calibrate(TwoTensors(), [x], likelihood="gaussian").moments) == {"conv"}


def test_samples_are_counted_where_the_loss_is(x: Tensor) -> None:
    class Scaled(Classifier):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scale": self.head.bias[:1], "logits": super().forward(x)}

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).flatten(2).permute(2, 0, 1)  # positions, samples, classes

    assert fxfact.calibrate(Scaled().eval(), x.split(8)).samples == len(x)
    loss: Any = torch.sum
    assert fxfact.calibrate(Sequence().eval(), x.split(8), likelihood=loss).samples == len(x)


def test_likelihood_that_does_not_apply_is_refused(model: nn.Module, x: Tensor) -> None:
    statistics = fxfact.calibrate(model, [x])
    for given in (None, statistics, [x]):
        with pytest.raises(CalibrationError, match="likelihood cannot be 'gausian'"):
            fxfact.plan(model, rank=0.5, calibration=given, likelihood="gausian")
    with pytest.raises(ArgumentError, match="there are none: pass calibration"):
        fxfact.plan(model, rank=0.5, likelihood="gaussian")
    with pytest.raises(ArgumentError, match="the statistics are of 'categorical'"):
        fxfact.plan(model, rank=0.5, calibration=statistics, likelihood="gaussian")
    same = fxfact.plan(model, rank=0.5, calibration=statistics, likelihood="categorical")
    assert same == fxfact.plan(model, rank=0.5, calibration=statistics)


def test_likelihood_of_the_caller_cannot_measure(model: nn.Module, x: Tensor) -> None:
    own = fxfact.calibrate(model, [x], likelihood=lambda output: output.square().sum())
    with pytest.raises(CalibrationError, match=r"a likelihood of your own.*leave out held_out"):
        fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=own, held_out=[x], example_inputs=x[:1])
