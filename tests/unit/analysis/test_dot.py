from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import torch
from torch import Tensor, nn

import fxfact
from fxfact.analysis import Report


def test_dot_names_every_block_and_edge(report: Report, networks: tuple[Any, Any], x: Tensor) -> None:
    source = fxfact.to_dot(networks[1], example_inputs=x)
    defined = set(re.findall(r"(block_\d+_\d+) \[", source))
    edges = re.findall(r"(block_\d+_\d+) -> (block_\d+_\d+)", source)
    assert {name for edge in edges for name in edge} <= defined
    assert source.count("subgraph") == 4
    assert len(edges) >= sum(len(block.inputs) for block in report.diagrams[1].blocks)
    if shutil.which("dot"):
        drawn = subprocess.run(["dot", "-Tsvg"], input=source, capture_output=True, text=True, check=True).stdout
        assert "thin" in drawn


def test_dot_draws_a_chain_that_is_called_again_once_more() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(torch.relu(self.conv(x))))

    small = fxfact.factorize(Repeated().eval(), "tucker", rank=0.5)
    assert fxfact.to_dot(small).count("subgraph") == 3
