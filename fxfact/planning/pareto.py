"""The Pareto front: what every other budget would have cost the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from tabulate import tabulate

from fxfact.conv import Cost, format_amount
from fxfact.errors import PlanError
from fxfact.planning.decision import fields_to_json
from fxfact.planning.strategy import ParetoPoint, significant

_UNITS: Mapping[str, Callable[[Cost], float | None]] = {
    "parameters": lambda cost: cost.params,
    "MACs": lambda cost: cost.macs,
    "ms": lambda cost: cost.ms,
}


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
    """

    cost: Cost
    predicted_loss_increase: float | None = None
    measured_loss_increase: float | None = None
    metric: float | None = None
    milliseconds: float | None = None
    drop_at_most: float | None = None

    def __post_init__(self) -> None:
        for name in ("predicted_loss_increase", "measured_loss_increase", "metric", "drop_at_most"):
            object.__setattr__(self, name, significant(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class ParetoFront:
    """Networks that a budget could have given instead. ``print`` it for a table.

    Attributes:
        network: the cost of the dense network.
        points: the networks, cheapest first.
        uses_statistics: whether the points have loss increases in nats. Without data, the table has the share of the
            output's energy that the chains are expected to lose.
        measured: networks that were measured, in the order of their measurement.
    """

    network: Cost
    points: Sequence[ParetoPoint]
    uses_statistics: bool = True
    measured: tuple[MeasuredPoint, ...] = ()

    def __str__(self) -> str:
        units = self._known_units()
        rows = [
            [*(text for unit in units for text in self._cells(unit, point)), f"{self._loss(point):.3g}"]
            for point in self.points
        ]
        loss = "loss +" if self.uses_statistics else "energy lost"
        header = [*(text for unit in units for text in (unit, "of all")), loss]
        return tabulate(rows, header, disable_numparse=True)

    def plot(self) -> Any:
        """Draw the expected loss increase over the share of the cost. Without data, draw the share of the energy lost.

        The cost is in milliseconds if they are known, else in MACs, else in parameters.

        Returns:
            A ``matplotlib.figure.Figure``.

        Raises:
            PlanError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure  # noqa: PLC0415 (not a dependency)
        except ImportError as error:
            raise PlanError("plot() needs matplotlib: pip install matplotlib. print() needs nothing.") from error
        unit = self._known_units()[-1]
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        shares = [self._share(unit, point) for point in self.points]
        axes.semilogy(shares, [max(self._loss(point), 1e-9) for point in self.points], marker=".")
        axes.set_xlabel(f"share of the {unit}")
        nats, share = "expected increase of the loss (nats)", "share of the output's energy that is lost"
        axes.set_ylabel(nats if self.uses_statistics else share)
        axes.grid(visible=True, alpha=0.3)
        return figure

    def _loss(self, point: ParetoPoint) -> float:
        increase = point.predicted_loss_increase
        return increase if self.uses_statistics else -math.expm1(-increase)

    def _known_units(self) -> list[str]:
        return [unit for unit, amount in _UNITS.items() if amount(self.network)]

    def _share(self, unit: str, point: ParetoPoint) -> float:
        amount = _UNITS[unit]
        return (amount(point.cost) or 0) / (amount(self.network) or 1)

    def _cells(self, unit: str, point: ParetoPoint) -> tuple[str, str]:
        amount = _UNITS[unit](point.cost) or 0
        return format_amount(amount), f"{self._share(unit, point):.2f}"


def describe_metric(points: Sequence[MeasuredPoint], cost: Cost) -> list[str]:
    """Return a sentence on the caller's metric before and after, or none if it was not measured at this cost."""
    measured = [point for point in points if point.metric is not None]
    own = next((point for point in measured if point.cost == cost), None)
    if own is None:
        return []
    change = f"{measured[0].metric:.4g} → {own.metric:.4g}, worse by at most {own.drop_at_most:.3g}"
    return [f"metric: {change}; {len(measured)} networks were measured"]


_Point = TypeVar("_Point", bound=ParetoPoint | MeasuredPoint)


def point_to_json(point: ParetoPoint | MeasuredPoint) -> dict[str, Any]:
    """Return a point as plain data, with the cost's fields beside its own."""
    data = fields_to_json(point)
    return {**fields_to_json(data.pop("cost")), **data}


def point_from_json(kind: type[_Point], data: Mapping[str, Any]) -> _Point:
    """Return the point from what ``point_to_json`` gave."""
    cost = {field.name: data[field.name] for field in fields(Cost) if field.name in data}
    return kind(cost=Cost(**cost), **{key: value for key, value in data.items() if key not in cost})
