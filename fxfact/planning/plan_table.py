"""The table of a plan: one row for every layer, and one for the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxfact.conv import Cost, format_change_forms, format_spec_forms
from fxfact.factorizations import format_rank
from fxfact.planning.decision import Decision, summarize_reasons
from fxfact.utils import Cell, Column, Table, wrap_lines

_LEAST_PATH, _LEAST_REMARK = 16, 24  # characters


def decision_table(
    decisions: Sequence[Decision], model: str, before: Cost, after: Cost, predicted_loss_increase: float | None
) -> Table:
    """Return a table of decisions. The last row has the class, the costs and the loss increase of the network."""
    columns = [
        Column("path", 0, least=_LEAST_PATH),
        Column("layer", 8),
        Column("factorization", 1),
        Column("rank", 2),
        Column(("parameters", "parameters", "params"), 5),
        Column("MACs", 3),
        Column("ms", 4),
        Column(("loss +, nats", "loss +"), 6),
        Column("remark", 7, least=_LEAST_REMARK, wrap=True),
    ]
    rewritten = sum(decision.factorization is not None for decision in decisions)
    counts = (f"{rewritten} of {len(decisions)} rewritten", f"{rewritten} of {len(decisions)}")
    total = ["network", model, counts, "", *_changes(before, after), format_nats(predicted_loss_increase), ""]
    return Table(columns, [*map(_row, decisions), total], has_total=True)


def format_decisions(table: Table, decisions: Iterable[Decision], width: int | None) -> str:
    """Return the table as text, and below it the reasons for dense layers if they have no column."""
    text = table.format(width)
    dense = [decision for decision in decisions if decision.factorization is None]
    if "remark" not in table.left_out(width) or not dense:
        return text
    return f"{text}\n{wrap_lines(f'stay dense: {summarize_reasons(dense)}', width)}"


def format_unreached(unreached: Cost, network: Cost) -> str:
    """Say which shares of the network no factorization can reach, or return "" if they are less than 0.1 %."""
    pairs = (("parameters", unreached.params, network.params), ("MACs", unreached.macs, network.macs))
    shares = [(name, 100 * part / whole) for name, part, whole in pairs if part is not None and whole]
    texts = [f"{share:.1f} % of the {name}" for name, share in shares if share >= 0.1]
    return f"{' and '.join(texts)} are not in layers that can be factorized" if texts else ""


def format_nats(increase: float | None) -> str:
    """Return an increase of the loss with two digits, or "" if it is not known."""
    return "" if increase is None else f"{increase:.2g}"


def _row(decision: Decision) -> list[Cell]:
    method = decision.factorization
    return [
        decision.path,
        format_spec_forms(decision.spec),
        method.name if method else "-",
        format_rank(decision.rank),
        *(["", "", ""] if decision.spec is None else _changes(decision.before, decision.after)),
        format_nats(decision.predicted_loss_increase),
        decision.remark,
    ]


def _changes(before: Cost, after: Cost) -> list[Cell]:
    pairs = [(before.params, after.params), (before.macs, after.macs), (before.ms, after.ms)]
    return [format_change_forms(old, new) for old, new in pairs]
