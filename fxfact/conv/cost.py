"""Cost: the parameters, MACs and milliseconds of a convolution or a network, and how to print them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Cost:
    """The cost of a convolution, a chain or a network.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulates (MACs) for one sample, or None if the spatial sizes are not known.
        ms: Milliseconds of one call of the network, or None if they were not measured.
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
        """Whether this has more parameters than ``other``, or more MACs if both are known."""
        more_macs = self.macs is not None and other.macs is not None and self.macs > other.macs
        return self.params > other.params or more_macs


def format_change(before: float | None, after: float | None) -> str:
    """Return "before → after (ratio)", one number if both are equal, or "" if one is not known."""
    if before is None or after is None:
        return ""
    if before == after:
        return format_amount(before)
    return f"{format_amount(before)} → {format_amount(after)}" + (f" ({after / before:.2f})" if before else "")


def format_change_forms(before: float | None, after: float | None) -> tuple[str, ...]:
    """Return ``format_change``, the same with short numbers, and "after (ratio)", for tables that are narrow."""
    if before is None or after is None or before == after:
        return (format_change(before, after), "" if after is None or before is None else format_short(after))
    ratio = f" ({after / before:.2f})" if before else ""
    old, new = format_short(before), format_short(after)
    return (format_change(before, after), f"{old} → {new}{ratio}", f"{new}{ratio}")


def format_short(number: float) -> str:
    """Return a number with three digits: an int with k, M, G or T for thousands, millions and so on."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if isinstance(number, int) and abs(number) >= 0.9995 * unit:
            return f"{number / unit:.3g}{name}"
    return format_amount(number)


def format_amount(number: float) -> str:
    """Return an int with thousands separators, a float with three digits."""
    return f"{number:,}" if isinstance(number, int) else f"{number:.3g}"


_Number = TypeVar("_Number", int, float)


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _negative(number: _Number | None) -> _Number | None:
    return None if number is None else -number
