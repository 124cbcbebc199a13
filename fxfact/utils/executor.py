"""Runs jobs one after another, or on an executor of the caller. The results and their order are the same."""

from __future__ import annotations

import io
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxfact.errors import ArgumentError, ArgumentTypeError

_Result = TypeVar("_Result")


def check_executor(executor: object) -> None:
    """Raise ArgumentTypeError if ``executor`` is neither an executor nor None."""
    if executor is not None and not isinstance(executor, Executor):
        raise ArgumentTypeError(f"executor must be a concurrent.futures.Executor, got {type(executor).__name__}")


@contextmanager
def processes(count: int) -> Iterator[Executor | None]:
    """Provide an executor with ``count`` processes of one thread each, or None for a count of 1."""
    if count == 1:
        yield None
        return
    with ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,)) as executor:
        yield executor


def ordered_map(
    function: Callable[..., _Result], jobs: Iterable[tuple[Any, ...]], executor: Executor | None
) -> Iterator[_Result]:
    """Yield ``function(*job)`` for every job, in the order of the jobs.

    At most as many jobs as the executor has workers are submitted and not done. A slow job does not delay the others.
    If the caller stops early, jobs that have not started are cancelled. Processes get the jobs as bytes, because
    ``multiprocessing`` would move their tensors, which may belong to the caller, into shared memory. Raises
    ArgumentError if the executor accepts no jobs or a worker dies.
    """
    if executor is None:
        yield from (function(*job) for job in jobs)
        return
    pending: deque[Future[Any]] = deque()
    pickled = isinstance(executor, ProcessPoolExecutor)
    workers = getattr(executor, "_max_workers", None) or os.cpu_count() or 1
    try:
        for job in jobs:
            call = (_run_pickled, (_pickle((function, job)),)) if pickled else (function, job)
            pending.append(_submit(executor, *call))
            while len(running := [future for future in pending if not future.done()]) > workers:
                wait(running, return_when=FIRST_COMPLETED)
            while pending and pending[0].done():
                yield _result_of(pending.popleft(), pickled=pickled)
        while pending:
            yield _result_of(pending.popleft(), pickled=pickled)
    finally:
        for future in pending:
            future.cancel()


def _submit(executor: Executor, function: Callable[..., Any], job: tuple[Any, ...]) -> Future[Any]:
    try:
        return executor.submit(function, *job)
    except BrokenExecutor as error:
        raise _worker_died(error) from error
    except RuntimeError as error:
        raise ArgumentError(f"executor accepts no jobs: {error}. Pass one that has not been shut down.") from error


def _result_of(future: Future[Any], *, pickled: bool) -> Any:
    try:
        return pickle.loads(future.result()) if pickled else future.result()
    except BrokenExecutor as error:
        raise _worker_died(error) from error


def _worker_died(error: BrokenExecutor) -> ArgumentError:
    return ArgumentError(f"executor: a worker died, maybe out of memory: {error} Pass an executor with fewer workers.")


def _run_pickled(call: bytes) -> bytes:
    function, job = pickle.loads(call)
    return _pickle(function(*job))


def _pickle(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles only the part of a storage that a tensor uses."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.untyped_storage().nbytes() > value.nbytes:
            part: Any = value.detach().clone()
            return part.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented
