"""Jobs one after the other, or on an executor of the caller's: the same results, in the same order."""

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


def ordered_map(
    function: Callable[..., _Result], jobs: Iterable[tuple[Any, ...]], executor: Executor | None
) -> Iterator[_Result]:
    """``function(*job)`` for every job. No more are on their way than the executor may have workers, and whoever stops
    before the end cancels those that have not begun; one that takes long keeps none of the others waiting. To other
    processes go values, as bytes: by itself ``multiprocessing`` would move the tensors, which may be the caller's, into
    shared memory. Raises ArgumentError where the executor takes no work, or a worker dies.
    """
    if executor is None:
        yield from (function(*job) for job in jobs)
        return
    waiting: deque[Future[Any]] = deque()
    apart = isinstance(executor, ProcessPoolExecutor)
    workers = getattr(executor, "_max_workers", None) or os.cpu_count() or 1
    try:
        for job in jobs:
            called = (_on_bytes, (_pickled((function, job)),)) if apart else (function, job)
            waiting.append(_submitted(executor, *called))
            while len(running := [future for future in waiting if not future.done()]) > workers:
                wait(running, return_when=FIRST_COMPLETED)
            while waiting and waiting[0].done():
                yield _result(waiting.popleft(), apart=apart)
        while waiting:
            yield _result(waiting.popleft(), apart=apart)
    finally:
        for future in waiting:
            future.cancel()


def _submitted(executor: Executor, function: Callable[..., Any], job: tuple[Any, ...]) -> Future[Any]:
    try:
        return executor.submit(function, *job)
    except BrokenExecutor as error:
        raise _died(error) from error
    except RuntimeError as error:
        raise ArgumentError(f"executor takes no work: {error}. Pass one that has not been shut down.") from error


def _result(future: Future[Any], *, apart: bool) -> Any:
    try:
        return pickle.loads(future.result()) if apart else future.result()
    except BrokenExecutor as error:
        raise _died(error) from error


def _died(error: BrokenExecutor) -> ArgumentError:
    return ArgumentError(f"executor: a worker died, perhaps of a lack of memory: {error} Pass one of fewer workers.")


def _on_bytes(pickled: bytes) -> bytes:
    function, job = pickle.loads(pickled)
    return _pickled(function(*job))


def _pickled(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Of a tensor that is part of a larger storage, only that part."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.untyped_storage().nbytes() > value.nbytes:
            part: Any = value.detach().clone()
            return part.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented
