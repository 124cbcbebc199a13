"""PyTorch's default device does not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxfact
from tests.support import Classifier

pytestmark = pytest.mark.integration


def test_default_device_does_not_matter(classifier: Classifier, color_images: Tensor) -> None:
    model, x = classifier, color_images
    kinds = ["tucker", "cp", "channel_svd"]
    with torch.device("meta"):  # stands for a GPU: a tensor that is created there by mistake cannot be used here
        statistics = fxfact.calibrate(model, x.split(8))
        small = fxfact.factorize(model, kinds, budget=fxfact.Macs(0.6), calibration=statistics, example_inputs=x[:1])
        refitted, _ = fxfact.refit(small, model, x.split(4))
        fxfact.distill(small, model, x.split(4), steps=3, mixup=True)
        fxfact.factorize(model, kinds, budget=fxfact.Latency(1.0), example_inputs=x[:1])
    again = fxfact.factorize(model, kinds, budget=fxfact.Macs(0.6), calibration=statistics, example_inputs=x[:1])
    torch.testing.assert_close(small(x), again(x))
    torch.testing.assert_close(refitted(x), fxfact.refit(again, model, x.split(4))[0](x))
