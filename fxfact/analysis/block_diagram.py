"""Block diagrams of networks: from the graph, or from the modules of a network that keeps the model's own Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import fx, nn
from torch.export import ExportedProgram

from fxfact.analysis.report_data import Block, BlockDiagram
from fxfact.capture import Captured
from fxfact.conv import ConvSite, Cost, chain_cost, is_conv, spec_of, stages_in
from fxfact.factorizations import format_rank
from fxfact.graph import GraphSite, macs_by_node, match
from fxfact.passes import pass_history

ChainLabels = Mapping[str, str]
"""Factorization and rank of every rewritten convolution, by path."""


def build_block_diagram(captured: Captured, chains: ChainLabels, original: Captured | None = None) -> BlockDiagram:
    """Draw a captured network. Blocks at the paths in ``chains`` are chains with these labels.

    If there is no graph, the input sizes are those of the ``original``'s convolutions.
    """
    if isinstance(captured.network, fx.GraphModule):
        return _GraphDiagram(captured.network, captured.samples, chains).build()
    reference = original or captured
    sites = {site.path: site for site in reference.sites}
    blocks = tuple(_module_blocks(captured.network, sites, reference.samples, chains))
    return BlockDiagram(blocks=blocks, has_edges=False)


def chain_labels(network: nn.Module | ExportedProgram) -> ChainLabels:
    """Return factorization and rank of every convolution that plans rewrote in a network."""
    rewrites = [decision for record in pass_history(network) for decision in record.plan.rewrites]
    return {d.path: f"{d.factorization.name if d.factorization else ''} {format_rank(d.rank)}" for d in rewrites}


class _OpenBlock(NamedTuple):
    """A block, the last of its nodes so far, and its path if it is a chain."""

    block: Block
    last_node: fx.Node
    chain_path: str


class _GraphDiagram:
    """Builds the block diagram of a graph, node by node."""

    def __init__(self, graph_module: fx.GraphModule, samples: int, chains: ChainLabels) -> None:
        self._root, self._samples, self._chains = graph_module, samples, chains
        self._verdicts = match(graph_module).verdicts
        self._macs = macs_by_node(graph_module)
        self._blocks: list[_OpenBlock] = []
        self._block_of: dict[fx.Node, int] = {}

    def build(self) -> BlockDiagram:
        """Read every node of the graph."""
        for node in self._root.graph.nodes:
            if node.op != "get_attr":
                self._add(node)
        return BlockDiagram(blocks=tuple(each.block for each in self._blocks), has_edges=True)

    def _add(self, node: fx.Node) -> None:
        """Append a node to the block that it reads, or begin a new block."""
        inputs = tuple(dict.fromkeys(self._block_of[n] for n in node.all_input_nodes if n in self._block_of))
        path = self._chain_path(node)
        source = self._blocks[inputs[0]] if len(inputs) == 1 else None
        if source is not None and list(source.last_node.users) == [node]:
            block, extended = source.block, None
            if path and source.chain_path == path and not self._is_first_stage(node):
                macs = (Cost(0, block.macs) + Cost(0, self._macs_per_sample(node))).macs
                extended = replace(block, stages=(*block.stages, self._node_text(node)), macs=macs)
            elif self._may_follow(node, block):
                extended = replace(block, followed_by=(*block.followed_by, self._node_text(node)))
            if extended is not None:
                self._blocks[inputs[0]] = _OpenBlock(extended, node, source.chain_path)
                self._block_of[node] = inputs[0]
                return
        block = replace(self._new_block(node, path), inputs=inputs, macs=self._macs_per_sample(node))
        self._block_of[node] = len(self._blocks)
        self._blocks.append(_OpenBlock(block, node, path))

    def _new_block(self, node: fx.Node, path: str) -> Block:
        verdict = self._verdicts[node]
        kind = {"placeholder": "input", "output": "output"}.get(node.op, "operation")
        if path:
            return Block(kind="chain", label=path, detail=self._chains[path], stages=(self._node_text(node),))
        if isinstance(verdict, GraphSite):
            return Block(kind="convolution", label=verdict.path, detail=str(verdict.spec))
        if node.op == "call_module":
            return Block(kind=kind, label=str(node.target), detail=self._node_text(node))
        return Block(kind=kind, label=self._node_text(node))

    def _may_follow(self, node: fx.Node, block: Block) -> bool:
        """Whether a node is drawn inside the block that it reads: it has no MACs, and the block is no input."""
        is_plain = node.op != "output" and not isinstance(self._verdicts[node], GraphSite)
        return is_plain and not self._macs.get(node) and block.kind != "input"

    def _chain_path(self, node: fx.Node) -> str:
        """Return the path of the chain that a node is a stage of, or ''."""
        verdict = self._verdicts[node]
        name = verdict.path if isinstance(verdict, GraphSite) else str(node.target) if node.op == "call_module" else ""
        path, _, index = name.rpartition(".")
        return path if path in self._chains and index.isdecimal() else ""

    def _is_first_stage(self, node: fx.Node) -> bool:
        return str(node.target).endswith(".0")  # the chain is called once more

    def _macs_per_sample(self, node: fx.Node) -> int | None:
        macs = self._macs.get(node)
        return None if macs is None else macs // self._samples

    def _node_text(self, node: fx.Node) -> str:
        """Return the convolution's sizes, the module's class or the function's name."""
        verdict = self._verdicts[node]
        if isinstance(verdict, GraphSite):
            return str(verdict.spec)
        if node.op == "call_module":
            return type(self._root.get_submodule(str(node.target))).__name__
        if node.op == "call_function":
            return str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        return str(node.target)


def _module_blocks(
    network: nn.Module, sites: Mapping[str, ConvSite], samples: int, chains: ChainLabels
) -> Iterator[Block]:
    """Yield one block for every chain and for every other module without children."""
    for path, module in network.named_modules():
        is_chain = path in chains
        owner, _, name = path.rpartition(".")
        if not is_chain and ((owner in chains and name.isdecimal()) or list(module.children())):
            continue
        if is_chain:
            specs = [spec_of(stage) for stage in stages_in(module) if is_conv(stage)]
        else:
            specs = [sites[path].spec] if path in sites else []
        sizes = sites[path].input_sizes(samples) if specs and path in sites else None
        yield Block(
            kind="chain" if is_chain else "convolution" if is_conv(module) else "operation",
            label=path,
            detail=chains[path] if is_chain else str(specs[0]) if specs else type(module).__name__,
            macs=chain_cost(specs, sizes).macs if specs else None,
            stages=tuple(map(str, specs)) if is_chain else (),
        )
