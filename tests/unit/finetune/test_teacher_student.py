"""Which networks and batches can be compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import ArgumentTypeError, CalibrationError, PlanError
from tests.support import FakeTimer, Small

TUNERS = [fxfact.refit, fxfact.distill]


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(4, 16, 3)

    def forward(self, x: Tensor) -> Any:
        maps = self.body(x)
        return maps.mean((2, 3)), maps.flatten(0, 1)


class Masked(TwoOutputs):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3)).masked_fill(torch.arange(16) < 2, -torch.inf)


@pytest.mark.parametrize(
    ("model", "likelihood", "words"),
    [(TwoOutputs(), {"9": None}, "there is no output '9'"), (Masked(), None, "output is NaN or Inf")],
)
def test_outputs_that_cannot_be_compared_are_refused(
    model: nn.Module, likelihood: Any, words: str, data: Tensor
) -> None:
    small = fxfact.factorize(model.eval(), "tucker", rank=0.5)
    for tune in TUNERS:
        with pytest.raises(CalibrationError, match=words):
            tune(small, model, data.split(8), likelihood=likelihood)


@pytest.mark.parametrize("tune", TUNERS)
def test_original_must_be_the_network_of_the_last_plan(tune: Any, small: Small, data: Tensor) -> None:
    once = fxfact.factorize(small, "tucker", rank=0.5, example_inputs=data[:2])
    twice = fxfact.factorize(once, "channel_svd", rank=0.5, example_inputs=data[:2], allow_growth=True)
    with pytest.raises(PlanError, match="the network that the plan was made for"):
        tune(twice, small, data.split(8))
    _, report = fxfact.refit(twice, once, data.split(8))
    assert report.after <= report.before


@pytest.mark.parametrize("tune", TUNERS)
def test_stages_that_were_merged_are_refused(tune: Any, data: Tensor) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(4)).eval()
    plain(data)
    factorized = fxfact.factorize(plain, "tucker", rank=0.3, example_inputs=data)
    merged = fxfact.for_inference(factorized, data, timer=FakeTimer())
    with pytest.raises(PlanError, match="stages here, and the network has other modules"):
        tune(merged, plain, data.split(8))


@pytest.mark.parametrize("tune", TUNERS)
def test_batches_and_networks_that_do_not_fit_are_refused(
    tune: Any, small: Small, factorized: nn.Module, data: Tensor
) -> None:
    with pytest.raises(CalibrationError, match="at least two batches"):
        tune(factorized, small, [data])
    with pytest.raises(CalibrationError, match="fails on a batch"):
        tune(factorized, small, data[:, :3].split(8))
    other = Small()
    other.first = nn.Conv2d(4, 8, 5, padding=2)
    with pytest.raises(PlanError, match="first: the plan was made for"):
        tune(factorized, other.eval(), data.split(8))
    with pytest.raises(ArgumentTypeError, match="original must be"):
        tune(factorized, None, data.split(8))
