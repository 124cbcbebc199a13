"""Jobs on an executor of the caller."""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor

from fxfact.errors import ArgumentError, ArgumentTypeError
from fxfact.utils import check_executor, ordered_map, processes


def double_first_row(x: Tensor) -> Tensor:
    return 2 * x[0]


def test_results_come_in_the_order_of_the_jobs() -> None:
    jobs = [(k,) for k in range(20)]
    expected = [math.factorial(k) for k in range(20)]
    assert list(ordered_map(math.factorial, jobs, None)) == expected
    with ThreadPoolExecutor(3) as executor:
        assert list(ordered_map(math.factorial, jobs, executor)) == expected
        assert list(ordered_map(math.factorial, [], executor)) == []


def test_a_slow_job_does_not_delay_the_others() -> None:
    last = threading.Event()

    def job(k: int) -> bool:
        if k == 5:
            last.set()
        return k > 0 or last.wait(10)

    with ThreadPoolExecutor(2) as executor:
        assert list(ordered_map(job, ((k,) for k in range(6)), executor)) == [True] * 6


def test_jobs_that_have_not_started_are_cancelled() -> None:
    started: list[int] = []
    blocked = threading.Event()

    def job(k: int) -> int:
        started.append(k)
        return k if k == 0 or blocked.wait(10) else -1

    with ThreadPoolExecutor(1) as executor:
        results = ordered_map(job, ((k,) for k in range(9)), executor)
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]
        blocked.set()
    assert len(started) <= 3


def test_a_failing_job_raises_its_error() -> None:
    with ThreadPoolExecutor(2) as executor, pytest.raises(ValueError, match="math domain"):
        list(ordered_map(math.sqrt, [(1.0,), (-1.0,)], executor))


def test_processes_get_copies_of_the_parts_that_tensors_use() -> None:
    x = torch.randn(1000, 4)[:2]
    with processes(2) as executor:
        assert isinstance(executor, ProcessPoolExecutor)
        (found,) = ordered_map(double_first_row, [(x,)], executor)
    assert torch.equal(found, 2 * x[0])
    assert not x.is_shared()
    assert not found.is_shared()


def test_one_process_is_this_one() -> None:
    with processes(1) as executor:
        assert executor is None


def test_a_worker_that_dies_is_reported() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        for _ in range(2):
            with pytest.raises(ArgumentError, match="a worker died"):
                list(ordered_map(os._exit, [(1,)] * 3, executor))


def test_objects_that_are_no_executors_and_closed_executors_are_refused() -> None:
    executor = ThreadPoolExecutor(1)
    for accepted in (None, executor, Executor()):
        check_executor(accepted)
    with pytest.raises(ArgumentTypeError, match=r"executor must be a concurrent\.futures\.Executor, got int"):
        check_executor(4)
    executor.shutdown()
    with pytest.raises(ArgumentError, match="executor accepts no jobs"):
        list(ordered_map(math.sqrt, [(1.0,)], executor))
