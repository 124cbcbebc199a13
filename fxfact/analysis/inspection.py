"""A graph, shown: every convolution in it, and what a rewrite changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest
from textwrap import shorten

from tabulate import tabulate
from torch import fx, nn
from torch.export import ExportedProgram

from fxfact.capture import Captured, ExampleInputs, capture
from fxfact.conv import ConvLayer, ConvSite, ConvSpec, Cost, Skip, chain_cost, is_conv, path_of, read_conv
from fxfact.errors import ArgumentError, CaptureError
from fxfact.graph import match
from fxfact.passes import PassRecord, pass_history


@dataclass(frozen=True, kw_only=True)
class ConvRow:
    """One convolution as it stands in the graph. ``relative_error`` is ‖W − Ŵ‖_F / ‖W‖_F, None where unknown, or
    where a stage was factorized once more.
    """

    path: str
    origin: str
    factorization: str
    rank: str
    stages: tuple[ConvSpec, ...]
    cost: Cost
    relative_error: float | None
    remark: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What ``inspect`` found. ``print`` shows ``rows`` as a table, and ``nodes`` (name, verdict) where asked for."""

    rows: tuple[ConvRow, ...]
    nodes: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        headers = ["path", "from", "factorization", "rank", "stages", "parameters", "MACs", "error", "remark"]
        table = tabulate(map(_cells, self.rows), headers, disable_numparse=True, maxcolwidths=[None] * 8 + [60])
        nodes = tabulate(self.nodes, ["node", "verdict"], disable_numparse=True)
        return f"{table}\n\n{nodes}" if self.nodes else table


def inspect(
    model: nn.Module | ExportedProgram, *, example_inputs: ExampleInputs | None = None, nodes: bool = False
) -> Inspection:
    """Every convolution of a model, factorized or not: where it came from, rank, stages, cost, relative weight error.

    MACs need example_inputs, or a graph that has shapes. ``nodes`` adds, for every node of the graph, which convolution
    it is or why none; a model that keeps its own Python has no graph, and so no nodes. Raises ArgumentTypeError,
    CaptureError.
    """
    captured = looked_at(model, example_inputs)
    history = {path: done for done in pass_history(model) for path in done.relative_error}
    parts: dict[str, list[ConvSite | Skip]] = {}
    for item in captured.found:
        name = path_of(item)
        whole = next((path for path in history if name.startswith(f"{path}.")), name)
        parts.setdefault(whole, []).append(item)
    again = {path: any(other.startswith(f"{path}.") for other in history) for path in parts}
    rows = tuple(_row(path, items, history.get(path), captured, again[path]) for path, items in parts.items())
    graph = captured.network if nodes and isinstance(captured.network, fx.GraphModule) else None
    verdicts = match(graph).verdicts if graph is not None else {}
    return Inspection(rows=rows, nodes=tuple((node.name, _verdict(item)) for node, item in verdicts.items()))


def diff(
    before: nn.Module | ExportedProgram, after: nn.Module | ExportedProgram, *, context: int = 2, width: int = 78
) -> str:
    """Two graphs side by side, only what changed, with ``context`` lines around; each column ``width`` characters.

    Where one of them has no graph, for it keeps its own Python, the modules of both are compared. ``-`` marks what is
    only in ``before``, ``+`` what is only in ``after``. Empty where they are alike.
    """
    if width < 10 or context < 0:
        raise ArgumentError(f"width must be at least 10 and context at least 0, got {width}, {context}")
    networks = [looked_at(before).network, looked_at(after).network]
    graphs = [network for network in networks if isinstance(network, fx.GraphModule)]
    left, right = map(_lines, graphs) if len(graphs) == 2 else map(_module_lines, networks)
    rows: list[str] = []
    for group in SequenceMatcher(None, left, right, autojunk=False).get_grouped_opcodes(context):
        rows += ["⋯"] if rows else []
        for tag, i, j, k, m in group:
            marks = (" ", " ") if tag == "equal" else ("-", "+")
            pairs = zip_longest(left[i:j], right[k:m], fillvalue="")
            rows += [f"{_cell(a, marks[0], width)} │ {_cell(b, marks[1], width)}".rstrip() for a, b in pairs]
    return "\n".join(rows)


