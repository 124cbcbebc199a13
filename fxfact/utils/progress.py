"""Progress bars for long work: tqdm, or a function of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fxfact.errors import ArgumentError, ArgumentTypeError

Progress = bool | Callable[..., Iterable[Any]]


def with_progress(results: Iterable[Any], total: int | None, description: str, progress: Progress) -> Iterable[Any]:
    """Return an iterable of ``results`` that shows its progress.

    If ``progress`` is True, tqdm shows it. A function is called as tqdm is: ``progress(iterable, total=…, desc=…)``.
    Raises ArgumentError if tqdm is not installed, or if the function's iterable stops before all results were taken.
    Raises ArgumentTypeError if the function does not return an iterable.
    """
    if progress is False:
        return results
    if callable(progress):
        wrapped = progress(results, total=total, desc=description)
        if not isinstance(wrapped, Iterable):
            raise ArgumentTypeError(f"progress must return an iterable, as tqdm does, got {wrapped!r}")
        return _check_complete(wrapped, total)
    try:
        from tqdm import tqdm  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ArgumentError("progress=True needs tqdm: pip install 'fxfact[progress]'") from error
    return tqdm(results, total=total, desc=description)


def _check_complete(wrapped: Iterable[Any], total: int | None) -> Iterator[Any]:
    """Yield all items. Raises ArgumentError if there are fewer than ``total``."""
    count = 0
    for each in wrapped:
        count += 1
        yield each
    if total is not None and count < total:
        raise ArgumentError("progress must yield every item of its iterable, as tqdm does")
