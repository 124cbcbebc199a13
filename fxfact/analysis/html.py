"""A report as one HTML page that needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fxfact.analysis.report_data import ConvReport, ReportData, error, megabytes, on_threads, rank_shown
from fxfact.analysis.svg import Scale, curve, picture
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
.wire { fill: none; stroke: #9aa5b1 } .chain { cursor: pointer } .stages { display: none }
.chain.open .stages { display: inline }
table { border-collapse: collapse; font-size: 13px }
th { text-align: left; color: var(--soft); font-weight: 500; position: sticky; top: 0; background: var(--paper) }
td, th { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td:not(:nth-child(2)) { white-space: nowrap } td:nth-child(2) { max-width: 24em }
.bars { width: 96px } .bars i { display: block; height: 5px; margin: 2px 0; background: var(--was); min-width: 1px }
.bars i.is { background: var(--is) } .bars i.err { background: var(--hot) }
.curve polygon { fill: #2f6fb333 } .curve polyline { fill: none; stroke: var(--is); stroke-width: 1.5 }
.curve path { stroke: var(--hot); stroke-dasharray: 3 2 }
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


def page(facts: ReportData) -> str:
    """The whole page."""
    title = f"{facts.model}, factorized by fxfact"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *_head(facts),
        *_pictures(facts),
        *_rewritten([conv for conv in facts.convolutions if conv.factorization]),
        *_left([conv for conv in facts.convolutions if not conv.factorization]),
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _head(facts: ReportData) -> Iterable[str]:
    before, after = facts.before, facts.after
    rewritten = sum(bool(conv.factorization) for conv in facts.convolutions)
    verdict = "the graph is right" if facts.ok else '<span class="wrong">the graph is WRONG</span>'
    tiles = [
        ("parameters", format_change(before.params, after.params)),
        ("MACs of a sample", format_change(before.macs, after.macs)),
        (f"milliseconds, {on_threads(facts.threads)}", format_change(*facts.milliseconds)),
        ("MB of activations at the peak", format_change(*megabytes(facts.activation_bytes))),
        ("relative error of the output", error(facts.end_to_end_error)),
        ("convolutions rewritten", f"{rewritten} of {len(facts.convolutions)}"),
    ]
    how = f"it differs by {facts.graph_error:.1e} from the original with the same kernels"
    yield f'<p class="soft">{verdict}: {how}</p>'
    yield '<div class="tiles">'
    yield from (f"<div><b>{escape(value or '?')}</b>{escape(name)}</div>" for name, value in tiles)
    yield "</div>"
    for reason in facts.refused:
        yield f'<p class="soft">captured by its {facts.capture}, and not by {escape(reason)}</p>'


def _pictures(facts: ReportData) -> Iterable[str]:
    before, after = facts.flows
    yield "<h2>Before and after</h2>"
    if before.wired:
        yield "<p>The redder a block, the more MACs; at its right, their share of all of the original's.</p>"
    else:
        yield (
            "<p>The model keeps its own Python, so there is no graph: these are its modules in the order of their "
            "definition. The redder, the more MACs; at the right, their share of all of the original's.</p>"
        )
    if any(block.stages for block in after.blocks):
        yield '<p>A click on a blue block shows its stages. <button id="all">all stages</button></p>'
    largest = max(block.macs or 0 for flow in facts.flows for block in flow.blocks)
    scale = Scale(facts.before.macs or before.macs, largest)
    drawn = [picture(flow, scale) for flow in facts.flows]
    yield f'<div class="pictures">{"".join(f"<div>{each}</div>" for each in drawn)}</div>'


def _rewritten(convolutions: Sequence[ConvReport]) -> Iterable[str]:
    if not convolutions:
        return
    yield "<h2>Convolution by convolution</h2>"
    yield (
        "<p>Above, grey: as it was; below, blue: the chain; each column to its own scale; the peak is what "
        "activations take at one time, beside the input. Errors are relative: of the "
        "kernel, and of the output on the original's own input. Spectra are the singular values of the kernel's "
        "unfoldings, those that a rank of the chain keeps filled.</p>"
    )
    heads = ["convolution", "became", "parameters", "MACs", "ms", "peak MB", "kernel error", "output error", "spectra"]
    foreseen = any(conv.predicted_loss_increase is not None for conv in convolutions)
    heads[-1:-1] = ["loss +, nats"] if foreseen else []
    yield f"<table><thead><tr>{_cells('th', heads)}</tr></thead><tbody>"
    most_params = max(max(conv.before.params, conv.after.params) for conv in convolutions)
    most_macs = max(max(conv.before.macs or 0, conv.after.macs or 0) for conv in convolutions)
    most_ms = max(max(conv.milliseconds or (0.0,)) for conv in convolutions)
    peaks = [(None, None) if c.activation_bytes is None else megabytes(c.activation_bytes) for c in convolutions]
    most_mb = max(max(pair[0] or 0.0, pair[1] or 0.0) for pair in peaks)
    worst = max(max(conv.kernel_error or 0, conv.output_error or 0) for conv in convolutions)
    for conv, peak in zip(convolutions, peaks, strict=True):
        cells = [
            f"<b>{escape(conv.path)}</b><br><small>{escape(conv.convolution)}</small>",
            f"{escape(conv.factorization)} {rank_shown(conv.rank)}<br><small>{_became(conv)}</small>",
            _bars((conv.before.params, conv.after.params), most_params),
            _bars((conv.before.macs, conv.after.macs), most_macs),
            _bars(conv.milliseconds or (None, None), most_ms),
            _bars(peak, most_mb),
            _error(conv.kernel_error, worst),
            _error(conv.output_error, worst),
            *([error(conv.predicted_loss_increase)] if foreseen else []),
            " ".join(map(curve, conv.spectra)),
        ]
        yield f"<tr>{_cells('td', cells)}</tr>"
    yield "</tbody></table>"


def _became(conv: ConvReport) -> str:
    return "<br>".join(escape(words) for words in (" | ".join(conv.stages), conv.note) if words)


def _left(convolutions: Sequence[ConvReport]) -> Iterable[str]:
    if not convolutions:
        return
    yield "<h2>Left as they are</h2>"
    yield f"<table><thead><tr>{_cells('th', ['convolution', 'why', 'MACs'])}</tr></thead><tbody>"
    for conv in convolutions:
        name = f"<b>{escape(conv.path)}</b><br><small>{escape(conv.convolution)}</small>"
        macs = "" if conv.before.macs is None else format_amount(conv.before.macs)
        yield f"<tr>{_cells('td', [name, escape(conv.reason), macs])}</tr>"
    yield "</tbody></table>"


def _cells(tag: str, cells: Iterable[str]) -> str:
    return "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)


def _bars(pair: Sequence[float | None], most: float) -> str:
    before, after = pair
    if before is None or after is None:
        return ""
    widths = [100 * value / most if most else 0 for value in (before, after)]
    bars = f'<i style="width:{widths[0]:.1f}%"></i><i class="is" style="width:{widths[1]:.1f}%"></i>'
    return f'<div class="bars">{bars}</div><small>{escape(format_change(before, after))}</small>'


def _error(found: float | None, worst: float) -> str:
    if found is None:
        return ""
    width = 100 * found / worst if worst else 0
    return f'<div class="bars"><i class="err" style="width:{width:.1f}%"></i></div><small>{error(found)}</small>'
