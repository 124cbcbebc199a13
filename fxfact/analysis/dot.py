"""A network's block diagram as Graphviz source."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.export import ExportedProgram

from fxfact.analysis.block_diagram import build_block_diagram, chain_labels
from fxfact.analysis.inspection import capture_for_display
from fxfact.analysis.report_data import Block, BlockDiagram
from fxfact.capture import ExampleInputs


def to_dot(network: nn.Module | ExportedProgram, *, example_inputs: ExampleInputs | None = None) -> str:
    """Draw a network's graph in the DOT language, for Graphviz.

    Every convolution and every chain is a box, and a chain shows its stages. The larger a box's share of the MACs, the
    redder it is. A network that keeps the model's own Python has no graph: its modules are drawn without edges.

    Args:
        network: The network to draw, factorized or not.
        example_inputs: One call of the network, which gives the MACs. An ExportedProgram and a graph with recorded
            shapes need none.

    Returns:
        The text of a ``.dot`` file.

    Raises:
        ArgumentTypeError: ``network`` is neither a module nor an ExportedProgram.
        CaptureError: The network cannot be copied, or fails on ``example_inputs``.
    """
    return "\n".join(
        _dot_lines(build_block_diagram(capture_for_display(network, example_inputs), chain_labels(network)))
    )


def _dot_lines(diagram: BlockDiagram) -> Iterator[str]:
    yield "digraph {"
    yield '  node [shape=box style="rounded,filled" fillcolor=white fontname="sans-serif" fontsize=10]'
    for number, block in enumerate(diagram.blocks):
        share = (block.macs or 0) / max(diagram.macs, 1)
        label = "\\n".join(_escape(line) for line in _label_lines(block))
        if block.stages:
            yield f'  subgraph cluster_{number} {{ label="{label}" fontname="sans-serif" fontsize=10'
            names = [_node_name(number, k) for k in range(len(block.stages))]
            for name, stage in zip(names, block.stages, strict=True):
                yield f'    {name} [label="{_escape(stage)}" fillcolor="{_fill_color(share / len(names))}"]'
            yield f"    {' -> '.join(names)}"
            yield "  }"
        else:
            yield f'  {_node_name(number, 0)} [label="{label}" fillcolor="{_fill_color(share)}"]'
    for number, block in enumerate(diagram.blocks):
        for source in block.inputs:
            last = max(len(diagram.blocks[source].stages) - 1, 0)
            yield f"  {_node_name(source, last)} -> {_node_name(number, 0)}"
    yield "}"


def _label_lines(block: Block) -> list[str]:
    return [line for line in (block.label, block.detail, " · ".join(block.followed_by)) if line]


def _node_name(block: int, stage: int) -> str:
    return f"block_{block}_{stage}"


def _fill_color(share: float) -> str:
    """Return hue, saturation and value: the larger the share of the MACs, the redder."""
    return f"0.05 {min(1.0, 8 * share):.3f} 1.0"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
