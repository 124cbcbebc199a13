"""The layers of a report: a map of their errors and costs, and a table that can be sorted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from fxfact.analysis.html_terms import explained, factorization_meaning, meaning
from fxfact.analysis.report_data import Change, ConvReport, cost_changes, format_error
from fxfact.analysis.svg import draw_spectrum
from fxfact.conv import format_change, format_short
from fxfact.factorizations import format_rank

_GREW = 1.02  # ratio from which on a cost counts as larger
_ERRORS: dict[str, Callable[[ConvReport], float | None]] = {
    "loss +": lambda conv: conv.predicted_loss_increase,
    "output error": lambda conv: conv.output_error,
    "kernel error": lambda conv: conv.kernel_error,
}
_MAPPED_CHANGES = ("MACs", "ms")


def layer_map(convolutions: Sequence[ConvReport]) -> Iterator[str]:
    """Yield a map with a column for every layer, and a row for every error and cost that is known."""
    if not any(conv.factorization for conv in convolutions):
        return
    yield "<h2>Where the errors are</h2>"
    yield (
        "<p>Every column is a layer, in the order of the network. The stronger its orange, the larger the error. Costs "
        "that fell are blue, costs that grew are red. Click on a column to find the layer below.</p>"
    )
    layers = f"--layers:{len(convolutions)}"
    columns = f"grid-template-columns:auto repeat({len(convolutions)},minmax(0,1fr))"
    yield f'<div class="map" style="{layers};{columns}"><b></b>'
    for name, group in groupby(_group_names(convolutions)):
        label = name.rpartition(".")[2]
        yield f'<em style="grid-column:span {len(list(group))}" title="{escape(name)}">{escape(label)}</em>'
    for name, error_of in _ERRORS.items():
        values = [error_of(conv) for conv in convolutions]
        largest = max((value for value in values if value is not None), default=0.0)
        if largest > 0:
            yield f"<b>{explained(name, meaning(name))}</b>"
            yield from (_error_square(name, conv, error_of(conv), largest) for conv in convolutions)
    for name in _MAPPED_CHANGES:
        changes = [cost_changes(conv)[name] if conv.factorization else (None, None) for conv in convolutions]
        if any(before and after is not None for before, after in changes):
            yield f"<b>{explained(name, meaning(name))}</b>"
            yield from (_change_square(name, *pair) for pair in zip(convolutions, changes, strict=True))
    yield "</div>"


def _group_names(convolutions: Sequence[ConvReport]) -> list[str]:
    """Return the beginnings of the layers' paths: one component, or two if these are hardly divided by one."""
    parts = [conv.path.split(".") for conv in convolutions]
    depth = 1 if len({each[0] for each in parts}) > 2 else 2
    return [".".join(each[:depth]) for each in parts]


def _error_square(name: str, conv: ConvReport, value: float | None, largest: float) -> str:
    if value is None:
        return _square(conv, "none", 0.0, f"{name}: {conv.reason or 'not known'}")
    return _square(conv, "error", _share(value, largest) ** 0.5, f"{name} {format_error(value)}")


def _change_square(name: str, conv: ConvReport, change: Change) -> str:
    before, after = change
    if not before or after is None:
        return _square(conv, "none", 0.0, f"{name}: {conv.reason or 'not known'}")
    kind = "grew" if grew(before, after) else "saved"
    return _square(conv, kind, min(1.0, abs(1 - after / before)), f"{name} {format_change(before, after)}")


def _square(conv: ConvReport, kind: str, strength: float, text: str) -> str:
    tip = escape(f"{conv.path}\n{text}")
    return f'<i class="{kind}" style="--v:{100 * strength:.0f}%" data-layer="{escape(conv.path)}" data-tip="{tip}"></i>'


@dataclass(frozen=True)
class _Scales:
    """The largest value of every column, which the bars are drawn to."""

    changes: dict[str, float]
    errors: dict[str, float]


