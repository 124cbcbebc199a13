"""Why a plan does to one layer what it does, and what else could be done."""

from __future__ import annotations

from dataclasses import dataclass

from fxfact.conv import Cost, format_change_forms
from fxfact.errors import ArgumentTypeError
from fxfact.factorizations import Factorization, Rank, format_rank
from fxfact.planning import Alternative, Decision, Plan, format_nats
from fxfact.utils import Cell, Column, PrintsTable, Table, wrap_lines


@dataclass(frozen=True)
class Explanation(PrintsTable):
    """What becomes of one layer, why, and the next best options. ``print`` shows it.

    Attributes:
        plan: the plan.
        decision: the decision for the layer.
    """

    plan: Plan
    decision: Decision

    def _table(self, width: int | None) -> str:
        """What becomes of the layer, why, the options side by side, and how to take another one."""
        parts = [wrap_lines(text, width) for text in (self._what(), self._why())]
        if self.decision.alternatives:
            parts += [self._options().format(width), wrap_lines(self._how_to_change(), width)]
        return "\n\n".join(filter(None, parts))

    def __repr__(self) -> str:
        return str(self)

    def _what(self) -> str:
        decision = self.decision
        layer = f"{decision.path}: {decision.spec or 'a layer that could not be read'}"
        if decision.factorization is None:
            return f"{layer} stays as it is."
        rank = format_rank(decision.rank)
        stages = " → ".join(map(str, decision.stages))
        return f"{layer} becomes {decision.factorization.name} of rank {rank}: {stages}."

    def _why(self) -> str:
        decision = self.decision
        reasons = [f"It shares the weight of {decision.tied_to}."] if decision.tied_to else []
        if decision.shares_with is not None:
            members = [other.path for other in self.plan if other.shares_with == decision.shares_with]
            numbers = " and ".join(f"stage {1 + k}" for k in decision.shared_stages)
            reasons.append(f"{', '.join(members)} hold the same parameters in {numbers}; {members[0]} counts them.")
        if decision.reason:
            reasons.append(f"Reason: {decision.reason}.")
        elif decision.alternatives:
            measure = "loss increase" if self.plan.uses_statistics else "energy lost"
            reasons.append(
                f"The budget chose for all layers together: this network has the least {measure} that it allows. "
                "The increase of a layer is weighed by what the network would lose without it, so that no layer is "
                "sacrificed for the others."
            )
        elif decision.factorization is not None:
            reasons.append(f"The rank was asked for{f', but {decision.note}' if decision.note else ''}.")
        return " ".join(reasons)

    def _options(self) -> Table:
        decision = self.decision
        increase = next((a.predicted_loss_increase for a in decision.alternatives if self._is_chosen(a)), None)
        options = [(decision.factorization, decision.rank, decision.after, increase)]
        options += [
            (other.factorization, other.rank, other.cost, other.predicted_loss_increase) for other in self._others
        ]
        options += [(None, None, decision.before, 0.0)] if decision.rank else []
        rows = [_row(*option, before=decision.before) for option in options]
        loss = "loss +, nats" if self.plan.uses_statistics else "energy lost"
        columns = [
            Column("", 0),
            Column("factorization", 1),
            Column("rank", 3),
            Column("parameters", 4),
            Column("MACs", 5),
            Column("ms", 6),
            Column(loss, 2),
        ]
        known = [k for k in range(len(columns)) if k == 0 or any("".join(row[k]) for row in rows)]
        rows[0][0] = "chosen"
        return Table([columns[k] for k in known], [[row[k] for k in known] for row in rows])

    @property
    def _others(self) -> list[Alternative]:
        """The alternatives but the one that was chosen."""
        return [other for other in self.decision.alternatives if not self._is_chosen(other)]

    def _is_chosen(self, other: Alternative) -> bool:
        return (other.factorization, other.rank) == (self.decision.factorization, self.decision.rank)

    def _how_to_change(self) -> str:
        if not self._others:
            return ""
        name, rank = self._others[0].factorization.name, self._others[0].rank
        arguments = f"{self.decision.path!r}, factorization={name!r}, rank={rank}"
        subject = "it" if self.decision.shares_with is None else "all layers of the joint set"
        return f"To change {subject}: plan.edited({arguments}), then fxfact.apply."


def explain(plan: Plan, path: str) -> Explanation:
    """Explain the decision for one layer: why this factorization and rank, and what else could be done at which cost.

    Args:
        plan: a plan, for example from ``fxfact.plan_of(network)``.
        path: the path of the layer.

    Returns:
        The explanation. For a plan that was made for a budget, its table compares the decision with the best option of
        every other factorization that costs no more, with the next smaller and larger rank, and with the dense layer.
        For a layer that stays as it is, it has the best options that cost at most half of it.

    Raises:
        ArgumentTypeError: if ``plan`` is not a plan.
        PlanError: if the plan has no such layer.
    """
    if not isinstance(plan, Plan):
        raise ArgumentTypeError(f"plan must be a fxfact.Plan, got {type(plan).__name__}. Pass fxfact.plan_of(network).")
    return Explanation(plan, plan[path])


def _row(
    factorization: Factorization | None, rank: Rank | None, cost: Cost, increase: float | None, *, before: Cost
) -> list[Cell]:
    pairs = [(before.params, cost.params), (before.macs, cost.macs), (before.ms, cost.ms)]
    name = "as it is" if factorization is None else factorization.name
    changes = [format_change_forms(old, new) for old, new in pairs]
    return ["", name, format_rank(rank), *changes, format_nats(increase)]
