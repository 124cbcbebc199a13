"""Pictures, as SVG: a network's blocks and wires, a spectrum."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from fxfact.analysis.report_data import Block, BlockDiagram, Spectrum

_ROW, _HEIGHT, _WIDTH, _LANE, _GAP, _SHARE = 27, 21, 360, 9, 14, 52
_LONGEST = 26  # letters of a path
_LETTER, _WIDEST = 6.4, 240  # of a stage


class Scale(NamedTuple):
    """The MACs of a whole network, and of its largest block."""

    total: int
    largest: int


def picture(flow: BlockDiagram, scale: Scale) -> str:
    """One column of blocks, in order, coloured by their MACs; wires between blocks that are not neighbours go around on
    the left, in lanes. The stages of a chain, to the right of it, are shown on a click.
    """
    lanes = _lanes(flow)
    left = _LANE * (max(lanes.values(), default=-1) + 1) + 8
    most = max((sum(_wide(stage) + _GAP for stage in block.stages) for block in flow.blocks), default=0)
    width, height = left + _WIDTH + _SHARE + most, len(flow.blocks) * _ROW + 8
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    for (source, target), lane in lanes.items():
        parts.append(_around(left, left - 6 - lane * _LANE, _middle(source), _middle(target)))
    for number, block in enumerate(flow.blocks):
        if number - 1 in block.inputs:
            x, y = left + _WIDTH / 2, _top(number)
            parts.append(f'<path class="wire" d="M{x} {y - _ROW + _HEIGHT}V{y}"/>')
        parts += _drawn(block, left, _top(number), scale)
    return "".join([*parts, "</svg>"])


def curve(spectrum: Spectrum) -> str:
    """The singular values falling from left to right, what is kept filled, the rank marked."""
    width, height, count = 120, 34, len(spectrum.values)
    step = width / max(count, 1)
    points = [(k * step, 2 + (height - 4) * (1 - value)) for k, value in enumerate(spectrum.values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    kept = [point for k, point in enumerate(points) if k < spectrum.rank]
    mark = (min(spectrum.rank, count) - 0.5) * step
    area = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(0, height), *kept, (kept[-1][0] if kept else 0, height)])
    title = f"{spectrum.name}: {spectrum.rank} of {count} kept"
    return (
        f'<svg class="curve" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f'<title>{escape(title)}</title><polygon points="{area}"/><polyline points="{line}"/>'
        f'<path d="M{mark:.1f} 0V{height}"/></svg>'
    )


def _lanes(flow: BlockDiagram) -> dict[tuple[int, int], int]:
    """A lane for every wire that goes around others, the shorter the nearer; no two in a lane overlap."""
    wires = [(source, number) for number, block in enumerate(flow.blocks) for source in block.inputs]
    found: dict[tuple[int, int], int] = {}
    taken: list[list[tuple[int, int]]] = []
    for source, target in sorted((w for w in wires if w[1] - w[0] > 1), key=lambda w: w[1] - w[0]):
        free = (k for k, lane in enumerate(taken) if all(target <= a or source >= b for a, b in lane))
        lane = next(free, len(taken))
        taken[lane:] = [[*(taken[lane] if lane < len(taken) else []), (source, target)], *taken[lane + 1 :]]
        found[source, target] = lane
    return found


def _drawn(block: Block, x: float, y: float, scale: Scale) -> Iterator[str]:
    share = (block.macs or 0) / max(scale.total, 1)
    words = " ".join(word for word in (block.detail, *(f"· {name}" for name in block.behind)) if word)
    title = "\n".join([f"{block.label} {words}", *block.stages, f"{block.macs or 0:,} MACs, {share:.1%}"])
    yield '<g class="chain">' if block.stages else "<g>"
    yield f"<title>{escape(title)}</title>"
    heat = round(70 * (block.macs or 0) / max(scale.largest, 1))
    label = block.label if len(block.label) <= _LONGEST else f"…{block.label[1 - _LONGEST :]}"
    text = f'<tspan class="label">{escape(label)}</tspan> {escape(words)}'
    yield _box((x, y), _WIDTH, text, "folded" if block.stages else block.kind, heat)
    if block.macs:
        yield f'<text x="{x + _WIDTH + 6}" y="{y + 15}">{share:.1%}</text>'
    if block.stages:
        yield '<g class="stages">'
        left = x + _WIDTH + _SHARE
        for stage in block.stages:
            yield f'<path class="wire" d="M{left - _GAP} {y + _HEIGHT / 2}H{left}"/>'
            yield _box((left, y), _wide(stage), escape(stage), "stage")
            left += _wide(stage) + _GAP
        yield "</g>"
    yield "</g>"


def _box(place: tuple[float, float], width: float, text: str, kind: str, heat: int = 0) -> str:
    """With a text that is cut off where the box ends."""
    x, y = place
    style = f' style="--heat:{heat}%"' if heat else ""
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{_HEIGHT}" rx="4"{style}/>'
        f'<svg x="{x}" y="{y}" width="{width - 4}" height="{_HEIGHT}"><text x="6" y="15">{text}</text></svg>'
    )


def _wide(stage: str) -> int:
    """The width of a stage's box."""
    return min(_WIDEST, round(14 + _LETTER * len(stage)))


def _around(right: float, lane: float, above: float, below: float) -> str:
    return f'<path class="wire" d="M{right} {above}H{lane + 4}q-4 0 -4 4V{below - 4}q0 4 4 4H{right}"/>'


def _top(number: int) -> float:
    return 4 + number * _ROW


def _middle(number: int) -> float:
    return _top(number) + _HEIGHT / 2
