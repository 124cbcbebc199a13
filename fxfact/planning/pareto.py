"""What every budget would cost the loss: the front of the networks that could be had."""

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
    """Networks that could be had instead of the dense one, which costs ``network``; cheapest first. ``print`` it."""

    network: Cost
    points: Sequence[ParetoPoint]

    def __str__(self) -> str:
        units = self._units
        rows = [
            [*(text for unit in units for text in self._shown(unit, point)), f"{point.predicted_loss_increase:.3g}"]
            for point in self.points
        ]
        header = [*(text for unit in units for text in (unit, "of all")), "loss +"]
        return tabulate(rows, header, disable_numparse=True)

    def plot(self) -> Any:
        """A matplotlib figure of the expected increase of the loss over the share of the milliseconds, where those are
        known, else of the MACs, else of the parameters. Raises PlanError where matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure  # noqa: PLC0415 (not a dependency)
        except ImportError as error:
            raise PlanError(
                "a picture needs matplotlib: pip install matplotlib. print(curve) needs nothing."
            ) from error
        unit = self._units[-1]
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        shares = [self._share(unit, point) for point in self.points]
        axes.semilogy(shares, [max(point.predicted_loss_increase, 1e-9) for point in self.points], marker=".")
        axes.set_xlabel(f"share of the {unit}")
        axes.set_ylabel("expected increase of the loss (nats)")
        axes.grid(visible=True, alpha=0.3)
        return figure

    @property
    def _units(self) -> list[str]:
        return [unit for unit, amount in _UNITS.items() if amount(self.network)]

    def _share(self, unit: str, point: ParetoPoint) -> float:
        amount = _UNITS[unit]
        return (amount(point.cost) or 0) / (amount(self.network) or 1)

    def _shown(self, unit: str, point: ParetoPoint) -> tuple[str, str]:
        amount = _UNITS[unit](point.cost) or 0
        return format_amount(amount), f"{self._share(unit, point):.2f}"
