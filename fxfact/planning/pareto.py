"""The Pareto front: what every other budget would have cost the loss."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from fxfact.conv import Cost, format_amount, format_short
from fxfact.planning.decision import fields_to_json
from fxfact.planning.pareto_plot import draw_front, save_figure
from fxfact.planning.strategy import ParetoPoint, significant
from fxfact.utils import Cell, Column, PrintsTable, Table

_UNITS: Mapping[str, Callable[[Cost], float | None]] = {
    "parameters": lambda cost: cost.params,
    "MACs": lambda cost: cost.macs,
    "ms": lambda cost: cost.ms,
}
_VALUES: Mapping[str, Column] = {
    "predicted_loss_increase": Column(("loss +, nats", "loss +"), 2),
    "measured_loss_increase": Column("measured", 4),
    "metric": Column("metric", 3),
    "milliseconds": Column(("ms measured", "ms"), 5),
}  # the fields of a point that are columns of a table
_ROWS = 15  # of a table


@dataclass(frozen=True)
class MeasuredPoint:
    """A network whose loss, metric or time was measured while a plan was searched.

    Attributes:
        cost: the cost of the network.
        predicted_loss_increase: the expected increase of the loss in nats for one sample, if known.
        measured_loss_increase: the measured increase of the loss in nats for one sample, if it was measured.
        metric: the user's own metric, if it was measured.
        milliseconds: milliseconds of one call, if they were measured.
        drop_at_most: by how much the metric is worse than that of the dense network, if it was measured; if there is
            one score for each sample, the upper confidence limit of the mean.
        refitted: whether the metric is that of the network after ``fxfact.refit``.
    """

    cost: Cost
    predicted_loss_increase: float | None = None
    measured_loss_increase: float | None = None
    metric: float | None = None
    milliseconds: float | None = None
    drop_at_most: float | None = None
    refitted: bool = False

    def __post_init__(self) -> None:
        for name in ("predicted_loss_increase", "measured_loss_increase", "metric", "drop_at_most"):
            object.__setattr__(self, name, significant(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class ParetoFront(PrintsTable):
    """Networks that a budget could have given instead. ``print`` it for a table.

    Attributes:
        network: the cost of the dense network.
        points: the networks, cheapest first.
        uses_statistics: whether the points have loss increases in nats. Without data, the table has the share of the
            output's energy that the chains are expected to lose.
        chosen: the network that the plan makes.
        measured: networks that were measured, in the order of their measurement.
    """

    network: Cost
    points: tuple[ParetoPoint, ...]
    uses_statistics: bool = True
    chosen: MeasuredPoint | None = None
    measured: tuple[MeasuredPoint, ...] = ()

    def _table(self, width: int | None) -> str:
        """Fifteen networks, among them all that were measured, and the chosen one with a star."""
        points, units = self._representative_points(), self._known_units()
        values = dict(_VALUES)
        if not self.uses_statistics:
            values["predicted_loss_increase"] = Column("energy lost", 2)
        columns = [Column("", 0), *(Column(unit, 1 if unit == self.unit else 6) for unit in units), *values.values()]
        rows: list[list[Cell]] = [
            [
                "*" if self.is_chosen(point) else "",
                *(self._cost_cell(unit, point) for unit in units),
                *(format_value(self.value(name, point), 4 if name == "metric" else 3) for name in values),
            ]
            for point in points
        ]
        text = Table(columns, rows).format(width)
        return f"{text}\n* the network of this plan" if any(map(self.is_chosen, points)) else text

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the front: the expected loss increase over the share of the cost, and what was measured.

        The cost is that of the budget. Without data, the share of the output's energy that is lost is drawn instead of
        the loss increase. A metric has its own axis on the right.

        Args:
            path: a file to write the picture to, such as ``front.png``, ``front.svg`` or ``front.pdf``. None writes
                none.

        Returns:
            A ``matplotlib.figure.Figure``.

        Raises:
            ArgumentError: if matplotlib is not installed, or cannot write files of this kind.
            ArgumentTypeError: if ``path`` is not a path.
            FileError: if the file cannot be written.
        """
        nats, energy = "expected increase of the loss (nats)", "share of the output's energy that is lost"
        figure = draw_front(
            self.series("predicted_loss_increase"),
            self.series("measured_loss_increase"),
            self.series("metric"),
            None if self.chosen is None else self.share(self.chosen),
            unit=self.unit,
            loss=nats if self.uses_statistics else energy,
        )
        if path is not None:
            save_figure(figure, path)
        return figure

    @property
    def unit(self) -> str:
        """The unit of the budget, in which the networks are sorted: 'ms', 'MACs' or 'parameters'."""
        units = self._known_units()[::-1]
        amounts = {unit: [_UNITS[unit](point.cost) or 0 for point in self.points] for unit in units}
        ascending = [unit for unit in units if amounts[unit] == sorted(amounts[unit])]
        return next(iter([*ascending, *units]), "parameters")

    @property
    def all_points(self) -> list[MeasuredPoint]:
        """All networks, with what was measured, cheapest first."""
        measured = [*self.measured, *([self.chosen] if self.chosen else [])]
        predicted = [MeasuredPoint(point.cost, point.predicted_loss_increase) for point in self.points]
        points: list[MeasuredPoint] = []
        for point in (*measured, *predicted):
            same = next((k for k, other in enumerate(points) if _same_network(point.cost, other.cost)), None)
            if same is None:
                points.append(point)
            else:
                points[same] = _merged(points[same], point)
        return sorted(points, key=lambda point: self.share(point) or 0)

    def is_chosen(self, point: MeasuredPoint) -> bool:
        """Return whether a point is the network that the plan makes."""
        return self.chosen is not None and _same_network(point.cost, self.chosen.cost)

    def amount(self, point: MeasuredPoint, unit: str | None = None) -> float | None:
        """Return the cost of a point in the unit of the budget, or in another one, if it is known."""
        return _UNITS[unit or self.unit](point.cost)

    def share(self, point: MeasuredPoint, unit: str | None = None) -> float | None:
        """Return the cost of a point as a share of the dense network's, if it is known."""
        part, whole = self.amount(point, unit), _UNITS[unit or self.unit](self.network)
        return None if part is None or not whole else part / whole

    def value(self, name: str, point: MeasuredPoint) -> float | None:
        """Return a field of a point. Without data, predictions are the share of the output's energy that is lost."""
        value: float | None = getattr(point, name)
        if name == "predicted_loss_increase" and value is not None and not self.uses_statistics:
            return -math.expm1(-value)
        return value

    def series(self, name: str) -> list[tuple[float, float]]:
        """Return the share of the cost and the value of a field, for all points of which both are known."""
        pairs = [(self.share(point), self.value(name, point)) for point in self.all_points]
        return [(share, value) for share, value in pairs if share is not None and value is not None]

    def _representative_points(self) -> list[MeasuredPoint]:
        """Return fifteen points: the chosen and the measured ones, and others between them."""
        points = self.all_points
        kept = [k for k, point in enumerate(points) if self.is_chosen(point) or _was_measured(point)]
        others = [k for k in range(len(points)) if k not in kept]
        count = max(0, min(_ROWS - len(kept), len(others)))
        last = len(others) - 1
        kept += [others[round(k * last / max(count - 1, 1))] for k in range(count)]
        return [points[k] for k in sorted(kept)]

    def _known_units(self) -> list[str]:
        return [unit for unit, amount in _UNITS.items() if amount(self.network)]

    def _cost_cell(self, unit: str, point: MeasuredPoint) -> Cell:
        amount, share = self.amount(point, unit), self.share(point, unit)
        if amount is None or share is None:
            return ""
        return (f"{format_amount(amount)} ({share:.2f})", f"{format_short(amount)} ({share:.2f})", f"{share:.2f}")


