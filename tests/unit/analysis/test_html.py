from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import torch

from fxfact.analysis import Report
from fxfact.analysis.report_data import Block, BlockDiagram
from fxfact.conv import Cost
from fxfact.planning import MeasuredPoint, ParetoFront, ParetoPoint


class _StrictParser(HTMLParser):
    """Checks that tags are balanced, and that nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        assert len({name for name, _ in attrs}) == len(attrs)
        assert not {name for name, _ in attrs} & {"src", "srcset", "onclick"}
        assert all(value == "data:," for name, value in attrs if name == "href")
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_loads_nothing_and_escapes_names(report: Report) -> None:
    hostile = "</svg><script>alert('x')</script>&"
    conv = replace(report.convolutions[0], path=hostile, reason=hostile)
    named = replace(report.convolutions[0], factorization=hostile, note=f"lowered {hostile}", reason="")
    before, after = report.diagrams
    diagram = BlockDiagram(
        blocks=(*after.blocks, Block(kind="chain", label=hostile, stages=(hostile,))), has_edges=True
    )
    page = replace(
        report,
        model=hostile,
        refused=(hostile,),
        changed=(hostile,),
        convolutions=(conv, named, *report.convolutions),
        diagrams=(before, diagram),
    ).to_html()
    parser = _StrictParser()
    parser.feed(page)
    assert parser.open == []
    assert parser.seen.count("script") == 1
    assert not re.search(r"https?:|url\(|@import", page)
    assert page.count(hostile) == 0
    assert "lowered &lt;/svg&gt;" in page


def test_html_says_first_what_was_verified_and_what_changed(report: Report) -> None:
    check = "graph check passed: on these inputs, the network equals the original with the same kernels"
    page = report.to_html()
    error = f"<dd>{100 * report.end_to_end_error:.1f} %</dd>"
    assert 0 < page.index("<h1>Net <span>") < page.index(f'<p class="check">{check}') < page.index(error)
    wrong = replace(report, graph_error=0.5, ok=False, changed=("norm.bias",)).to_html()
    assert '<p class="check wrong">graph check FAILED: on these inputs, the network differs' in wrong
    assert '<p class="check wrong">changed after factorization' in wrong


def test_html_marks_what_got_worse(report: Report) -> None:
    slower = replace(report, milliseconds=(2.0, 3.0), activation_bytes=(100, 100)).to_html()
    assert '<b class="worse">+50 %</b><small>2 → 3</small>' in slower
    assert '<b class="soft">±0 %</b>' in slower
    faster = replace(report, milliseconds=(2.0, 1.0)).to_html()
    assert '<b class="better">−50 %</b><small>2 → 1</small>' in faster
    conv = replace(report.convolutions[0], milliseconds=(1.0, 2.5))
    (cell,) = re.findall(r'<td data-name="ms".*?</td>', replace(report, convolutions=(conv,)).to_html())
    assert '<i class="more"' in cell
    assert '<span class="worse">2.50×</span>' in cell
    losses = {"predicted_loss_increase": 0.1, "measured_loss_increase": 0.5}
    assert '<dd class="worse">0.5 ' in replace(report, **losses).to_html()


def test_html_says_when_and_how_it_was_made(report: Report) -> None:
    page = replace(report, created="2026-01-02 03:04 UTC", refused=("a graph: it branches",)).to_html()
    assert "2026-01-02 03:04 UTC" in page
    assert f"torch {torch.__version__}" in page
    assert "fxfact.plan(model, factorization=" in page
    assert "not as a graph: it branches" in page


def test_html_has_the_pareto_front_with_what_was_measured(report: Report) -> None:
    assert '<svg class="front"' not in report.to_html(), "the plan has no budget"
    chosen = MeasuredPoint(Cost(50, 500), 0.2, measured_loss_increase=0.3, metric=91.5)
    points = (ParetoPoint(Cost(20, 200), 1.0), ParetoPoint(Cost(100, 1000), 0.0))
    front = ParetoFront(network=Cost(100, 1000), points=points, chosen=chosen)
    page = replace(report, pareto_front=front).to_html()
    (picture,) = re.findall(r'<svg class="front".*?</svg>', page, re.DOTALL)
    root = ET.fromstring(picture)
    tips = [each.get("data-tip") for each in root.iter() if each.get("data-tip")]
    assert tips == [  # XML reads line breaks in attributes as spaces
        "another budget 200 MACs (20%) predicted loss + 1 nats",
        "this network 500 MACs (50%) predicted loss + 0.2 nats measured loss + 0.3 nats metric 91.5",
        "another budget 1k MACs (100%) predicted loss + 0 nats",
    ]
    assert len(root.findall('.//circle[@class="predicted"]')) == 2, "a loss of 0 has no place on the axis"
    assert len(root.findall('.//circle[@class="measured"]')) == 1
    assert "this network: 50%" in picture
    larger = replace(front, chosen=MeasuredPoint(Cost(150, 1500), 0.2))
    (picture,) = re.findall(r'<svg class="front".*?</svg>', replace(report, pareto_front=larger).to_html(), re.DOTALL)
    places = [float(place) for place in re.findall(r'cx="([^"]+)"', picture)]
    assert 0 < min(places) < max(places) <= 720 - 58, "a network that costs more than the dense one is in the picture"
    nothing = replace(front, points=(ParetoPoint(Cost(100, 1000), 0.0),), chosen=None)
    assert '<svg class="front"' not in replace(report, pareto_front=nothing).to_html()


def test_html_maps_every_layer_and_sorts_by_numbers(report: Report) -> None:
    page = report.to_html()
    count = len(report.convolutions)
    squares = re.findall(r'<i class="(\w+)" style="--v:(\d+)%" data-layer="([^"]*)"', page)
    assert {path for *_, path in squares} == {conv.path for conv in report.convolutions}
    assert len(squares) % count == 0
    assert max(int(strength) for kind, strength, _ in squares if kind == "error") == 100
    assert {path for kind, _, path in squares if kind == "none"} >= {"thin"}, "it stays dense"
    rows = re.findall(r'<tr data-layer="([^"]*)"', page)
    assert rows == [conv.path for conv in report.convolutions]
    values = re.findall(r'<td data-name="parameters" data-value="([^"]*)"', page)
    assert list(map(float, values)) == [conv.after.params for conv in report.convolutions]
    heads = re.findall(r'<th data-kind="(\w+)"><button data-tip="[^"]+">', page)
    assert heads[:2] == ["text", "text"]
    assert set(heads[2:]) == {"number"}
    cells = page[page.index("<tbody>") :].count("<td")
    assert cells == count * len(heads)


def test_html_bears_errors_that_are_not_finite(report: Report) -> None:
    errors = (math.inf, math.nan, 0.5, None)
    convolutions = tuple(
        replace(report.convolutions[0], path=str(k), kernel_error=error, output_error=error)
        for k, error in enumerate(errors)
    )
    page = replace(report, convolutions=convolutions, end_to_end_error=math.nan, loss_increase=math.inf).to_html()
    assert not re.search(r"(?:--v|width):(?:nan|inf)", page)
    assert "unknown" in page
