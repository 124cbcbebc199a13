from __future__ import annotations

from typing import Any

import fxfact
from fxfact.analysis import Report


def test_block_diagram_shows_the_graph(report: Report, networks: tuple[Any, Any]) -> None:
    before, after = report.diagrams
    assert (before.macs, after.macs) == (report.before.macs, report.after.macs)
    labels = [block.label for block in before.blocks]
    assert labels == ["x", "stem", "body", "thin", "mul", "add", "up", "head", "output"]
    assert before.blocks[1].followed_by == ("BatchNorm2d", "relu")
    assert [before.blocks[i].label for i in before.blocks[5].inputs] == ["stem", "mul"]
    chains = {block.label: len(block.stages) for block in after.blocks if block.kind == "chain"}
    plan = fxfact.plan_of(networks[1])
    assert chains == {path: len(plan[path].stages) for path in ("stem", "body", "up", "head")}
    assert [block.inputs for block in after.blocks] == [block.inputs for block in before.blocks]
