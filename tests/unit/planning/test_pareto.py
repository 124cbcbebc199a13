"""The Pareto front of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import fxfact
from tests.support import Classifier


def test_pareto_front_can_be_plotted(classifier: Classifier, color_images: Tensor, tmp_path: Path) -> None:
    model, x = classifier, color_images
    pytest.importorskip("matplotlib")
    plan = fxfact.plan(model, "channel_svd", budget=fxfact.Macs(0.7), calibration=[x], example_inputs=x[:1])
    figure = plan.pareto_front.plot()
    figure.savefig(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5000
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == [max(point.predicted_loss_increase, 1e-9) for point in plan.pareto_points]
