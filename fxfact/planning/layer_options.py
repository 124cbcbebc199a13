"""Everything that could become of one layer, with what it costs and what it is expected to do to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fxfact.conv import Cost, Skip
from fxfact.factorizations import Factorization, Rank
from fxfact.planning.budgets import Budget
from fxfact.planning.strategy import Alternative, Choice

_MAX_RANKS = 40  # candidates of one factorization


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
        joint: what could become of the layer together with the others of its joint set, which have as many of these
            options. All layers take the same one, or none does.
    """

    options: tuple[Option, ...]
    loss_without_layer: float
    joint: tuple[Option, ...] = ()

    @property
    def dense(self) -> Option:
        """The layer as it is."""
        return self.options[0]

    @property
    def every(self) -> tuple[Option, ...]:
        """What could become of the layer alone, then what could become of it in its joint set."""
        return self.options + self.joint

    @property
    def joint_set(self) -> str | None:
        """The path of the first layer of the joint set, or None if it has no options."""
        choices = (option.choice for option in self.joint)
        return next((choice.shares_with for choice in choices if isinstance(choice, Choice)), None)

    def scaled(self, factor: float) -> LayerOptions:
        """Return the same options with their loss increases multiplied by ``factor``."""
        if factor == 1:
            return self
        options, joint = (tuple(_scaled(one, factor) for one in many) for many in (self.options, self.joint))
        return replace(self, options=options, joint=joint)

    def alternatives(self, picked: int, budget: Budget) -> tuple[Alternative, ...]:
        """Return the option picked and those worth comparing it with, least loss increase first.

        That is the best option of each factorization that costs no more than the one picked (than half of the layer,
        if it stays dense), and the ranks next to the one picked. Joint options are compared with each other. ``picked``
        is an index in ``every``.
        """
        amount = budget.amount(self.every[picked].cost) * (1.0 if picked else 0.5)
        compared = self.options
        if picked >= len(self.options):
            compared, picked = self.joint, picked - len(self.options)
        families: dict[Factorization, list[int]] = {}
        for k, option in enumerate(compared):
            if isinstance(option.choice, Choice):
                families.setdefault(option.choice.factorization, []).append(k)
        found: set[int] = set()
        for members in families.values():
            affordable = [k for k in members if budget.amount(compared[k].cost) <= amount]
            found |= {min(affordable, key=lambda k: compared[k].predicted_loss_increase)} if affordable else set()
            place = members.index(picked) if picked in members else None
            found |= set() if place is None else {*members[max(0, place - 1) : place + 2]}
        options = sorted((compared[k] for k in found), key=lambda option: option.predicted_loss_increase)
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


def thinned(ranks: Sequence[Rank]) -> list[Rank]:
    """Return at most 40 ranks, evenly spread, including the largest."""
    step = max(1, -(-len(ranks) // _MAX_RANKS))
    return list(ranks[::-1][::step][::-1])