def looked_at(model: nn.Module | ExportedProgram, example_inputs: ExampleInputs | None = None) -> Captured:
    """By its modules where it has no graph, even unseen: nothing is going to be rewritten."""
    try:
        return capture(model, example_inputs)
    except CaptureError:
        if isinstance(model, ExportedProgram):
            raise
        return capture(model, example_inputs, how="modules")


def _row(
    path: str, items: list[ConvSite | Skip], done: PassRecord | None, captured: Captured, rewritten_again: bool
) -> ConvRow:
    sites = [item for item in items if isinstance(item, ConvSite)]
    costs = [chain_cost([site.spec], site.input_sizes(captured.samples)) for site in sites]
    decision = done.plan[path] if done else None
    method = decision.factorization if decision else None
    rank = decision.rank if decision else None
    if not costs and decision:  # parts of a stand-in, which composes its kernel where the model reads it
        costs = [chain_cost([stage], None) for stage in decision.stages]
    remarks: Iterable[str] = (item.reason for item in items if isinstance(item, Skip))
    return ConvRow(
        path=path,
        origin=str(decision.spec if decision else ""),
        factorization=method.name if method else "-",
        rank="" if rank is None else ",".join(map(str, rank)),
        stages=tuple(site.spec for site in sites) or (decision.stages if decision else ()),
        cost=sum(costs[1:], costs[0]) if costs else Cost(0, None),
        relative_error=None if done is None or rewritten_again else done.relative_error[path],
        remark="; ".join(remarks),
    )


def _cells(row: ConvRow) -> list[str]:
    macs = "" if row.cost.macs is None else f"{row.cost.macs:,}"
    error = "" if row.relative_error is None else f"{row.relative_error:.3g}"
    stages = "\n".join(map(str, row.stages))
    params = f"{row.cost.params:,}" if row.stages else ""
    return [row.path, row.origin, row.factorization, row.rank, stages, params, macs, error, row.remark]


def _verdict(item: ConvSite | Skip) -> str:
    return f"{item.path}: {item.spec}" if isinstance(item, ConvSite) else item.reason


def _module_lines(network: nn.Module) -> list[str]:
    """One line a module that has none inside."""
    leaves = [(path, module) for path, module in network.named_modules() if not list(module.children())]
    return [f"{path}: {_name_of(module)}" for path, module in leaves]


def _lines(graph_module: fx.GraphModule) -> list[str]:
    """One line a node. What took a node's place is called by that node's name, so that its users read alike."""
    names = {node: node.name for node in graph_module.graph.nodes}
    names |= {node: name for name, node in _successors(graph_module).items()}
    return [_line(graph_module, node, names) for node in graph_module.graph.nodes]


def _successors(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """The last of the nodes that a pass of ours put in the place of another, by the name of that other."""
    sources = [(node.meta.get("from_node"), node) for node in graph_module.graph.nodes]
    return {source[-1].name: node for source, node in sources if source and source[-1].pass_name.startswith("fxfact")}


def _line(root: fx.GraphModule, node: fx.Node, names: dict[fx.Node, str]) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    values = [*node.args, *(f"{key}={value}" for key, value in node.kwargs.items())]
    arguments = ", ".join(str(fx.node.map_arg(value, lambda n: names[n])) for value in values).replace("'", "")
    if node.op in ("placeholder", "output"):
        return f"{names[node]}" if node.op == "placeholder" else f"return {arguments}"
    line = f"{names[node]} = {target}({arguments})"
    if node.op != "call_module":
        return line
    return f"{line}: {_name_of(root.get_submodule(str(node.target)))}"


def _name_of(module: nn.Module) -> str:
    layer = read_conv(module) if is_conv(module) else None
    return str(layer.spec) if isinstance(layer, ConvLayer) else type(module).__name__


def _cell(text: str, mark: str, width: int) -> str:
    return f"{mark if text else ' '} {shorten(text, width - 2, placeholder='…')}".ljust(width)
