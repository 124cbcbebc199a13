"""The Pareto front of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

import fxfact
from fxfact.conv import Cost
from fxfact.errors import PlanError
from fxfact.planning import ParetoFront, ParetoPoint


def test_pareto_front_can_be_plotted(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = fxfact.plan(model, "channel_svd", budget=fxfact.Macs(0.7), calibration=[x], example_inputs=x[:1])
    figure = plan.pareto_front.plot()
    figure.savefig(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5000
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == [max(point.predicted_loss_increase, 1e-9) for point in plan.pareto_points]


def test_pareto_front_prints_shares_of_the_units_that_are_known() -> None:
    points = [ParetoPoint(Cost(100, 2000, 1.0), 0.5), ParetoPoint(Cost(400, 8000, 3.0), 0.125)]
    lines = str(ParetoFront(network=Cost(400, 10_000, 4.0), points=points)).splitlines()
    assert lines[0].split() == ["parameters", "of", "all", "MACs", "of", "all", "ms", "of", "all", "loss", "+"]
    assert lines[2].split() == ["100", "0.25", "2,000", "0.20", "1", "0.25", "0.5"]
    assert lines[3].split() == ["400", "1.00", "8,000", "0.80", "3", "0.75", "0.125"]
    without_data = str(ParetoFront(network=Cost(400, 10_000, 4.0), points=points, uses_statistics=False)).splitlines()
    assert without_data[0].split()[-2:] == ["energy", "lost"]
    assert [line.split()[-1] for line in without_data[2:]] == ["0.393", "0.118"]  # 1 - exp(-0.5), 1 - exp(-0.125)
    header = str(ParetoFront(network=Cost(400, None), points=points)).splitlines()[0]
    assert header.split() == ["parameters", "of", "all", "loss", "+"]


def test_plan_without_a_budget_has_no_pareto_front(model: nn.Module) -> None:
    with pytest.raises(PlanError, match="made without a budget"):
        _ = fxfact.plan(model, rank=0.5).pareto_front
