"""A report as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from importlib.resources import files

from fxfact.analysis.front_chart import draw_front_chart
from fxfact.analysis.html_layers import grew, layer_map, layer_table
from fxfact.analysis.html_terms import explained, term
from fxfact.analysis.report_data import (
    ReportData,
    cost_changes,
    format_approximation_error,
    format_graph_check,
    format_threads,
)
from fxfact.analysis.svg import Scale, draw_diagram
from fxfact.conv import format_short

_SERIES = {
    "predicted, for other budgets": ("is", "predicted_loss_increase"),
    "measured": ("hot", "measured_loss_increase"),
    "metric": ("metric", "metric"),
}  # of the Pareto front: the colour and the field of each
_MUCH_WORSE = 2.0  # ratio from which on a loss increase is far more than was predicted


def render_page(data: ReportData) -> str:
    """Return the HTML source of a report."""
    title = f"{data.model}, factorized by fxfact"
    page = files("fxfact.analysis") / "page"
    style, script = ((page / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{style}</style></head><body>",
        *_header(data),
        *_tiles(data),
        *_trade_off(data),
        *layer_map(data.convolutions),
        *_diagrams(data),
        *layer_table(data.convolutions),
        *_footer(data),
        f'<div id="tip" role="tooltip" hidden></div><script>{script}</script></body></html>',
    ]
    return "\n".join(parts) + "\n"


def _header(data: ReportData) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in data.versions.items())
    yield f"<h1>{escape(data.model)} <span>factorized by fxfact</span></h1>"
    yield f'<p class="soft">{escape(data.created)} · {escape(versions)}</p>'
    kind = "check" if data.ok else "check wrong"
    for line in format_graph_check(data.graph_error, data.tolerance, data.changed, data.overflow).splitlines():
        yield f'<p class="{kind}">{escape(line)}</p>'


def _tiles(data: ReportData) -> Iterator[str]:
    yield '<div class="tiles">'
    for name, change in cost_changes(data).items():
        unit = f"{term(name)}, {format_threads(data.threads)}" if name == "ms" else term(name)
        yield f"<div>{unit}{_change(*change)}</div>"
    rewritten = sum(bool(conv.factorization) for conv in data.convolutions)
    yield f"<div>layers rewritten<b>{rewritten}</b><small>of {len(data.convolutions)}</small></div></div>"


def _change(before: float | None, after: float | None) -> str:
    """Return by how many percent a cost changed, and from what to what."""
    if before is None or after is None:
        return "<b>?</b>"
    kind = "worse" if grew(before, after) else "better" if grew(after, before) else "soft"
    percent = f"{100 * (after / before - 1) if before else 0.0:+.0f} %".replace("-", "−")
    percent = "±0 %" if percent[1:] == "0 %" else percent
    return f'<b class="{kind}">{percent}</b><small>{format_short(before)} → {format_short(after)}</small>'


def _trade_off(data: ReportData) -> Iterator[str]:
    """Yield the Pareto front, and beside it what the factorization costs the outputs."""
    front = data.pareto_front
    chart = "" if front is None else draw_front_chart(front)
    yield "<h2>What it costs the outputs</h2>"
    if not chart or front is None:
        yield f'<dl class="numbers">{"".join(_numbers(data))}</dl>'
        return
    known = [(name, colour) for name, (colour, field) in _SERIES.items() if front.series(field)]
    legend = "".join(f'<span style="--key:var(--{colour})">{name}</span>' for name, colour in known)
    yield f"<p>What every other budget would have cost, by its share of the {term(front.unit)}.</p>"
    yield f'<div class="tradeoff"><div>{chart}<div class="legend">{legend}</div></div>'
    yield f'<dl class="numbers">{"".join(_numbers(data))}</dl></div>'


def _numbers(data: ReportData) -> Iterator[str]:
    losses = [
        ("predicted loss increase", data.predicted_loss_increase),
        ("measured loss increase", data.measured_loss_increase),
        ("loss increase on these inputs", data.loss_increase),
    ]
    tolerable = math.inf if data.predicted_loss_increase is None else _MUCH_WORSE * data.predicted_loss_increase
    for name, increase in losses:
        if increase is not None:
            kind = "worse" if increase > tolerable else "same"
            yield f'<dt>{term(name)}</dt><dd class="{kind}">{increase:.3g} {term("nats")}</dd>'
    front = data.pareto_front
    own = next((point for point in front.all_points if front.is_chosen(point)), None) if front else None
    if own is not None and own.metric is not None:
        yield f"<dt>{term('metric')}</dt><dd>{own.metric:.4g}</dd>"
    amount, _, meaning = format_approximation_error(data.end_to_end_error).partition(":")
    text = amount.removeprefix("approximation error").strip()
    yield f"<dt>{explained('approximation error', meaning.strip())}</dt><dd>{escape(text)}</dd>"


def _diagrams(data: ReportData) -> Iterator[str]:
    before, after = data.diagrams
    yield "<h2>Before and after</h2>"
    if before.has_edges:
        yield "<p>The more MACs a block has, the redder it is. The percentage is its share of the original's MACs.</p>"
    else:
        yield (
            "<p>The network keeps the model's own Python, so it has no graph. These are its modules in the order of "
            "their definition. The more MACs a module has, the redder it is. The percentage is its share of the "
            "original's MACs.</p>"
        )
    if any(block.stages for block in after.blocks):
        yield (
            '<p>Click on a block with a blue frame to show its stages. <button class="plain" id="all">all stages'
            "</button></p>"
        )
    largest = max(block.macs or 0 for diagram in data.diagrams for block in diagram.blocks)
    scale = Scale(data.before.macs or before.macs, largest)
    pictures = [draw_diagram(diagram, scale) for diagram in data.diagrams]
    yield f'<div class="pictures">{"".join(f"<div>{picture}</div>" for picture in pictures)}</div>'


def _footer(data: ReportData) -> Iterator[str]:
    yield f"<footer><p>The plan was made by <code>{escape(data.call)}</code></p>"
    yield f"<p>The model was captured as {escape(data.capture)}{'.' if not data.refused else ''}"
    yield "".join(f"<br>not as {escape(reason)}" for reason in data.refused)
    yield "</p></footer>"
