"""What every budget would cost the loss: the front of the networks that could be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from fxfact.cost import Cost
from fxfact.errors import PlanError
from fxfact.ranks import FrontPoint


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Networks that could be had instead of the dense one, which costs ``network``; cheapest first. ``print`` it."""

    network: Cost
    points: Sequence[FrontPoint]

    def __str__(self) -> str:
        rows = [
            [
                *_shown(point.cost.params, self.network.params),
                *_shown(point.cost.macs, self.network.macs),
                f"{point.increase:.3g}",
            ]
            for point in self.points
        ]
        return tabulate(rows, ["parameters", "of all", "MACs", "of all", "loss +"], disable_numparse=True)

    def plot(self) -> Any:
        """A matplotlib figure of the expected increase of the loss over the share of the MACs (parameters, where those
        are unknown). Raises PlanError where matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure  # noqa: PLC0415 (not a dependency)
        except ImportError as error:
            raise PlanError(
                "a picture needs matplotlib: pip install matplotlib. print(curve) needs nothing."
            ) from error
        by_macs = self.network.macs is not None
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        costs = [(p.cost.macs or 0) / (self.network.macs or 1) if by_macs else p.cost.params / self.network.params
                 for p in self.points]  # fmt: skip
        axes.semilogy(costs, [max(point.increase, 1e-9) for point in self.points], marker=".")
        axes.set_xlabel(f"share of the {'MACs' if by_macs else 'parameters'}")
        axes.set_ylabel("expected increase of the loss (nats)")
        axes.grid(visible=True, alpha=0.3)
        return figure


def _shown(cost: int | None, dense: int | None) -> tuple[str, str]:
    return ("", "") if cost is None or not dense else (f"{cost:,}", f"{cost / dense:.2f}")
