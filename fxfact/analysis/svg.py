"""Pictures as SVG: a network's block diagram, and the spectrum of a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from fxfact.analysis.report_data import Block, BlockDiagram, Spectrum
from fxfact.conv import format_spec_forms

# Pixels.
_ROW = 27  # from one block to the next
_HEIGHT = 21  # of a block
_WIDTH = 326  # of a block
_LANE = 9  # between two edges that run side by side
_GAP = 14  # between stages
_SHARE = 52  # column of the shares of the MACs
_LETTER = 6.4  # width of a letter in a stage
_MAX_STAGE_WIDTH = 240

_MAX_LABEL_LETTERS = 26


class Scale(NamedTuple):
    """MACs of the whole network and of its largest block."""

    total: int
    largest: int


def draw_diagram(diagram: BlockDiagram, scale: Scale) -> str:
    """Draw the blocks in one column, in order. The more MACs, the redder.

    Edges between blocks that are not neighbours run on the left. A click on a chain shows its stages on the right.
    """
    lanes = _assign_lanes(diagram)
    left = _LANE * (max(lanes.values(), default=-1) + 1) + 8
    stages_width = max((sum(_stage_width(stage) + _GAP for stage in b.stages) for b in diagram.blocks), default=0)
    narrow, height = left + _WIDTH + _SHARE, len(diagram.blocks) * _ROW + 8
    wide = narrow + stages_width
    parts = [
        f'<svg class="blocks" viewBox="0 0 {narrow} {height}" width="{narrow}" height="{height}" '
        f'data-narrow="{narrow}" data-wide="{wide}" role="img">'
    ]
    for (source, target), lane in lanes.items():
        parts.append(_draw_side_edge(left, left - 6 - lane * _LANE, _middle(source), _middle(target)))
    for number, block in enumerate(diagram.blocks):
        if number - 1 in block.inputs:
            x, y = left + _WIDTH / 2, _top(number)
            parts.append(f'<path class="edge" d="M{x} {y - _ROW + _HEIGHT}V{y}"/>')
        parts += _draw_block(block, left, _top(number), scale)
    return "".join([*parts, "</svg>"])


def draw_spectrum(spectrum: Spectrum) -> str:
    """Draw the singular values from left to right. The kept ones are filled, and a line marks the rank."""
    width, height, count = 84, 34, len(spectrum.values)
    step = width / max(count, 1)
    points = [(k * step, 2 + (height - 4) * (1 - value)) for k, value in enumerate(spectrum.values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    kept = [point for k, point in enumerate(points) if k < spectrum.rank]
    mark = (min(spectrum.rank, count) - 0.5) * step
    area = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(0, height), *kept, (kept[-1][0] if kept else 0, height)])
    title = f"{spectrum.name}: {spectrum.rank} of {count} singular values kept"
    return (
        f'<svg class="spectrum" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f'<title>{escape(title)}</title><polygon points="{area}"/><polyline points="{line}"/>'
        f'<path d="M{mark:.1f} 0V{height}"/></svg>'
    )


def _assign_lanes(diagram: BlockDiagram) -> dict[tuple[int, int], int]:
    """Give every edge that skips blocks a lane, so that no two edges in a lane overlap. Short edges come first."""
    edges = [(source, number) for number, block in enumerate(diagram.blocks) for source in block.inputs]
    lane_of: dict[tuple[int, int], int] = {}
    lanes: list[list[tuple[int, int]]] = []
    for source, target in sorted((e for e in edges if e[1] - e[0] > 1), key=lambda e: e[1] - e[0]):
        free = (k for k, lane in enumerate(lanes) if all(target <= a or source >= b for a, b in lane))
        number = next(free, len(lanes))
        if number == len(lanes):
            lanes.append([])
        lanes[number].append((source, target))
        lane_of[source, target] = number
    return lane_of


def _draw_block(block: Block, x: float, y: float, scale: Scale) -> Iterator[str]:
    share = (block.macs or 0) / max(scale.total, 1)
    details, shorter = (
        " ".join(word for word in (detail, *(f"· {name}" for name in block.followed_by)) if word)
        for detail in (format_spec_forms(block.detail) if block.kind == "convolution" else 2 * (block.detail,))
    )
    title = "\n".join([f"{block.label} {details}", *block.stages, f"{block.macs or 0:,} MACs, {share:.1%}"])
    yield '<g class="chain">' if block.stages else "<g>"
    yield f"<title>{escape(title)}</title>"
    heat = round(70 * (block.macs or 0) / max(scale.largest, 1))
    is_long = len(block.label) > _MAX_LABEL_LETTERS
    label = f"…{block.label[1 - _MAX_LABEL_LETTERS :]}" if is_long else block.label
    text = f'<tspan class="label">{escape(label)}</tspan> {escape(shorter)}'
    yield _draw_box((x, y), _WIDTH, text, "folded" if block.stages else block.kind, heat)
    if block.macs:
        yield f'<text x="{x + _WIDTH + 6}" y="{y + 15}">{share:.1%}</text>'
    if block.stages:
        yield '<g class="stages">'
        left = x + _WIDTH + _SHARE
        for stage in block.stages:
            yield f'<path class="edge" d="M{left - _GAP} {y + _HEIGHT / 2}H{left}"/>'
            yield _draw_box((left, y), _stage_width(stage), escape(format_spec_forms(stage)[1]), "stage")
            left += _stage_width(stage) + _GAP
        yield "</g>"
    yield "</g>"


def _draw_box(position: tuple[float, float], width: float, text: str, kind: str, heat: int = 0) -> str:
    """Draw a box, and cut its text off at the right edge."""
    x, y = position
    style = f' style="--heat:{heat}%"' if heat else ""
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{_HEIGHT}" rx="4"{style}/>'
        f'<svg x="{x}" y="{y}" width="{width - 4}" height="{_HEIGHT}"><text x="6" y="15">{text}</text></svg>'
    )


def _draw_side_edge(right: float, lane: float, above: float, below: float) -> str:
    return f'<path class="edge" d="M{right} {above}H{lane + 4}q-4 0 -4 4V{below - 4}q0 4 4 4H{right}"/>'


def _stage_width(stage: str) -> int:
    return min(_MAX_STAGE_WIDTH, round(14 + _LETTER * len(format_spec_forms(stage)[1])))


def _top(number: int) -> float:
    return 4 + number * _ROW


def _middle(number: int) -> float:
    return _top(number) + _HEIGHT / 2
