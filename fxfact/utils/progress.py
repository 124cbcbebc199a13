"""Progress bars for long work: tqdm, or a function of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fxfact.errors import ArgumentError, ArgumentTypeError

Progress = bool | Callable[..., Iterable[Any]]


def with_progress(results: Iterable[Any], total: int | None, description: str, progress: Progress) -> Iterable[Any]:
    """Return an iterable of ``results`` that shows its progress.

    If ``progress`` is True, tqdm shows it. A function is called as tqdm is: ``progress(iterable, total=…, desc=…)``.
    ``total`` is the number of results as far as it is known; there may be more or fewer.
    Raises ArgumentError if tqdm is not installed, or if the function's iterable stops before all results were taken.
    Raises ArgumentTypeError if the function does not return an iterable.
    """
    if progress is False:
        return results
    if callable(progress):
        counted = _Counted(results)
        wrapped = progress(counted, total=total, desc=description)
        if not isinstance(wrapped, Iterable):
            raise ArgumentTypeError(f"progress must return an iterable, as tqdm does, got {wrapped!r}")
        return _check_complete(wrapped, counted)
    try:
        from tqdm import tqdm  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ArgumentError("progress=True needs tqdm: pip install 'fxfact[progress]'") from error
    return tqdm(results, total=total, desc=description)


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
