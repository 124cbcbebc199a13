"""Bounds on the loss."""

from __future__ import annotations

from torch import Tensor

import fxfact
from tests.support import Classifier


def test_loss_budget_is_met_as_measured(classifier: Classifier, color_images: Tensor) -> None:
    model, x = classifier, color_images
    curves = fxfact.ErrorCurveCache()
    plans = [
        fxfact.plan(model, budget=fxfact.Loss(n), calibration=x.split(4), example_inputs=x[:1], error_curves=curves)
        for n in (1e-6, 1e-4)
    ]
    assert all(plan.measured_loss_increase <= nats for plan, nats in zip(plans, (1e-6, 1e-4), strict=True))
    assert plans[1].after.macs <= plans[0].after.macs
    assert plans[1].rewrites
    assert "held-out" in str(plans[1])
