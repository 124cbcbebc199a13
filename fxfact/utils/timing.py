"""How long calls take, side by side: they take turns, so that what else the machine does falls on all alike."""

from __future__ import annotations

import math
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer as device_timer  # waits for what a device was given

from fxfact.errors import TimingError

_Call = Callable[[], Any]
TICK = 1e3 * time.get_clock_info("perf_counter").resolution  # milliseconds
_TURN, _FEWEST = 0.01, 3  # seconds of one call's turn, where the number of runs is not given; turns, whatever the bound
_GRAPH, _MOST = 0.002, 20  # seconds of the runs in a graph, when launched one by one; how many at most


def random_numbers(shape: Sequence[int]) -> Tensor:
    """Standard normal numbers to time with, the same for each shape; PyTorch's own generator stays where it is."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0), device="cpu")


def milliseconds(
    calls: Sequence[_Call],
    *,
    repeats: int = 7,
    number: int | None = None,
    warm: int = 1,
    within: float = math.inf,
) -> list[list[float]]:
    """Of each call the mean of ``number`` runs (None: of as many as take a hundredth of a second), after ``warm`` that
    do not count, none where one takes as long as that, ``repeats`` times, fewer where that would take more than
    ``within`` seconds; without gradients. Raises TimingError where a call fails.
    """
    with torch.no_grad(), as_timing_errors():
        clock = _clock()
        timers = [timeit.Timer(call, timer=clock) for call in calls]
        seconds = [min(timer.repeat(_FEWEST, 1)) for timer in timers]
        runs = [number or max(1, round(_TURN / max(each, 1e-7))) for each in seconds]
        before = [warm if each < _TURN else 0 for each in seconds]
        round_of_all = sum((w + n) * each for w, n, each in zip(before, runs, seconds, strict=True))
        repeats = int(max(_FEWEST, min(repeats, within / round_of_all))) if round_of_all else repeats
        turns = [[_mean(*of) for of in zip(timers, before, runs, strict=True)] for _ in range(repeats)]
    return [[turn[k] for turn in turns] for k in range(len(calls))]


def _clock() -> Callable[[], float]:
    """Of seconds, which waits for what devices were given: of several for all that hold something."""
    devices = range(torch.accelerator.device_count())
    if len(devices) < 2:
        return device_timer
    used = [device for device in devices if torch.accelerator.memory_reserved(device)]

    def now() -> float:
        for device in used:
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now


def _mean(timer: timeit.Timer, warm: int, number: int) -> float:
    timer.timeit(warm)
    return max(TICK, 1e3 * timer.timeit(number) / number)


def milliseconds_of_graphs(
    calls: Sequence[_Call], device: torch.device, *, repeats: int = 7, within: float = math.inf
) -> list[list[float]]:
    """``milliseconds`` of calls as CUDA graphs, which is what PyTorch's compiler makes of a network: no launch takes
    time. A graph holds as many runs of a call as take some thousandths of a second, for its own launch does.
    """
    seconds = [min(times) / 1e3 for times in milliseconds(calls, repeats=1, number=_FEWEST)]
    runs = [min(_MOST, max(_FEWEST, round(_GRAPH / each))) for each in seconds]
    with torch.no_grad(), torch.cuda.device(device), as_timing_errors():
        memory = torch.cuda.graph_pool_handle()  # of all: what one computes, the next overwrites
        graphs = [_recorded(call, n, memory) for call, n in zip(calls, runs, strict=True)]
    turns = milliseconds([graph.replay for graph in graphs], repeats=repeats, number=1, within=within)
    return [[ms / n for ms in times] for times, n in zip(turns, runs, strict=True)]


def _recorded(call: _Call, runs: int, memory: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        for _ in range(runs):
            call()
    return graph


@contextmanager
def as_timing_errors() -> Iterator[None]:
    """Raise TimingError where something fails to run inside."""
    try:
        yield
    except RuntimeError as error:  # of a device that is lost or full, among others
        raise TimingError(
            f"what was to be timed did not run: {type(error).__name__}: {error}. Nothing was changed. See that the "
            "model runs on these inputs, and that its device is there and has memory to spare."
        ) from error


def compared(turns: Sequence[Sequence[float]]) -> list[float]:
    """Of ``milliseconds``: the first call's at its fastest, and those of the others by the median, over the turns, of
    their ratio to it: where others use the machine too, both are slower in the same turns, while the minimum of one may
    be of a quiet moment and that of the other not.
    """
    first, *others = turns
    least = min(first)
    return [least, *(least * median(ms / own for ms, own in zip(each, first, strict=True)) for each in others)]


def side_by_side(calls: Sequence[_Call], *, repeats: int = 9, within: float = math.inf) -> list[float]:
    """``compared`` of as many turns."""
    return compared(milliseconds(calls, repeats=repeats, within=within))
