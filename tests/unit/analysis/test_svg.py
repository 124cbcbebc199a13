from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

from fxfact.analysis import Report
from fxfact.analysis.report_data import Block, BlockDiagram
from fxfact.analysis.svg import Scale, draw_diagram


def test_svg_pictures_are_well_formed(report: Report) -> None:
    pattern = r'<svg class="blocks".*?</svg>(?=</div>)|<svg class="spectrum".*?</svg>'
    pictures = re.findall(pattern, report.to_html(), re.DOTALL)
    assert len(pictures) == 2 + sum(len(conv.spectra) for conv in report.convolutions)
    assert all(ET.fromstring(picture).tag == "svg" for picture in pictures)


def test_svg_edges_share_a_lane_only_if_they_do_not_overlap() -> None:
    inputs: list[tuple[int, ...]] = [(), (0,), (0,), (2, 0), (2,), (4,), (5, 1)]
    blocks = tuple(Block(kind="operation", label=str(k), inputs=each) for k, each in enumerate(inputs))
    picture = draw_diagram(BlockDiagram(blocks=blocks, has_edges=True), Scale(total=1, largest=1))
    edges = re.findall(r'class="edge" d="M\S+ (\S+?)H(\S+?)q\S+ 0 -4 4V(\S+?)q', picture)
    assert len(edges) == 4
    spans: dict[str, list[tuple[float, float]]] = {}
    for top, lane, bottom in edges:
        spans.setdefault(lane, []).append((float(top), float(bottom)))
    assert len(spans) == 3
    for lane in spans.values():
        ordered = sorted(lane)
        assert all(first[1] <= second[0] for first, second in pairwise(ordered))
