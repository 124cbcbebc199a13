"""Everything that could become of one layer, with what it costs and what it is expected to do to the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from fxfact.conv import Cost, Skip
from fxfact.factorizations import Factorization
from fxfact.planning.budgets import Budget
from fxfact.planning.strategy import Alternative, Choice


class Option(NamedTuple):
    """What could become of a layer, its cost, and the expected increase of the loss (see ``LayerOptions``)."""

    choice: Choice | Skip
    cost: Cost
    predicted_loss_increase: float


@dataclass(frozen=True, eq=False)
class LayerOptions:
    """Everything that could become of one layer.

    Attributes:
        options: the dense layer first. Loss increases are in nats for one sample; without statistics they are
            ``energy_loss`` of the layer's output.
        loss_without_layer: the loss increase in nats if the layer's output were lost altogether; 1 without statistics.
    """

    options: tuple[Option, ...]
    loss_without_layer: float

    @property
    def dense(self) -> Option:
        """The layer as it is."""
        return self.options[0]

    def scaled(self, factor: float) -> LayerOptions:
        """Return the same options with their loss increases multiplied by ``factor``."""
        return self if factor == 1 else replace(self, options=tuple(_scaled(option, factor) for option in self.options))

    def alternatives(self, picked: int, budget: Budget) -> tuple[Alternative, ...]:
        """Return the option picked and those worth comparing it with, least loss increase first.

        That is the best option of each factorization that costs no more than the one picked (than half of the layer,
        if it stays dense), and the ranks next to the one picked.
        """
        amount = budget.amount(self.options[picked].cost) * (1.0 if picked else 0.5)
        families: dict[Factorization, list[int]] = {}
        for k, option in enumerate(self.options):
            if isinstance(option.choice, Choice):
                families.setdefault(option.choice.factorization, []).append(k)
        found: set[int] = set()
        for members in families.values():
            affordable = [k for k in members if budget.amount(self.options[k].cost) <= amount]
            found |= {min(affordable, key=lambda k: self.options[k].predicted_loss_increase)} if affordable else set()
            place = members.index(picked) if picked in members else None
            found |= set() if place is None else {*members[max(0, place - 1) : place + 2]}
        options = sorted((self.options[k] for k in found), key=lambda option: option.predicted_loss_increase)
        return tuple(
            Alternative(option.choice.factorization, option.choice.rank, option.cost, option.predicted_loss_increase)
            for option in options
            if isinstance(option.choice, Choice)
        )


def _scaled(option: Option, factor: float) -> Option:
    choice = option.choice
    if isinstance(choice, Choice) and choice.predicted_loss_increase is not None:
        choice = replace(choice, predicted_loss_increase=factor * choice.predicted_loss_increase)
    return option._replace(choice=choice, predicted_loss_increase=factor * option.predicted_loss_increase)
