"""A bar for what takes long: tqdm's, or the caller's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fxfact.errors import ArgumentError, ArgumentTypeError

Progress = bool | Callable[..., Iterable[Any]]


def with_progress(results: Iterable[Any], total: int | None, what: str, progress: Progress) -> Iterable[Any]:
    """``results``, their coming shown: True is tqdm's bar, anything else is called as tqdm is,
    ``progress(iterable, total=…, desc=…)``. Raises ArgumentError, ArgumentTypeError.
    """
    if progress is False:
        return results
    if callable(progress):
        passed = progress(results, total=total, desc=what)
        if not isinstance(passed, Iterable):
            raise ArgumentTypeError(f"progress must give back an iterable, as tqdm does, got {passed!r}")
        return _all(passed, total)
    try:
        from tqdm import tqdm  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ArgumentError("progress=True shows tqdm's bar: pip install 'fxfact[progress]'") from error
    return tqdm(results, total=total, desc=what)


def _all(passed: Iterable[Any], total: int | None) -> Iterator[Any]:
    """Raises ArgumentError where fewer come than there are."""
    count = 0
    for each in passed:
        count += 1
        yield each
    if total is not None and count < total:
        raise ArgumentError("progress must pass on everything that it iterates over, as tqdm does")
