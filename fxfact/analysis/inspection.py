"""Tables of the convolutions of a network, and of the nodes of its graph."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx, nn
from torch.export import ExportedProgram

from fxfact.analysis.reference import current_error, kernel_error, prepare_original
from fxfact.capture import Captured, ExampleInputs, capture
from fxfact.conv import (
    ConvSite,
    ConvSpec,
    Cost,
    Skip,
    chain_cost,
    format_amount,
    format_short,
    format_spec_forms,
    path_of,
)
from fxfact.errors import CaptureError
from fxfact.graph import match
from fxfact.passes import PassRecord, last_plan, pass_history
from fxfact.utils import Cell, Column, PrintsTable, Table, wrap_lines

_CHANGED = (
    "changed since: the weights have changed since this error was computed. verify shows today's, and so does inspect "
    "if you pass original=."
)


@dataclass(frozen=True, kw_only=True)
class ConvRow:
    """One convolution of a network.

    Attributes:
        path: Its name in the network.
        origin: Sizes of the convolution that a plan rewrote, or '' if it was not rewritten.
        factorization: Name of the factorization, or '-'.
        rank: The factorization's rank.
        stages: The convolutions that run in its place.
        cost: Parameters and MACs of the stages, for one sample.
        relative_error: ‖Ŵ − W‖_F / ‖W‖_F of the kernel as it is now, or None if it is unknown: the weights changed
            since ``recorded_error``, or a stage was factorized again.
        recorded_error: The error when the kernel was decomposed, or after ``refit`` or ``distill``; None if unknown.
        remark: Whose weight it shares, so that only its other parameters count, and why it cannot be rewritten.
    """

    path: str
    origin: str
    factorization: str
    rank: str
    stages: tuple[ConvSpec, ...]
    cost: Cost
    relative_error: float | None
    recorded_error: float | None
    remark: str


@dataclass(frozen=True, kw_only=True)
class Inspection(PrintsTable):
    """The result of ``inspect``. ``print`` shows it as tables.

    Attributes:
        rows: The convolutions.
        nodes: Name and verdict for every node of the graph: the convolution that it calls, or why it calls none.
    """

    rows: tuple[ConvRow, ...]
    nodes: tuple[tuple[str, str], ...]

    def _table(self, width: int | None) -> str:
        """The layers as a table, and the nodes, if there are any, as a second one."""
        columns = [
            Column("path", 0, least=16),
            Column("from", 8),
            Column("factorization", 2),
            Column("rank", 3),
            Column("stages", 1),
            Column(("parameters", "params"), 6),
            Column("MACs", 4),
            Column("error", 5),
            Column("remark", 7, least=24, wrap=True),
        ]
        texts = [Table(columns, list(map(_table_row, self.rows))).format(width)]
        if any(row.relative_error is None and row.recorded_error is not None for row in self.rows):
            texts.append(wrap_lines(_CHANGED, width))
        if self.nodes:
            node_columns = [Column("node", 0, least=16), Column("verdict", 1, least=24, wrap=True)]
            texts.append(Table(node_columns, self.nodes).format(width))
        return "\n\n".join(texts)


def inspect(
    model: nn.Module | ExportedProgram,
    *,
    example_inputs: ExampleInputs | None = None,
    original: nn.Module | ExportedProgram | None = None,
    nodes: bool = False,
) -> Inspection:
    """List every convolution of a network, factorized or not.

    Args:
        model: The network.
        example_inputs: One call of the network, which gives the MACs. By default they are those of the inputs that an
            ExportedProgram holds, or that the network was factorized with.
        original: The network that was factorized. The errors are then computed from today's weights. By default they
            are those of the decomposition, and of ``refit`` and ``distill``, if the weights have not changed since.
        nodes: Whether to list the graph's nodes too. A network that keeps the model's own Python has no graph, and so
            no nodes.

    Returns:
        Origin, factorization, rank, stages, cost and kernel error of every convolution.

    Raises:
        ArgumentTypeError: ``model`` is neither a module nor an ExportedProgram.
        CaptureError: The network cannot be copied, or fails on ``example_inputs``.
        PlanError: ``original`` was passed, and ``model`` was not made of it by a plan.
    """
    captured = capture_for_display(model, example_inputs)
    history = pass_history(model)
    records = {path: record for record in history for path in record.relative_error}
    errors = {path: current_error(captured.network, record, path) for path, record in records.items()}
    if original is not None:
        plan = last_plan(model)
        prepared = prepare_original(original, plan)
        errors |= {d.path: kernel_error(prepared, captured.network, d) for d in plan.rewrites}
    items_by_path: dict[str, list[ConvSite | Skip]] = {}
    for item in captured.found:
        name = path_of(item)
        path = next((path for path in records if _is_stage(name, path)), name)
        items_by_path.setdefault(path, []).append(item)
    planned = {decision.path: decision for record in history for decision in record.plan}
    rows = []
    for path, items in items_by_path.items():
        row = _conv_row(path, items, records.get(path), captured)
        if row.cost.macs is None and captured.example_inputs is None and path in planned:
            row = replace(row, cost=replace(row.cost, macs=planned[path].after.macs))
        if path in records and not any(_is_stage(other, path) for other in records):  # no stage was factorized again
            row = replace(row, relative_error=errors[path], recorded_error=records[path].relative_error[path])
        rows.append(row)
    graph = captured.network if nodes and isinstance(captured.network, fx.GraphModule) else None
    verdicts = match(graph).verdicts if graph is not None else {}
    return Inspection(
        rows=tuple(rows), nodes=tuple((node.name, _verdict_text(item)) for node, item in verdicts.items())
    )


def capture_for_display(model: nn.Module | ExportedProgram, example_inputs: ExampleInputs | None = None) -> Captured:
    """Capture a network that is not going to be rewritten: by its modules if it has no graph, even without inputs."""
    try:
        return capture(model, example_inputs)
    except CaptureError:
        if isinstance(model, ExportedProgram):
            raise
        return capture(model, example_inputs, how="modules")


def _conv_row(path: str, items: list[ConvSite | Skip], record: PassRecord | None, captured: Captured) -> ConvRow:
    """Make one row of the sites and skips that are the convolution at a path, or the stages of its chain."""
    decision = record.plan[path] if record else None
    sites = [item for item in items if isinstance(item, ConvSite)]
    costs = [chain_cost([s.spec], s.input_sizes(captured.samples), tied=s.tied_to is not None) for s in sites]
    shared = ", ".join(dict.fromkeys(site.tied_to for site in sites if site.tied_to is not None))
    if not costs and decision:  # parts of a factorized module, which composes its kernel where the model reads it
        costs = [chain_cost([stage], None) for stage in decision.stages]
    method = decision.factorization if decision else None
    rank = decision.rank if decision else None
    return ConvRow(
        path=path,
        origin=str(decision.spec if decision else ""),
        factorization=method.name if method else "-",
        rank="" if rank is None else ",".join(map(str, rank)),
        stages=tuple(site.spec for site in sites) or (decision.stages if decision else ()),
        cost=sum(costs[1:], costs[0]) if costs else Cost(0, None),
        relative_error=None,
        recorded_error=None,
        remark="; ".join(
            [
                *([f"shares the weight of {shared}"] if shared else []),
                *(item.reason for item in items if isinstance(item, Skip)),
            ]
        ),
    )


def _is_stage(name: str, path: str) -> bool:
    """Return whether a name is that of a stage of the chain at a path, or of a stage's own chain."""
    return name.startswith(f"{path}.") and name[len(path) + 1 :].partition(".")[0].isdecimal()


def _table_row(row: ConvRow) -> list[Cell]:
    known = row.recorded_error if row.relative_error is None else row.relative_error
    error = "" if known is None else f"{known:.3g}"
    error += " (changed since)" if error and row.relative_error is None else ""
    stages = ["\n".join(texts) for texts in zip(*map(format_spec_forms, row.stages), strict=True)]
    return [
        row.path,
        format_spec_forms(row.origin),
        row.factorization,
        row.rank,
        tuple(stages) or "",
        (format_amount(row.cost.params), format_short(row.cost.params)) if row.stages else "",
        "" if row.cost.macs is None else (format_amount(row.cost.macs), format_short(row.cost.macs)),
        error,
        row.remark,
    ]


def _verdict_text(item: ConvSite | Skip) -> str:
    return f"{item.path}: {item.spec}" if isinstance(item, ConvSite) else item.reason
