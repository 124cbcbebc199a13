"""Calls are timed in turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch

from fxfact.utils import CLOCK_RESOLUTION_MS, milliseconds, summarize_turns, timing


@pytest.mark.parametrize(
    "busy", [[1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 3.0, 1.5, 7.0, 1.2], [2.0, 2.0, 1.0, 2.0, 2.0]], ids=str
)
def test_load_on_the_machine_changes_no_ratio(busy: list[float]) -> None:
    first, second = ([ms * each for each in busy] for ms in (4.0, 1.0))
    second[2] = 9.0  # disturbed alone
    assert summarize_turns([first, second, first]) == pytest.approx([4.0, 1.0, 4.0])


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("warm", [0, 2])
def test_calls_take_turns(number: int, warm: int) -> None:
    ran: list[str] = []
    calls: list[Callable[[], None]] = [partial(ran.append, name) for name in "ab"]
    turns = milliseconds(calls, repeats=4, number=number, warm=warm)
    assert [len(each) for each in turns] == [4, 4]
    assert min(map(min, turns)) >= CLOCK_RESOLUTION_MS
    one = warm + number
    assert "".join(ran).endswith(("a" * one + "b" * one) * 4)
    assert Counter(ran)["a"] <= 4 * one + 3


def test_long_calls_are_not_warmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SECONDS_PER_TURN", 0.0)
    ran: list[int] = []
    milliseconds([partial(ran.append, 0)], repeats=4, number=1, warm=2)
    assert len(ran) == 3 + 4


def test_all_devices_in_use_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: 8 * (device != 1))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    milliseconds([lambda: waited.append(-1)], repeats=1, number=1, warm=0)
    assert waited[-5:] == [0, 2, -1, 0, 2]


def test_turns_end_within_the_seconds_given() -> None:
    ran = Counter[str]()

    def busy() -> None:
        ran["busy"] += 1
        sum(range(200_000))  # milliseconds

    milliseconds([busy], repeats=10_000, number=1, within=0.05)
    assert 3 <= ran["busy"] < 1_000
