"""The Pareto front: what every other budget would have cost the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from fxfact.conv import Cost, format_amount
from fxfact.errors import PlanError
from fxfact.planning.strategy import ParetoPoint

_UNITS: Mapping[str, Callable[[Cost], float | None]] = {
    "parameters": lambda cost: cost.params,
    "MACs": lambda cost: cost.macs,
    "ms": lambda cost: cost.ms,
}


@dataclass(frozen=True, kw_only=True)
class ParetoFront:
    """Networks that a budget could have given instead. ``print`` it for a table.

    Attributes:
        network: the cost of the dense network.
        points: the networks, cheapest first.
    """

    network: Cost
    points: Sequence[ParetoPoint]

    def __str__(self) -> str:
        units = self._known_units()
        rows = [
            [*(text for unit in units for text in self._cells(unit, point)), f"{point.predicted_loss_increase:.3g}"]
            for point in self.points
        ]
        header = [*(text for unit in units for text in (unit, "of all")), "loss +"]
        return tabulate(rows, header, disable_numparse=True)

    def plot(self) -> Any:
        """Draw the expected loss increase over the share of the cost.

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
        axes.semilogy(shares, [max(point.predicted_loss_increase, 1e-9) for point in self.points], marker=".")
        axes.set_xlabel(f"share of the {unit}")
        axes.set_ylabel("expected increase of the loss (nats)")
        axes.grid(visible=True, alpha=0.3)
        return figure

    def _known_units(self) -> list[str]:
        return [unit for unit, amount in _UNITS.items() if amount(self.network)]

    def _share(self, unit: str, point: ParetoPoint) -> float:
        amount = _UNITS[unit]
        return (amount(point.cost) or 0) / (amount(self.network) or 1)

    def _cells(self, unit: str, point: ParetoPoint) -> tuple[str, str]:
        amount = _UNITS[unit](point.cost) or 0
        return format_amount(amount), f"{self._share(unit, point):.2f}"
