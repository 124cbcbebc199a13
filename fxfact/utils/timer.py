"""The clock behind budgets of milliseconds: an object, so that another runtime, or a test, can take its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxfact.utils.timing import compared, milliseconds, milliseconds_of_graphs


class Timer:
    """Measures how long calls take on this machine. Subclass it to measure another runtime."""

    def turns(
        self,
        calls: Sequence[Callable[[], Any]],
        *,
        repeats: int = 7,
        number: int | None = None,
        warm: int = 1,
        within: float = math.inf,
    ) -> list[list[float]]:
        """Return the milliseconds of each call in each turn; the calls take turns. See ``timing.milliseconds``."""
        return milliseconds(calls, repeats=repeats, number=number, warm=warm, within=within)

    def graph_turns(
        self, calls: Sequence[Callable[[], Any]], device: torch.device, *, repeats: int = 7, within: float = math.inf
    ) -> list[list[float]]:
        """Return the same for calls recorded as CUDA graphs. See ``timing.milliseconds_of_graphs``."""
        return milliseconds_of_graphs(calls, device, repeats=repeats, within=within)

    def side_by_side(
        self, calls: Sequence[Callable[[], Any]], *, repeats: int = 9, within: float = math.inf
    ) -> list[float]:
        """Return one number of milliseconds for each call, comparable with each other. See ``timing.compared``."""
        return compared(self.turns(calls, repeats=repeats, within=within))
