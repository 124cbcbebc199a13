"""Progress bars for long work: a line on stderr, or a function of the caller, such as tqdm."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from fxfact.errors import ArgumentError, ArgumentTypeError

Progress = bool | None | Callable[..., Iterable[Any]]
T = TypeVar("T")

_REDRAW_SECONDS, _LINE_SECONDS = 0.1, 10.0  # between two states, on terminals and elsewhere
_LONG_SECONDS = 2.0  # a phase that takes as long leaves a line on the terminal
_WIDTH = 24  # of the bar, in characters


def with_progress(
    results: Iterable[T],
    total: int | None,
    description: str,
    progress: Progress,
    *,
    work: Sequence[float] | None = None,
) -> Iterable[T]:
    """Return an iterable of ``results`` that shows its progress.

    None shows a bar if stderr is a terminal, True always, and False never. A function is called as tqdm is:
    ``progress(iterable, total=…, desc=…)``. ``total`` is the number of results as far as it is known; there may be more
    or fewer. ``work`` is how much each result costs, in any unit, so that the bar counts work. By default all cost the
    same.
    Raises ArgumentError if the function's iterable stops before all results were taken.
    Raises ArgumentTypeError if the function does not return an iterable, and for what is no function.
    """
    check_progress(progress)
    if progress is False or (progress is None and not _is_terminal()):
        return results
    if callable(progress):
        counted = _Counted(results)
        wrapped = progress(counted, total=total, desc=description)
        if not isinstance(wrapped, Iterable):
            raise ArgumentTypeError(f"progress must return an iterable, as tqdm does, got {wrapped!r}")
        return _check_complete(wrapped, counted)
    return results if total == 0 else _show(results, _Bar(description), work or [1.0] * (total or 0))


def with_phase(function: Callable[[], T], description: str, progress: Progress) -> T:
    """Call a function, and show that it runs. It is a single result, for ``with_progress``."""
    (result,) = with_progress((function() for _ in range(1)), 1, description, progress)
    return result


def check_progress(progress: object) -> None:
    """Raise ArgumentTypeError for what ``with_progress`` does not take."""
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise ArgumentTypeError(f"progress must be None, True, False or a callable like tqdm, got {progress!r}")


def _is_terminal() -> bool:
    """Return whether stderr is a terminal that can draw over a line. Of several processes, only the first has it."""
    is_first = os.environ.get("RANK", "0") == "0"  # set by torchrun
    return is_first and sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _show(results: Iterable[T], bar: _Bar, work: Sequence[float]) -> Iterator[T]:
    """Yield all results, and draw how much of the work is done after each."""
    whole, done = sum(work), 0.0
    is_divided = len(work) > 1 and whole > 0
    bar.draw(0.0 if is_divided else None)
    try:
        for k, result in enumerate(results):
            yield result
            done += work[k] if k < len(work) else 0.0
            bar.draw(done / whole if is_divided else None)
    finally:
        bar.close()


class _Bar:
    """A line on stderr. On a terminal it is drawn over again, elsewhere a new line is printed at times."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._started = self._drawn = time.monotonic()
        self._rewrites, self._length = _is_terminal(), 0

    def draw(self, share: float | None) -> None:
        """Draw the share of the work that is done, or None if it is not known."""
        now = time.monotonic()
        is_first = self._rewrites and not self._length
        if not is_first and now - self._drawn < (_REDRAW_SECONDS if self._rewrites else _LINE_SECONDS):
            return
        self._drawn, seconds = now, now - self._started
        bar, left = "", ""
        if share is not None:
            filled = round(_WIDTH * min(share, 1.0))
            bar = f" [{'#' * filled}{'.' * (_WIDTH - filled)}] {min(share, 1.0):4.0%}"
            left = f", {_format_seconds(seconds / share - seconds)} left" if 0.02 < share < 1 and seconds > 1 else ""
        self._write(f"{self._description}{bar} {_format_seconds(seconds)}{left}")

    def close(self) -> None:
        """Leave a line that says how long it took, or nothing if that was short."""
        seconds = time.monotonic() - self._started
        if self._rewrites:
            self._write("")
            self._write_raw("\r")
        if seconds >= _LONG_SECONDS or not self._rewrites:
            self._write_raw(f"{self._description} took {_format_seconds(seconds)}\n")

    def _write(self, text: str) -> None:
        """Write a line over the last one, or as a new line."""
        if not self._rewrites:
            self._write_raw(f"{text}\n")
            return
        text = text[: shutil.get_terminal_size((80, 0)).columns - 1]
        self._write_raw(f"\r{text.ljust(self._length)}")
        self._length = len(text)

    def _write_raw(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)


def _format_seconds(seconds: float) -> str:
    """Return 0.4 s, 12 s, 3:20 min or 1:03:20 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"


class _Counted(Iterator[Any]):
    """Counts the results that were taken."""

    def __init__(self, results: Iterable[Any]) -> None:
        self._results, self.count = iter(results), 0

    def __next__(self) -> Any:
        result = next(self._results)
        self.count += 1
        return result


def _check_complete(wrapped: Iterable[Any], taken: _Counted) -> Iterator[Any]:
    """Yield all items. Raises ArgumentError if ``wrapped`` left out results, or took some that it did not yield."""
    count = 0
    for each in wrapped:
        count += 1
        yield each
    if count < taken.count or next(taken, taken) is not taken:
        raise ArgumentError("progress must yield every item of its iterable, as tqdm does")
