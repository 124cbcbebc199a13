"""The digits of estimates and measurements in plans."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from fxfact.conv import Cost

_Number = TypeVar("_Number", float, float | None)


def significant(number: _Number) -> _Number:
    """Return a number with six significant digits: more than an estimate has, and a file of plans is read by people."""
    return number if number is None else float(f"{number:.6g}")


def significant_pair(pair: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return two numbers with six significant digits."""
    return None if pair is None else (significant(pair[0]), significant(pair[1]))


def significant_cost(cost: Cost) -> Cost:
    """Return a cost whose milliseconds have six significant digits."""
    return replace(cost, ms=significant(cost.ms))
