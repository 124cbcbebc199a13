"""How long calls take, side by side: they take turns, so that what else the machine does falls on all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch.utils.benchmark import Timer


def milliseconds(calls: Sequence[Callable[[], Any]], *, repeats: int = 7, number: int = 10) -> list[list[float]]:
    """Of each call the mean of ``number`` runs, ``repeats`` times, without gradients, each warmed up first."""
    with torch.no_grad():
        timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in calls]
        for timer in timers:
            timer.timeit(3)
        turns = [[1e3 * timer.timeit(number).median for timer in timers] for _ in range(repeats)]
    return [[turn[k] for turn in turns] for k in range(len(calls))]


def medians(calls: Sequence[Callable[[], Any]], *, repeats: int = 7, number: int = 10) -> list[float]:
    """The medians of ``milliseconds``."""
    return [median(times) for times in milliseconds(calls, repeats=repeats, number=number)]
