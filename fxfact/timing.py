"""How long calls take, side by side: they take turns, so that what else the machine does falls on all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.benchmark import Timer

from fxfact.errors import TimingError

_Call = Callable[[], Any]
TICK = 1e3 * time.get_clock_info("perf_counter").resolution  # milliseconds
_TURN, _FEWEST = 0.01, 3  # seconds of one call's turn, where the number of runs is not given; turns, whatever the bound


def milliseconds(
    calls: Sequence[_Call], *, repeats: int = 7, number: int | None = None, within: float = math.inf
) -> list[list[float]]:
    """Of each call the mean of ``number`` runs (None: of as many as take a hundredth of a second), ``repeats`` times,
    fewer where that would take more than ``within`` seconds; without gradients, each warmed up first. Raises
    TimingError where a call fails.
    """
    with torch.no_grad(), _said():
        timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in calls]
        seconds = [timer.timeit(1 if number else 3).median for timer in timers]
        runs = [number or max(1, round(_TURN / max(each, 1e-7))) for each in seconds]
        round_of_all = sum(n * each for n, each in zip(runs, seconds, strict=True))
        repeats = int(max(_FEWEST, min(repeats, within / round_of_all))) if round_of_all else repeats
        turns = [
            [max(TICK, 1e3 * timer.timeit(n).median) for timer, n in zip(timers, runs, strict=True)]
            for _ in range(repeats)
        ]
    return [[turn[k] for turn in turns] for k in range(len(calls))]


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of a device that is lost or full, among others
        raise TimingError(
            f"what was to be timed did not run: {type(error).__name__}: {error}. Nothing was changed. See that the "
            "model runs on these inputs, and that its device is there and has memory to spare."
        ) from error


def fastest(calls: Sequence[_Call], *, repeats: int = 9, within: float = math.inf) -> list[float]:
    """The minima of ``milliseconds``: what is left where others use the machine too."""
    return [min(times) for times in milliseconds(calls, repeats=repeats, within=within)]