def layer_table(convolutions: Sequence[ConvReport]) -> Iterator[str]:
    """Yield a table with a row for every layer."""
    if not convolutions:
        return
    errors = [name for name, error_of in _ERRORS.items() if any(error_of(conv) is not None for conv in convolutions)]
    costs = list(cost_changes(convolutions[0]))
    scales = _Scales(
        {name: max(max(v or 0.0 for v in cost_changes(conv)[name]) for conv in convolutions) for name in costs},
        {name: max(_ERRORS[name](conv) or 0.0 for conv in convolutions) for name in errors},
    )
    yield "<h2>Layers</h2>"
    yield (
        "<p>The grey bar is the layer, the blue bar the chain that replaced it, and a red bar a chain that costs more. "
        "Every column has its own scale. Click on a name to sort.</p>"
    )
    yield "<table><thead><tr>"
    yield from map(_head, ("layer", "became", *costs, *errors, "singular values"))
    yield "</tr></thead><tbody>"
    for conv in convolutions:
        yield from _row(conv, scales)
    yield "</tbody></table>"


def _head(name: str) -> str:
    kind = "text" if name in ("layer", "became") else "number"
    return f'<th data-kind="{kind}"><button data-tip="{escape(meaning(name))}">{escape(name)}</button></th>'


def _row(conv: ConvReport, scales: _Scales) -> Iterator[str]:
    kind = "" if conv.factorization else ' class="dense"'
    yield f'<tr data-layer="{escape(conv.path)}"{kind}>'
    yield f'<td class="layer"><b>{escape(conv.path)}</b><br><small>{escape(conv.convolution)}</small></td>'
    if conv.factorization:
        name = f"{conv.factorization} {format_rank(conv.rank)}"
        stages = "\n".join(line for line in (factorization_meaning(conv.factorization), *conv.stages) if line)
        note = f"<br><small>{escape(conv.note)}</small>" if conv.note else ""
        yield f'<td class="became">{explained(name, stages)}{note}</td>'
    else:
        yield f'<td class="reason">dense: {escape(conv.reason)}</td>'
    for name, change in cost_changes(conv).items():
        yield _change_cell(name, change, scales.changes[name])
    for name, largest in scales.errors.items():
        yield _error_cell(name, _ERRORS[name](conv), largest)
    spectra = "".join(map(draw_spectrum, conv.spectra))
    value = conv.spectra[0].rank / max(len(conv.spectra[0].values), 1) if conv.spectra else ""
    pictures = f'<div class="spectra">{spectra}</div>' if spectra else ""
    yield f'<td class="spectra-cell" data-value="{value}">{pictures}</td></tr>'


def _change_cell(name: str, change: Change, largest: float) -> str:
    before, after = change
    if before is None or after is None:
        return '<td data-value=""></td>'
    ratio, is_worse = after / before if before else 1.0, grew(before, after)
    bars = _bar("", before, largest) + (_bar("more" if is_worse else "is", after, largest) if after != before else "")
    if after == before:
        text = f"<small>{format_short(before)}</small>"
    else:
        kind = "worse" if is_worse else "same"
        text = (
            f'<span class="{kind}">{ratio:.2f}×</span><br><small>{format_short(before)} → {format_short(after)}</small>'
        )
    return f'<td data-name="{name}" data-value="{after}"><div class="bars">{bars}</div>{text}</td>'


def _error_cell(name: str, value: float | None, largest: float) -> str:
    if value is None:
        return '<td data-value=""></td>'
    return (
        f'<td data-name="{name}" data-value="{value}"><div class="bars">{_bar("err", value, largest)}</div>'
        f"<small>{format_error(value)}</small></td>"
    )


def _bar(kind: str, value: float, largest: float) -> str:
    return f'<i class="{kind}" style="width:{100 * _share(value, largest):.1f}%"></i>'


def _share(value: float, largest: float) -> float:
    """Return a value as a share of the largest, and 1 for infinity and NaN."""
    share = value / largest if largest else 0.0
    return share if math.isfinite(value) and math.isfinite(share) else 1.0


def grew(before: float, after: float) -> bool:
    """Return whether a cost is larger than before, by more than its measurement varies."""
    return after > _GREW * before
