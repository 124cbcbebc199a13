"""Progress bars for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any

import pytest

from fxfact.errors import ArgumentError, ArgumentTypeError
from fxfact.utils import with_progress


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


def test_without_progress_the_results_are_returned_as_they_are() -> None:
    results = iter("ab")
    assert with_progress(results, 2, "decomposing", False) is results


def test_tqdm_shows_the_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    assert list(with_progress(iter("ab"), 2, "decomposing", True)) == ["a", "b"]
    assert "decomposing" in capsys.readouterr().err


def test_without_tqdm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ArgumentError, match=r"pip install 'fxfact\[progress\]'"):
        with_progress(iter("ab"), 2, "decomposing", True)


def test_functions_that_lose_items_or_return_no_iterable_are_refused() -> None:
    for total in (2, None, 1, 9):
        for lossy in (lambda results, **_: list(results)[:-1], lambda results, **_: islice(results, 1)):
            with pytest.raises(ArgumentError, match="must yield every item"):
                list(with_progress(iter("ab"), total, "decomposing", lossy))
    with pytest.raises(ArgumentTypeError, match="must return an iterable, as tqdm does, got 3"):
        with_progress(iter("ab"), 2, "decomposing", lambda *_, **__: 3)  # type: ignore[arg-type, return-value]
