"""Error curves that are computed once and used again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxfact
from tests.support import Classifier


def test_curves_are_found_again_only_for_the_same_weights(
    classifier: Classifier, color_images: Tensor, tmp_path: Path
) -> None:
    statistics, curves = fxfact.calibrate(classifier, color_images.split(8)), fxfact.ErrorCurveCache()
    options: dict[str, Any] = {
        "budget": fxfact.Macs(0.8),
        "example_inputs": color_images[:1],
        "calibration": statistics,
    }
    before = fxfact.plan(classifier, "channel_svd", error_curves=curves, **options)
    curves.save(tmp_path / "curves.json")
    loaded = fxfact.ErrorCurveCache.load(tmp_path / "curves.json")
    assert {key: loaded[key] for key in loaded} == {key: curves[key] for key in curves}
    assert len(loaded) > 0
    with torch.no_grad():
        classifier.first.weight.copy_(classifier.first.weight[:1].expand_as(classifier.first.weight))
    again = fxfact.plan(classifier, "channel_svd", error_curves=curves, **options)
    assert again == fxfact.plan(classifier, "channel_svd", **options) != before
