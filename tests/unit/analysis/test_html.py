from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from fxfact.analysis import Report
from fxfact.analysis.report_data import Block, BlockDiagram


class _StrictParser(HTMLParser):
    """Checks that tags are balanced, and that nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
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


def test_html_headline_says_what_was_verified(report: Report) -> None:
    check = "on these inputs, the network equals the original with the same kernels"
    page = report.to_html()
    cost = f"<p><b>approximation error {100 * report.end_to_end_error:.1f} %: relative error of the output"
    assert 0 < page.index(cost) < page.index(f'<p class="soft">graph check passed: {check}')
    wrong = replace(report, graph_error=0.5, ok=False, changed=("norm.bias",)).to_html()
    assert '<p class="wrong">graph check FAILED: on these inputs, the network differs' in wrong
    assert '<p class="wrong">changed after factorization' in wrong
