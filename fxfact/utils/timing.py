"""Measures how long calls take. The calls take turns, so that other load on the machine affects all of them equally."""

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
from torch.utils.benchmark import timer as device_timer  # waits until the device is done

from fxfact.errors import TimingError

_Call = Callable[[], Any]
CLOCK_RESOLUTION_MS = 1e3 * time.get_clock_info("perf_counter").resolution  # the shortest time that can be measured
_SECONDS_PER_TURN = 0.01  # of one call, if the number of runs is not given
_MIN_TURNS = 3
_SECONDS_PER_GRAPH = 0.002  # of the runs that a CUDA graph holds, if they are launched one by one
_MAX_RUNS_PER_GRAPH = 20


def seeded_randn(shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers, always the same ones for a shape. PyTorch's default generator is not used."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0), device="cpu")


def milliseconds(
    calls: Sequence[_Call],
    *,
    repeats: int = 7,
    number: int | None = None,
    warm: int = 1,
    within: float = math.inf,
) -> list[list[float]]:
    """Measure calls that take turns, without gradients.

    Args:
        calls: The calls to measure.
        repeats: The number of turns of each call.
        number: The number of runs in a turn, or None for as many as take a hundredth of a second.
        warm: The number of runs before each turn that are not measured. Calls that take longer than a hundredth of a
            second do not need them.
        within: Seconds for all turns together. If they would take longer, there are fewer turns, but at least three.

    Returns:
        For each call the milliseconds of one run, averaged over each turn.

    Raises:
        TimingError: If a call fails.
    """
    with torch.no_grad(), as_timing_errors():
        clock = _clock()
        timers = [timeit.Timer(call, timer=clock) for call in calls]
        seconds = [min(timer.repeat(_MIN_TURNS, 1)) for timer in timers]
        runs = [number or max(1, round(_SECONDS_PER_TURN / max(each, 1e-7))) for each in seconds]
        warmups = [warm if each < _SECONDS_PER_TURN else 0 for each in seconds]
        seconds_per_turn = sum((w + n) * each for w, n, each in zip(warmups, runs, seconds, strict=True))
        repeats = int(max(_MIN_TURNS, min(repeats, within / seconds_per_turn))) if seconds_per_turn else repeats
        turns = [[_measure_turn(*each) for each in zip(timers, warmups, runs, strict=True)] for _ in range(repeats)]
    return [[turn[k] for turn in turns] for k in range(len(calls))]


def _clock() -> Callable[[], float]:
    """Return a clock in seconds that waits until the devices are done. Of several, it waits for those in use."""
    devices = range(torch.accelerator.device_count())
    if len(devices) < 2:
        return device_timer
    used = [device for device in devices if torch.accelerator.memory_reserved(device)]

    def synchronized_time() -> float:
        for device in used:
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronized_time


def _measure_turn(timer: timeit.Timer, warm: int, number: int) -> float:
    timer.timeit(warm)
    return max(CLOCK_RESOLUTION_MS, 1e3 * timer.timeit(number) / number)


def milliseconds_of_graphs(
    calls: Sequence[_Call], device: torch.device, *, repeats: int = 7, within: float = math.inf
) -> list[list[float]]:
    """Measure calls as CUDA graphs, in which kernel launches take no time. See ``milliseconds``.

    ``torch.compile`` can turn a network into CUDA graphs. A graph holds several runs of a call, two milliseconds long
    or more, because launching the graph takes time too.
    """
    seconds = [min(times) / 1e3 for times in milliseconds(calls, repeats=1, number=_MIN_TURNS)]
    runs = [min(_MAX_RUNS_PER_GRAPH, max(_MIN_TURNS, round(_SECONDS_PER_GRAPH / each))) for each in seconds]
    with torch.no_grad(), torch.cuda.device(device), as_timing_errors():
        pool = torch.cuda.graph_pool_handle()  # all graphs share it: each overwrites the results of the one before
        graphs = [_record_graph(call, n, pool) for call, n in zip(calls, runs, strict=True)]
    turns = milliseconds([graph.replay for graph in graphs], repeats=repeats, number=1, within=within)
    return [[ms / n for ms in times] for times, n in zip(turns, runs, strict=True)]


def _record_graph(call: _Call, runs: int, pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(runs):
            call()
    return graph


@contextmanager
def as_timing_errors() -> Iterator[None]:
    """Raise TimingError for a RuntimeError inside."""
    try:
        yield
    except RuntimeError as error:  # for example if a device is lost or out of memory
        raise TimingError(
            f"a timed call did not run: {type(error).__name__}: {error}. Nothing was changed. Check that the model "
            "runs on these inputs, and that its device is available and has free memory."
        ) from error


def summarize_turns(turns: Sequence[Sequence[float]]) -> list[float]:
    """Summarize the result of ``milliseconds`` by one number for each call.

    The first call counts with its fastest turn. Each other call counts with that time multiplied by the median, over
    the turns, of its ratio to the first call. Load on the machine slows down both calls in the same turn, so the ratios
    are reliable. Minima are not: one call may have had a quiet moment that the other did not have.
    """
    first, *others = turns
    fastest = min(first)
    return [fastest, *(fastest * median(ms / base for ms, base in zip(each, first, strict=True)) for each in others)]


def side_by_side(calls: Sequence[_Call], *, repeats: int = 9, within: float = math.inf) -> list[float]:
    """Return one number of milliseconds for each call, comparable with the others. See ``summarize_turns``."""
    return summarize_turns(milliseconds(calls, repeats=repeats, within=within))


class Timer:
    """Measures how long calls take on this machine.

    It is the clock behind budgets of milliseconds. Subclass it to measure another runtime, or to replace it in a test.
    """

    def turns(
        self,
        calls: Sequence[_Call],
        *,
        repeats: int = 7,
        number: int | None = None,
        warm: int = 1,
        within: float = math.inf,
    ) -> list[list[float]]:
        """Return the milliseconds of each call in each turn; the calls take turns. See ``milliseconds``."""
        return milliseconds(calls, repeats=repeats, number=number, warm=warm, within=within)

    def graph_turns(
        self, calls: Sequence[_Call], device: torch.device, *, repeats: int = 7, within: float = math.inf
    ) -> list[list[float]]:
        """Return the same for calls recorded as CUDA graphs. See ``milliseconds_of_graphs``."""
        return milliseconds_of_graphs(calls, device, repeats=repeats, within=within)

    def side_by_side(self, calls: Sequence[_Call], *, repeats: int = 9, within: float = math.inf) -> list[float]:
        """Return one number of milliseconds for each call, comparable with the others. See ``summarize_turns``."""
        return summarize_turns(self.turns(calls, repeats=repeats, within=within))
