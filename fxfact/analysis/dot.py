"""Graphviz source of a network's graph."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.export import ExportedProgram

from fxfact.analysis.block_diagram import build_block_diagram, chains_of
from fxfact.analysis.inspection import looked_at
from fxfact.analysis.report_data import Block, BlockDiagram
from fxfact.capture import ExampleInputs


def to_dot(network: nn.Module | ExportedProgram, *, example_inputs: ExampleInputs | None = None) -> str:
    """The graph in the DOT language, for Graphviz: every convolution and chain a box, chains with their stages inside,
    darker by their share of the MACs (which example_inputs give, or a graph that has shapes).

    A model that keeps its own Python has no wires. Raises ArgumentTypeError, CaptureError.
    """
    return "\n".join(_lines(build_block_diagram(looked_at(network, example_inputs), chains_of(network))))


def _lines(flow: BlockDiagram) -> Iterator[str]:
    yield "digraph {"
    yield '  node [shape=box style="rounded,filled" fillcolor=white fontname="sans-serif" fontsize=10]'
    for number, block in enumerate(flow.blocks):
        share = (block.macs or 0) / max(flow.macs, 1)
        words = [_escaped(line) for line in _words(block)]
        label = "\\n".join(words)
        if block.stages:
            yield f'  subgraph cluster_{number} {{ label="{label}" fontname="sans-serif" fontsize=10'
            names = [_stage(number, k) for k in range(len(block.stages))]
            for name, stage in zip(names, block.stages, strict=True):
                yield f'    {name} [label="{_escaped(stage)}" fillcolor="{_shade(share / len(names))}"]'
            yield f"    {' -> '.join(names)}"
            yield "  }"
        else:
            yield f'  {_stage(number, 0)} [label="{label}" fillcolor="{_shade(share)}"]'
    for number, block in enumerate(flow.blocks):
        for source in block.inputs:
            last = max(len(flow.blocks[source].stages) - 1, 0)
            yield f"  {_stage(source, last)} -> {_stage(number, 0)}"
    yield "}"


def _words(block: Block) -> list[str]:
    return [line for line in (block.label, block.detail, " · ".join(block.behind)) if line]


def _stage(number: int, stage: int) -> str:
    return f"block_{number}_{stage}"


def _shade(share: float) -> str:
    """Hue, saturation, value: the more the redder."""
    return f"0.05 {min(1.0, 8 * share):.3f} 1.0"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
