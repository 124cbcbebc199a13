"""A report as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fxfact.analysis.report_data import (
    ConvReport,
    ReportData,
    format_approximation_error,
    format_error,
    format_graph_check,
    format_loss,
    format_rank,
    format_threads,
    to_megabytes,
)
from fxfact.analysis.svg import Scale, draw_diagram, draw_spectrum
from fxfact.conv import format_amount, format_change

_STYLE = """
:root { --ink: #1d2733; --soft: #66717f; --line: #d5dbe2; --paper: #fff; --hot: #e4572e; --was: #b9c2cc; --is: #2f6fb3 }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 24px 32px 64px }
h1 { font-size: 22px; margin: 0 } h2 { font-size: 17px; margin: 36px 0 8px } p { margin: 4px 0 10px; max-width: 75em }
.soft, small { color: var(--soft) } .wrong { color: #c22; font-weight: 600 }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0 }
.tiles div { border: 1px solid var(--line); border-radius: 6px; padding: 8px 14px }
.tiles b { display: block; font-size: 18px }
.pictures { display: flex; gap: 40px; align-items: flex-start; overflow-x: auto }
svg text { font-size: 11px; fill: var(--ink) } svg .label { font-weight: 600 }
rect { fill: color-mix(in srgb, var(--hot) var(--heat, 0%), #f6f8fa); stroke: var(--line) }
rect.folded { stroke: var(--is); stroke-width: 1.5 } rect.input, rect.output { fill: var(--paper) }
rect.stage { fill: #eaf1f9; stroke: var(--is) }
.edge { fill: none; stroke: #9aa5b1 } .chain { cursor: pointer } .stages { display: none }
.chain.open .stages { display: inline }
table { border-collapse: collapse; font-size: 13px }
th { text-align: left; color: var(--soft); font-weight: 500; position: sticky; top: 0; background: var(--paper) }
td, th { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td:not(:nth-child(2)) { white-space: nowrap } td:nth-child(2) { max-width: 24em }
.bars { width: 96px } .bars i { display: block; height: 5px; margin: 2px 0; background: var(--was); min-width: 1px }
.bars i.is { background: var(--is) } .bars i.err { background: var(--hot) }
.spectrum polygon { fill: #2f6fb333 } .spectrum polyline { fill: none; stroke: var(--is); stroke-width: 1.5 }
.spectrum path { stroke: var(--hot); stroke-dasharray: 3 2 }
button { font: inherit; padding: 2px 10px } code { font-size: 13px }
"""
_SCRIPT = """
const chains = [...document.querySelectorAll(".chain")];
for (const chain of chains) chain.addEventListener("click", () => chain.classList.toggle("open"));
document.getElementById("all")?.addEventListener("click", () => {
  const open = !chains.every((chain) => chain.classList.contains("open"));
  for (const chain of chains) chain.classList.toggle("open", open);
});
"""


def render_page(data: ReportData) -> str:
    """Return the HTML source of a report."""
    title = f"{data.model}, factorized by fxfact"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *_summary(data),
        *_diagrams(data),
        *_rewritten_table([conv for conv in data.convolutions if conv.factorization]),
        *_dense_table([conv for conv in data.convolutions if not conv.factorization]),
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _summary(data: ReportData) -> Iterable[str]:
    before, after = data.before, data.after
    rewritten = sum(bool(conv.factorization) for conv in data.convolutions)
    tiles = [
        ("parameters", format_change(before.params, after.params)),
        ("MACs per sample", format_change(before.macs, after.macs)),
        (f"milliseconds, {format_threads(data.threads)}", format_change(*data.milliseconds)),
        ("MB of activations at the peak", format_change(*to_megabytes(data.activation_bytes))),
        ("convolutions rewritten", f"{rewritten} of {len(data.convolutions)}"),
    ]
    yield f"<p><b>{escape(format_approximation_error(data.end_to_end_error))}</b></p>"
    if data.loss_increase is not None:
        yield f"<p>{escape(format_loss(data.loss_increase).strip())}</p>"
    style = "soft" if data.ok else "wrong"
    for line in format_graph_check(data.graph_error, data.tolerance, data.changed, data.overflow).splitlines():
        yield f'<p class="{style}">{escape(line)}</p>'
    yield '<div class="tiles">'
    yield from (f"<div><b>{escape(value or '?')}</b>{escape(name)}</div>" for name, value in tiles)
    yield "</div>"
    for reason in data.refused:
        yield f'<p class="soft">captured as {escape(data.capture)}, not as {escape(reason)}</p>'


def _diagrams(data: ReportData) -> Iterable[str]:
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
        yield '<p>Click on a blue block to show its stages. <button id="all">all stages</button></p>'
    largest = max(block.macs or 0 for diagram in data.diagrams for block in diagram.blocks)
    scale = Scale(data.before.macs or before.macs, largest)
    pictures = [draw_diagram(diagram, scale) for diagram in data.diagrams]
    yield f'<div class="pictures">{"".join(f"<div>{picture}</div>" for picture in pictures)}</div>'


def _rewritten_table(convolutions: Sequence[ConvReport]) -> Iterable[str]:
    if not convolutions:
        return
    yield "<h2>Rewritten convolutions</h2>"
    yield (
        "<p>The grey bar is the convolution, the blue bar the chain. Every column has its own scale. The peak is the "
        "largest memory of activations at one time, without the input. Errors are relative: of the kernel, and of the "
        "output on the input that the convolution gets in the original. Spectra are the singular values of the "
        "kernel's unfoldings; those that the chain's rank keeps are filled.</p>"
    )
    heads = ["convolution", "became", "parameters", "MACs", "ms", "peak MB", "kernel error", "output error", "spectra"]
    has_predictions = any(conv.predicted_loss_increase is not None for conv in convolutions)
    heads[-1:-1] = ["loss increase predicted by the plan, nats"] if has_predictions else []
    yield f"<table><thead><tr>{_cells('th', heads)}</tr></thead><tbody>"
    max_params = max(max(conv.before.params, conv.after.params) for conv in convolutions)
    max_macs = max(max(conv.before.macs or 0, conv.after.macs or 0) for conv in convolutions)
    max_ms = max(max(conv.milliseconds or (0.0,)) for conv in convolutions)
    peaks = [(None, None) if c.activation_bytes is None else to_megabytes(c.activation_bytes) for c in convolutions]
    max_mb = max(max(pair[0] or 0.0, pair[1] or 0.0) for pair in peaks)
    max_error = max(max(conv.kernel_error or 0, conv.output_error or 0) for conv in convolutions)
    for conv, peak in zip(convolutions, peaks, strict=True):
        cells = [
            f"<b>{escape(conv.path)}</b><br><small>{escape(conv.convolution)}</small>",
            f"{escape(conv.factorization)} {format_rank(conv.rank)}<br><small>{_chain_text(conv)}</small>",
            _change_bars((conv.before.params, conv.after.params), max_params),
            _change_bars((conv.before.macs, conv.after.macs), max_macs),
            _change_bars(conv.milliseconds or (None, None), max_ms),
            _change_bars(peak, max_mb),
            _error_bar(conv.kernel_error, max_error),
            _error_bar(conv.output_error, max_error),
            *([format_error(conv.predicted_loss_increase)] if has_predictions else []),
            " ".join(map(draw_spectrum, conv.spectra)),
        ]
        yield f"<tr>{_cells('td', cells)}</tr>"
    yield "</tbody></table>"


def _chain_text(conv: ConvReport) -> str:
    return "<br>".join(escape(line) for line in (" | ".join(conv.stages), conv.note) if line)


def _dense_table(convolutions: Sequence[ConvReport]) -> Iterable[str]:
    if not convolutions:
        return
    yield "<h2>Convolutions left dense</h2>"
    yield f"<table><thead><tr>{_cells('th', ['convolution', 'reason', 'MACs'])}</tr></thead><tbody>"
    for conv in convolutions:
        name = f"<b>{escape(conv.path)}</b><br><small>{escape(conv.convolution)}</small>"
        macs = "" if conv.before.macs is None else format_amount(conv.before.macs)
        yield f"<tr>{_cells('td', [name, escape(conv.reason), macs])}</tr>"
    yield "</tbody></table>"


def _cells(tag: str, cells: Iterable[str]) -> str:
    return "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)


def _change_bars(pair: Sequence[float | None], maximum: float) -> str:
    before, after = pair
    if before is None or after is None:
        return ""
    widths = [100 * value / maximum if maximum else 0 for value in (before, after)]
    bars = f'<i style="width:{widths[0]:.1f}%"></i><i class="is" style="width:{widths[1]:.1f}%"></i>'
    return f'<div class="bars">{bars}</div><small>{escape(format_change(before, after))}</small>'


def _error_bar(value: float | None, maximum: float) -> str:
    if value is None:
        return ""
    width = 100 * value / maximum if maximum else 0
    return f'<div class="bars"><i class="err" style="width:{width:.1f}%"></i></div><small>{format_error(value)}</small>'
