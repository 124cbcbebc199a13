"""A network made blocks: from its graph, or from the modules of one that keeps its own Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import fx, nn
from torch.export import ExportedProgram

from fxfact.analysis.report_data import Block, BlockDiagram, rank_shown
from fxfact.capture import Captured
from fxfact.conv import ConvSite, Cost, chain_cost, is_conv, spec_of
from fxfact.graph import GraphSite, macs_by_node, match
from fxfact.passes import pass_history

Chains = Mapping[str, str]


def build_block_diagram(captured: Captured, chains: Chains, original: Captured | None = None) -> BlockDiagram:
    """The blocks of what was captured, of which the paths in ``chains`` are chains, with that said of them.

    Where there is no graph, the sizes are those that the ``original``'s convolutions have.
    """
    if isinstance(captured.network, fx.GraphModule):
        return _Graph(captured.network, captured.samples, chains).flow()
    known = original or captured
    sites = {site.path: site for site in known.sites}
    return BlockDiagram(blocks=tuple(_of_modules(captured.network, sites, known.samples, chains)), wired=False)


def chains_of(network: nn.Module | ExportedProgram) -> Chains:
    """What every convolution became that plans have rewritten in it, by path."""
    rewrites = [decision for done in pass_history(network) for decision in done.plan.rewrites]
    return {d.path: f"{d.factorization.name if d.factorization else ''} {rank_shown(d.rank)}" for d in rewrites}


class _Drawn(NamedTuple):
    """A block, the last of its nodes so far, and the path of the chain that it is, if it is one."""

    block: Block
    last: fx.Node
    path: str


class _Graph:
    """The blocks of a graph, as its nodes are read one after the other."""

    def __init__(self, graph_module: fx.GraphModule, samples: int, chains: Chains) -> None:
        self._root, self._samples, self._chains = graph_module, samples, chains
        self._verdicts = match(graph_module).verdicts
        self._macs = macs_by_node(graph_module)
        self._drawn: list[_Drawn] = []
        self._block_of: dict[fx.Node, int] = {}

    def flow(self) -> BlockDiagram:
        """Read all nodes."""
        for node in self._root.graph.nodes:
            if node.op != "get_attr":
                self._read(node)
        return BlockDiagram(blocks=tuple(drawn.block for drawn in self._drawn), wired=True)

    def _read(self, node: fx.Node) -> None:
        inputs = tuple(dict.fromkeys(self._block_of[n] for n in node.all_input_nodes if n in self._block_of))
        path = self._chain_of(node)
        before = self._drawn[inputs[0]] if len(inputs) == 1 else None
        if before is not None and list(before.last.users) == [node]:
            old, grown = before.block, None
            if path and before.path == path and not self._begins(node):
                macs = (Cost(0, old.macs) + Cost(0, self._macs_of(node))).macs
                grown = replace(old, stages=(*old.stages, self._name(node)), macs=macs)
            elif self._goes_behind(node, old):
                grown = replace(old, behind=(*old.behind, self._name(node)))
            if grown is not None:
                self._drawn[inputs[0]] = _Drawn(grown, node, before.path)
                self._block_of[node] = inputs[0]
                return
        block = replace(self._block(node, path), inputs=inputs, macs=self._macs_of(node))
        self._block_of[node] = len(self._drawn)
        self._drawn.append(_Drawn(block, node, path))

    def _block(self, node: fx.Node, path: str) -> Block:
        """One that begins with this node."""
        verdict = self._verdicts[node]
        kind = {"placeholder": "input", "output": "output"}.get(node.op, "operation")
        if path:
            return Block(kind="chain", label=path, detail=self._chains[path], stages=(self._name(node),))
        if isinstance(verdict, GraphSite):
            return Block(kind="convolution", label=verdict.path, detail=str(verdict.spec))
        if node.op == "call_module":
            return Block(kind=kind, label=str(node.target), detail=self._name(node))
        return Block(kind=kind, label=self._name(node))

    def _goes_behind(self, node: fx.Node, before: Block) -> bool:
        plain = node.op != "output" and not isinstance(self._verdicts[node], GraphSite)
        return plain and not self._macs.get(node) and before.kind != "input"

    def _chain_of(self, node: fx.Node) -> str:
        """The path of the rewritten convolution whose chain this node is a stage of, or nothing."""
        verdict = self._verdicts[node]
        own = verdict.path if isinstance(verdict, GraphSite) else str(node.target) if node.op == "call_module" else ""
        path, _, index = own.rpartition(".")
        return path if path in self._chains and index.isdecimal() else ""

    def _begins(self, node: fx.Node) -> bool:
        """Whether a chain's node calls its first stage: it is called again."""
        return str(node.target).endswith(".0")

    def _macs_of(self, node: fx.Node) -> int | None:
        known = self._macs.get(node)
        return None if known is None else known // self._samples

    def _name(self, node: fx.Node) -> str:
        verdict = self._verdicts[node]
        if isinstance(verdict, GraphSite):
            return str(verdict.spec)
        if node.op == "call_module":
            return type(self._root.get_submodule(str(node.target))).__name__
        if node.op == "call_function":
            return str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        return str(node.target)


def _of_modules(network: nn.Module, sites: Mapping[str, ConvSite], samples: int, chains: Chains) -> Iterator[Block]:
    """Of a model that keeps its own Python, one for every module that has none inside, or is a chain."""
    for path, module in network.named_modules():
        is_chain = path in chains
        if not is_chain and (path.rpartition(".")[0] in chains or list(module.children())):
            continue
        if is_chain:
            specs = [spec_of(stage) for stage in module.children() if is_conv(stage)]
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
