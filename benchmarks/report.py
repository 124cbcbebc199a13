"""Helpers of the benchmarks: timing in turns, printing a table, saving JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxfact.search.latency_cache import describe_machine

RESULTS = Path(__file__).parent / "results"


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every call. They warm up once, then take turns, in reverse order every second turn."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, call in list(calls.items())[:: -1 if turn % 2 else 1]:
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def show(title: str, rows: Sequence[Mapping[str, Any]], floatfmt: str = ".3g") -> None:
    print(f"\n{title}\n\n{tabulate(rows, headers='keys', floatfmt=floatfmt)}", flush=True)


def save(name: str, content: Mapping[str, Any], device: str = "cpu") -> None:
    """Write ``results/<name>.json``, with a description of the machine."""
    machine = {**describe_machine(torch.device(device)), "cores": os.cpu_count(), "python": platform.python_version()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, **content}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}")
