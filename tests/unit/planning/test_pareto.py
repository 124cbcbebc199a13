"""The Pareto front of a plan."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from torch import Tensor, nn

import fxfact
from fxfact.conv import Cost
from fxfact.errors import ArgumentError, ArgumentTypeError, FileError, PlanError
from fxfact.planning import MeasuredPoint, ParetoFront, ParetoPoint

NETWORK = Cost(400, 10_000, 4.0)
POINTS = (ParetoPoint(Cost(100, 2000, 1.0), 0.5), ParetoPoint(Cost(400, 8000, 3.0), 0.125))


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of a table's header and rows."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if not set(line) <= {"-", " "}]


def test_pareto_front_can_be_plotted(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = fxfact.plan(model, "channel_svd", budget=fxfact.Macs(0.7), calibration=[x], example_inputs=x[:1])
    for name in ("front.png", "front.svg"):
        figure = plan.pareto_front.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    line = figure.axes[0].lines[0]
    increases = [p.predicted_loss_increase for p in plan.pareto_front.all_points]
    assert list(line.get_ydata()) == [nats for nats in increases if nats]


def test_plot_shows_what_was_measured() -> None:
    pytest.importorskip("matplotlib")
    measured = MeasuredPoint(Cost(100, 2000, 1.0), measured_loss_increase=0.6, metric=91.0)
    front = ParetoFront(network=NETWORK, points=POINTS, measured=(measured,), chosen=measured)
    left, right = front.plot().axes
    assert [list(line.get_ydata()) for line in left.lines[:2]] == [[0.5, 0.125], [0.6]]
    assert set(left.lines[2].get_xdata()) == {0.25}, "the line of the chosen network"
    assert [list(line.get_ydata()) for line in right.lines] == [[91.0]]


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentError, match=r"pip install 'fxfact\[plot\]'"):
        ParetoFront(network=NETWORK, points=POINTS).plot()


def test_plot_refuses_files_that_it_cannot_write(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    front = ParetoFront(network=NETWORK, points=POINTS)
    with pytest.raises(ArgumentError, match=r"NAME\.png, NAME\.svg"):
        front.plot(tmp_path / "front.html")
    with pytest.raises(FileError, match="cannot be written there"):
        front.plot(tmp_path / "absent" / "front.png")
    with pytest.raises(ArgumentTypeError, match="path must be"):
        front.plot(3)  # type: ignore[arg-type]


def test_pareto_front_prints_shares_of_the_units_that_are_known() -> None:
    header, *rows = rows_of(ParetoFront(network=NETWORK, points=POINTS).table())
    assert header == ["parameters", "MACs", "ms", "loss +, nats"]
    assert rows == [
        ["100 (0.25)", "2,000 (0.20)", "1 (0.25)", "0.5"],
        ["400 (1.00)", "8,000 (0.80)", "3 (0.75)", "0.125"],
    ]
    header, *rows = rows_of(ParetoFront(network=NETWORK, points=POINTS, uses_statistics=False).table())
    assert header[-1] == "energy lost"
    assert [row[-1] for row in rows] == ["0.393", "0.118"]  # 1 - exp(-0.5), 1 - exp(-0.125)
    header, *_ = rows_of(ParetoFront(network=Cost(400, None), points=POINTS).table())
    assert header == ["parameters", "loss +, nats"]


def test_pareto_front_marks_the_chosen_network_and_shows_what_was_measured() -> None:
    measured = (
        MeasuredPoint(POINTS[1].cost, measured_loss_increase=0.25, metric=91.5),
        MeasuredPoint(Cost(200, 5000, 2.0), 0.3, metric=90.0, milliseconds=2.5),
    )
    front = ParetoFront(network=NETWORK, points=POINTS, measured=measured, chosen=MeasuredPoint(Cost(200, 5000, 2.0)))
    header, *rows, note = rows_of(front.table())
    assert header[3:] == ["loss +, nats", "measured", "metric", "ms measured"]
    assert rows[0][:2] == ["100 (0.25)", "2,000 (0.20)"], "cheapest first"
    assert rows[1] == ["*", "200 (0.50)", "5,000 (0.50)", "2 (0.50)", "0.3", "90", "2.5"]
    assert rows[2][3:] == ["0.125", "0.25", "91.5"]
    assert note == ["* the network of this plan"]


def test_pareto_front_prints_fifteen_networks_among_them_those_that_count() -> None:
    points = tuple(ParetoPoint(Cost(k, 10 * k), (100 - k) / 50) for k in range(1, 101))
    measured = tuple(MeasuredPoint(Cost(k, 10 * k), metric=k) for k in (31, 32, 33))
    chosen = MeasuredPoint(Cost(55, 555), 0.5)
    front = ParetoFront(network=Cost(100, 1000), points=points, measured=measured, chosen=chosen)
    _, *rows, _ = rows_of(front.table())
    macs = [row[row[0] == "*" :][1].split()[0] for row in rows]
    assert len(rows) == 15
    assert {"10", "310", "320", "330", "555", "1,000"} <= {*macs}


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_pareto_front_fits_the_width_and_keeps_the_unit_of_the_budget(width: int) -> None:
    points = tuple(ParetoPoint(Cost((101 - k) * 10**6, k * 10**8), (100 - k) / 50) for k in range(1, 101))
    front = ParetoFront(network=Cost(10**8, 10**10), points=points)
    assert front.unit == "MACs"
    text = front.table(width)
    assert max(map(len, text.splitlines())) <= width
    assert "MACs" in text.splitlines()[0]


def test_plan_without_a_budget_has_no_pareto_front(model: nn.Module) -> None:
    with pytest.raises(PlanError, match="made without a budget"):
        _ = fxfact.plan(model, rank=0.5).pareto_front
