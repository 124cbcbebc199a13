"""The Pareto front as an SVG chart: loss increase over cost, with the chosen and the measured networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from fxfact.conv import format_short
from fxfact.planning import MeasuredPoint, ParetoFront

# Units of the picture, which is scaled to the width of the page.
_WIDTH, _HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 58, 40, 54  # margins of the axes
_DECADES = 6  # drawn at most, below the largest loss


@dataclass(frozen=True)
class _Axis:
    """Maps values to places: linearly, or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(max(v, self.low)) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0)


def draw_front_chart(front: ParetoFront) -> str:
    """Draw a Pareto front. Hovering over a network shows its numbers. Returns "" if no loss increase is positive."""
    losses = [v for name in _SERIES for _, v in front.series(name) if v > 0]
    if not losses:
        return ""
    top = math.ceil(math.log10(max(losses)))
    bottom = max(math.floor(math.log10(min(losses))), top - _DECADES)
    shares = [front.share(point) or 0.0 for point in front.all_points]
    x = _Axis(0.0, max(1.0, *shares), _LEFT, _WIDTH - _RIGHT)
    y = _Axis(10.0**bottom, 10.0 ** max(top, bottom + 1), _HEIGHT - _BOTTOM, _TOP, is_log=True)
    parts = [
        f'<svg class="front" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>loss increase over cost</title>',
        *_axes(front, x, y),
        *_chosen_line(front, x),
        *_curve(front.series("predicted_loss_increase"), x, y),
        *_metric(front, x),
        *(part for point in front.all_points for part in _point(front, point, x, y)),
        "</svg>",
    ]
    return "".join(parts)


_SERIES = {"predicted_loss_increase": "predicted", "measured_loss_increase": "measured"}
"""The CSS class of each series that is drawn on the axis of the loss."""


def _axes(front: ParetoFront, x: _Axis, y: _Axis) -> Iterator[str]:
    for decade in range(round(math.log10(y.low)), round(math.log10(y.high)) + 1):
        place = y(10.0**decade)
        yield f'<path class="grid" d="M{x.start} {place:.1f}H{x.end}"/>'
        yield f'<text class="tick end" x="{x.start - 8}" y="{place + 4:.1f}">{_decade_text(decade)}</text>'
    for percent in range(0, 101, 20):
        place = x(percent / 100)
        yield f'<path class="grid" d="M{place:.1f} {y.start}V{y.end}"/>'
        yield f'<text class="tick middle" x="{place:.1f}" y="{y.start + 20}">{percent} %</text>'
    loss = "loss increase, nats" if front.uses_statistics else "share of the output's energy lost"
    yield (
        f'<text class="axis middle" x="{(x.start + x.end) / 2}" y="{_HEIGHT - 6}">'
        f"{escape(front.unit)}, share of the dense network's</text>"
        f'<text class="axis" x="4" y="18">{escape(loss)}</text>'
    )


def _decade_text(decade: int) -> str:
    return f"{10.0**decade:g}" if decade > -4 else f"1e−{-decade}"


def _chosen_line(front: ParetoFront, x: _Axis) -> Iterator[str]:
    share = None if front.chosen is None else front.share(front.chosen)
    if share is not None:
        yield f'<path class="chosen" d="M{x(share):.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
        yield f'<text class="chosen" x="{x(share) + 6:.1f}" y="{_TOP + 12}">this network: {share:.0%}</text>'


def _curve(series: Sequence[tuple[float, float]], x: _Axis, y: _Axis) -> Iterator[str]:
    places = [f"{x(share):.1f},{y(value):.1f}" for share, value in series if value > 0]
    yield f'<polyline class="predicted" points="{" ".join(places)}"/>'


def _metric(front: ParetoFront, x: _Axis) -> Iterator[str]:
    """Draw the metric on an axis at the right."""
    series = front.series("metric")
    if not series:
        return
    low, high = min(value for _, value in series), max(value for _, value in series)
    margin = 0.1 * (high - low) or 1.0
    axis = _Axis(low - margin, high + margin, _HEIGHT - _BOTTOM, _TOP)
    places = [(x(share), axis(value)) for share, value in series]
    yield f'<polyline class="metric" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>'
    yield from (f'<rect class="metric" x="{a - 4:.1f}" y="{b - 4:.1f}" width="8" height="8"/>' for a, b in places)
    for value in dict.fromkeys((low, high)):
        yield f'<text class="tick metric" x="{x.end + 8}" y="{axis(value) + 4:.1f}">{value:.4g}</text>'
    yield f'<text class="axis end metric" x="{_WIDTH - 4}" y="18">metric</text>'


def _point(front: ParetoFront, point: MeasuredPoint, x: _Axis, y: _Axis) -> Iterator[str]:
    """Draw the marks of a network, and over them a strip that shows its numbers."""
    share = front.share(point)
    if share is None:
        return
    yield f'<g class="point" data-tip="{escape(describe_point(front, point))}">'
    yield f'<rect class="strip" x="{x(share) - 6:.1f}" y="{_TOP}" width="12" height="{_HEIGHT - _TOP - _BOTTOM}"/>'
    for name, kind in _SERIES.items():
        value = front.value(name, point)
        if value is not None and value > 0:
            radius = 5 if kind == "measured" else 3
            yield f'<circle class="{kind}" cx="{x(share):.1f}" cy="{y(value):.1f}" r="{radius}"/>'
    yield "</g>"


def describe_point(front: ParetoFront, point: MeasuredPoint) -> str:
    """Return the numbers of a network, a line each."""
    amount, share = front.amount(point), front.share(point)
    lines = ["this network" if front.is_chosen(point) else "another budget"]
    if share is not None and amount is not None:
        lines.append(f"{format_short(amount)} {front.unit} ({share:.0%})")
    loss = ("predicted loss +", "nats") if front.uses_statistics else ("energy lost", "")
    names = {
        "predicted_loss_increase": loss,
        "measured_loss_increase": ("measured loss +", "nats"),
        "metric": ("metric", ""),
        "milliseconds": ("measured", "ms"),
    }
    for name, (label, unit) in names.items():
        value = front.value(name, point)
        if value is not None:
            lines.append(f"{label} {value:.3g} {unit}".strip())
    return "\n".join(lines)
