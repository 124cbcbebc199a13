"""Jobs one after the other, or on an executor of the caller's: the same results, in the same order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from fxfact.errors import ArgumentError, ArgumentTypeError

_Result = TypeVar("_Result")


def check_executor(executor: object) -> None:
    """Raises ArgumentTypeError for what is neither an executor nor None."""
    if executor is not None and not isinstance(executor, Executor):
        raise ArgumentTypeError(f"executor must be a concurrent.futures.Executor, got {type(executor).__name__}")


@contextmanager
def processes(count: int) -> Iterator[Executor | None]:
    """An executor of so many, of one thread each; none for one, which this process is."""
    if count == 1:
        yield None
        return
    with ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,)) as executor:
        yield executor


def in_order(
    function: Callable[..., _Result], jobs: Iterable[tuple[Any, ...]], executor: Executor | None
) -> Iterator[_Result]:
    """``function(*job)`` for every job. No more are on their way than the executor may have workers, and whoever stops
    before the end cancels those that have not begun; one that takes long keeps none of the others waiting. Raises
    ArgumentError where the executor takes no work.
    """
    if executor is None:
        yield from (function(*job) for job in jobs)
        return
    waiting: deque[Future[_Result]] = deque()
    workers = getattr(executor, "_max_workers", None) or os.cpu_count() or 1
    try:
        for job in jobs:
            waiting.append(_submitted(executor, function, job))
            while len(running := [future for future in waiting if not future.done()]) > workers:
                wait(running, return_when=FIRST_COMPLETED)
            while waiting and waiting[0].done():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _submitted(executor: Executor, function: Callable[..., _Result], job: tuple[Any, ...]) -> Future[_Result]:
    try:
        return executor.submit(function, *job)
    except RuntimeError as error:
        raise ArgumentError(f"executor takes no work: {error}. Pass one that has not been shut down.") from error
