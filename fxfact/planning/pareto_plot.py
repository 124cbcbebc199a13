"""Pictures of Pareto fronts, drawn by matplotlib."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxfact.errors import ArgumentError, FileError
from fxfact.utils import atomic_write, check_path

Series = Sequence[tuple[float, float]]
"""Pairs of a share of the cost and a value."""

_PREDICTED, _MEASURED, _METRIC = "#2f6fb3", "#e4572e", "#3a7d44"


def draw_front(
    predicted: Series, measured: Series, metric: Series, chosen: float | None, *, unit: str, loss: str
) -> Any:
    """Draw values over the share of the cost.

    Args:
        predicted: expected loss increases. Those of 0 cannot be drawn on the logarithmic axis and are left out.
        measured: measured loss increases.
        metric: the user's metric, on an axis of its own.
        chosen: the share of the cost of the chosen network, if there is one.
        unit: the unit of the cost.
        loss: the name of the loss increase.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    figures, ticker = _import_matplotlib("figure"), _import_matplotlib("ticker")
    figure = figures.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_positive(predicted), marker=".", color=_PREDICTED, label="predicted")
    if measured:
        axes.plot(*_positive(measured), "D", color=_MEASURED, label="measured")
    if chosen is not None:
        axes.axvline(chosen, color="gray", linestyle=":", label=f"this plan: {chosen:.0%} of the {unit}")
    if any(value > 0 for _, value in (*predicted, *measured)):
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
    axes.set(xlabel=f"{unit}, share of the dense network's", ylabel=loss)
    axes.grid(visible=True, alpha=0.3)
    if metric:
        right = axes.twinx()
        right.plot(*zip(*metric, strict=True), "s--", color=_METRIC, label="metric")
        right.set_ylabel("metric")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file, whole or not at all. Raises what ``check_plot_path`` raises, and FileError."""
    suffix = check_plot_path(path)
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format=suffix)
    except OSError as error:
        raise FileError(f"{os.fspath(path)}: the picture cannot be written there: {error}") from error


def check_plot_path(path: str | os.PathLike[str]) -> str:
    """Return the format of a picture by the suffix of its file.

    Raises ArgumentError if matplotlib is not installed or does not know the format, and ArgumentTypeError if ``path``
    is not a path.
    """
    check_path(path)
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in _import_matplotlib("backend_bases").FigureCanvasBase.get_supported_filetypes():
        raise ArgumentError(f"a picture is written to NAME.png, NAME.svg or NAME.pdf, got {os.fspath(path)}")
    return suffix


def _import_matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ArgumentError(
            "a picture of the Pareto front needs matplotlib: pip install 'fxfact[plot]'. print() needs nothing."
        ) from error


def _positive(series: Series) -> tuple[list[float], list[float]]:
    pairs = [pair for pair in series if pair[1] > 0]
    return [share for share, _ in pairs], [value for _, value in pairs]
