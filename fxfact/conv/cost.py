"""What a convolution, or a network, costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from fxfact.conv.chain import chain_macs
from fxfact.conv.spec import ConvSpec, Sizes


@dataclass(frozen=True)
class Cost:
    """``params``: numbers stored. ``macs``: multiply-accumulates for one sample, None where sizes are unknown. ``ms``:
    milliseconds of one call of the network, None where they were not measured.
    """

    params: int
    macs: int | None
    ms: float | None = None

    def __add__(self, other: Cost) -> Cost:
        macs, ms = _sum(self.macs, other.macs), _sum(self.ms, other.ms)
        return Cost(self.params + other.params, None if macs is None else int(macs), ms)

    def __sub__(self, other: Cost) -> Cost:
        return self + Cost(-other.params, _negative(other.macs), _negative(other.ms))

    def exceeds(self, other: Cost) -> bool:
        """Whether this costs more, in parameters or (where both are known) in MACs."""
        more_macs = self.macs is not None and other.macs is not None and self.macs > other.macs
        return self.params > other.params or more_macs


def chain_cost(stages: Sequence[ConvSpec], input_sizes: Sequence[Sizes] | None, *, tied: bool = False) -> Cost:
    """Of stages run one after the other, once for every size in ``input_sizes`` (None: sizes unknown); of those that
    are ``tied``, having the weights of others, only the biases are stored.
    """
    params = sum(spec.params if not tied else spec.out_channels for spec in stages if spec.bias or not tied)
    return Cost(params, None if input_sizes is None else sum(chain_macs(stages, size) for size in input_sizes))


def format_change(before: float | None, after: float | None) -> str:
    """Two amounts and their ratio, or one where they are alike, or nothing where one is unknown."""
    if before is None or after is None:
        return ""
    if before == after:
        return format_amount(before)
    return f"{format_amount(before)} → {format_amount(after)}" + (f" ({after / before:.2f})" if before else "")


def format_amount(number: float) -> str:
    """With thousands parted, or three digits of what is no whole number."""
    return f"{number:,}" if isinstance(number, int) else f"{number:.3g}"


_Number = TypeVar("_Number", int, float)


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _negative(number: _Number | None) -> _Number | None:
    return None if number is None else -number