def format_value(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits, or "" if it is not known."""
    return "" if value is None else f"{value:.{digits}g}"


def _same_network(one: Cost, other: Cost) -> bool:
    return (one.params, one.macs) == (other.params, other.macs)


def _merged(point: MeasuredPoint, other: MeasuredPoint) -> MeasuredPoint:
    """Return a point with what only the other knows."""
    missing = [name for name in _VALUES if getattr(point, name) is None]
    return replace(point, **{name: getattr(other, name) for name in missing})


def _was_measured(point: MeasuredPoint) -> bool:
    return any(getattr(point, name) is not None for name in _VALUES if name != "predicted_loss_increase")


def describe_metric(points: Sequence[MeasuredPoint], cost: Cost) -> list[str]:
    """Return a sentence on the caller's metric before and after, or none if it was not measured at this cost."""
    measured = [point for point in points if point.metric is not None]
    own = next((point for point in measured if _same_network(point.cost, cost)), None)
    if own is None:
        return []
    change = f"{measured[0].metric:.4g} → {own.metric:.4g}, worse by at most {own.drop_at_most:.3g}"
    after = ". They were refitted: after fxfact.apply, call fxfact.refit as well" if own.refitted else ""
    return [f"metric: {change}; {len(measured)} networks were measured, with the dense one{after}"]


_Point = TypeVar("_Point", bound=ParetoPoint | MeasuredPoint)


def point_to_json(point: ParetoPoint | MeasuredPoint) -> dict[str, Any]:
    """Return a point as plain data, with the cost's fields beside its own."""
    data = fields_to_json(point)
    return {**fields_to_json(data.pop("cost")), **data}


def point_from_json(kind: type[_Point], data: Mapping[str, Any]) -> _Point:
    """Return the point from what ``point_to_json`` gave."""
    cost = {field.name: data[field.name] for field in fields(Cost) if field.name in data}
    return kind(cost=Cost(**cost), **{key: value for key, value in data.items() if key not in cost})
