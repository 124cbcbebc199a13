"""Progress bars for long work."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable
from itertools import count, islice
from types import SimpleNamespace
from typing import Any

import pytest

from fxfact.errors import ArgumentError, ArgumentTypeError
from fxfact.utils import progress, with_phase, with_progress


def test_a_function_is_called_as_tqdm_is() -> None:
    shown: list[Any] = []

    def bar(iterable: Iterable[int], *, total: int | None, desc: str) -> Iterable[int]:
        shown.append((total, desc))
        for item in iterable:
            shown.append(item)
            yield item

    assert list(with_progress(iter("ab"), 2, "decomposing", bar)) == ["a", "b"]
    assert shown == [(2, "decomposing"), "a", "b"]


@pytest.mark.parametrize("total", [1, 2, 5, None])
def test_a_total_that_was_estimated_wrong_loses_nothing(total: int | None) -> None:
    assert list(with_progress(iter("ab"), total, "calibrating", lambda results, **_: results)) == ["a", "b"]


@pytest.mark.parametrize("wrong", ["yes", 3, 0])
def test_what_shows_no_progress_is_refused(wrong: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="progress must be None, True, False or a callable"):
        with_progress(iter("ab"), 2, "decomposing", wrong)


def test_without_progress_the_results_are_returned_as_they_are() -> None:
    results = iter("ab")
    assert with_progress(results, 2, "decomposing", False) is results


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal as stderr, and a clock that goes on by a second at every look."""
    stream, seconds = Terminal(), count()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("RANK", raising=False)
    return stream


def test_bar_on_a_terminal_counts_work_and_is_drawn_over(terminal: Terminal) -> None:
    assert list(with_progress(iter("abc"), 3, "planning", None, work=[6, 3, 1])) == ["a", "b", "c"]
    states = terminal.getvalue().split("\r")
    assert [state.split("]")[1].split()[0] for state in states if "]" in state] == ["0%", "60%", "90%", "100%"]
    assert "planning [##############..........]  60% 2.0 s, 1.3 s left" in states
    assert states[-1] == "planning took 5.0 s\n"
    assert states[-2].strip() == "", "the bar is erased first"


def test_bar_fits_a_narrow_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    list(with_progress(range(9), 9, "decomposing", True))
    assert max(map(len, terminal.getvalue().split("\r"))) < 30


def test_phase_without_parts_shows_its_time(terminal: Terminal) -> None:
    assert with_phase(lambda: 7, "capturing", None) == 7
    assert "\rcapturing 1.0 s\r" in terminal.getvalue().replace(" \r", "\r")
    assert "%" not in terminal.getvalue()


def test_short_phase_leaves_nothing_on_the_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    with_phase(lambda: 7, "capturing", None)
    assert terminal.getvalue().rpartition("\r")[2] == ""


def test_bar_is_erased_if_the_work_fails(terminal: Terminal) -> None:
    def fail() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        with_phase(fail, "capturing", None)
    assert terminal.getvalue().endswith("capturing took 2.0 s\n")


@pytest.mark.parametrize("total", [1, 2, 5, None])
def test_bar_bears_a_total_that_was_estimated_wrong(total: int | None, terminal: Terminal) -> None:
    assert list(with_progress(iter("abc"), total, "calibrating", True)) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["pipe", "dumb", "none", "second process"])
def test_without_a_terminal_there_is_no_bar_by_default(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = {"pipe": io.StringIO(), "none": None}.get(kind, Terminal())
    monkeypatch.setenv("RANK", "1" if kind == "second process" else "0")
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setenv("TERM", "dumb" if kind == "dumb" else "xterm")
    assert list(with_progress(iter("ab"), 2, "planning", None)) == ["a", "b"]
    if stream is not None:
        assert stream.getvalue() == ""


def test_bar_that_is_asked_for_is_plain_lines_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, seconds = io.StringIO(), count(step=20)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    list(with_progress(iter("ab"), 2, "planning", True))
    lines = stream.getvalue().splitlines()
    assert [line.split("]")[-1].split()[0] for line in lines[:-1]] == ["0%", "50%", "100%"]
    assert lines[-1].startswith("planning took")
    assert "\r" not in stream.getvalue()


def test_functions_that_lose_items_or_return_no_iterable_are_refused() -> None:
    for total in (2, None, 1, 9):
        for lossy in (lambda results, **_: list(results)[:-1], lambda results, **_: islice(results, 1)):
            with pytest.raises(ArgumentError, match="must yield every item"):
                list(with_progress(iter("ab"), total, "decomposing", lossy))
    with pytest.raises(ArgumentTypeError, match="must return an iterable, as tqdm does, got 3"):
        with_progress(iter("ab"), 2, "decomposing", lambda *_, **__: 3)  # type: ignore[arg-type, return-value]
