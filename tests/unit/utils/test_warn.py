"""Warnings point to the line of the caller, however deep in the package they are issued."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.search import latency_search
from fxfact.utils import warn_caller
from tests.support import FakeTimer, ThreeConvs, millions_of_macs


def line_of_caller() -> int:
    return sys._getframe(1).f_lineno


def test_warning_points_to_the_line_that_calls() -> None:
    line = line_of_caller() + 2
    with pytest.warns(UserWarning, match="a message") as record:
        warn_caller("a message")
    assert [(warning.filename, warning.lineno) for warning in record] == [(__file__, line)]


def test_warning_has_the_category_given() -> None:
    with pytest.warns(DeprecationWarning, match="old"):
        warn_caller("old", DeprecationWarning)


def test_warning_points_past_wrappers_of_torch_and_contextlib() -> None:
    source = "@wrap\ndef inside():\n    warn_caller('deep')"

    @contextmanager
    def wrapper() -> Iterator[None]:
        yield

    for wrap in (torch.no_grad(), torch.inference_mode(), wrapper()):
        package = {"__name__": "fxfact.made_up", "warn_caller": warn_caller, "wrap": wrap}
        exec(source, package)
        network = nn.Identity()
        network.register_forward_hook(lambda module, args, output, package=package: package["inside"]())
        with pytest.warns(UserWarning, match="deep") as record:
            package["inside"]()
        assert [warning.filename for warning in record] == [__file__]
        with pytest.warns(UserWarning, match="deep") as record:
            network(torch.ones(1))
        assert [warning.filename for warning in record] == [__file__]


def test_warning_is_shown_once_for_each_line_by_default() -> None:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")
        for _ in range(3):
            warn_caller("here")
        warn_caller("here")
    assert len(record) == 2


# Every warning of the package


def first_of(*ms: float) -> Callable[[Sequence[Any]], list[float]]:
    """Networks that are timed together take the first of these milliseconds."""
    return lambda calls: list(ms[: len(calls)])


def in_turn(*ms: list[float]) -> Callable[[Sequence[Any]], list[float]]:
    remaining = iter(ms)
    return lambda calls: next(remaining, ms[-1])


@pytest.fixture
def network() -> ThreeConvs:
    torch.manual_seed(0)
    return ThreeConvs().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FXFACT_CACHE", str(tmp_path / "times"))
    return tmp_path / "times"


def assert_here(record: pytest.WarningsRecorder, *words: str) -> None:
    """Check that these warnings were issued, and others of unknown accuracy at most, all of them in this file."""
    assert {warning.filename for warning in record} == {__file__}
    found = [warning for warning in record if not issubclass(warning.category, fxfact.AccuracyWarning)]
    for warning, expected in zip(found, words, strict=True):
        assert expected in str(warning.message)


def test_distill_warns_about_nan_at_the_callers_line(network: ThreeConvs) -> None:
    x = torch.randn(8, 3, 10, 10)
    small = fxfact.factorize(network, "tucker", rank=0.4, example_inputs=x)
    with pytest.warns(UserWarning, match="NaN") as record:
        fxfact.distill(small, network, x.split(2), steps=1, augment=lambda part: part * float("nan"))
    assert_here(record, "the network became NaN or Inf")


def test_missed_latency_budget_warns_at_the_callers_line(
    network: ThreeConvs, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_search, "_MAX_TRIALS", 1)
    timer = FakeTimer(side_by_side=first_of(10.0, 9.0, 9.5, 9.7))
    with pytest.warns(UserWarning, match="budget") as record:
        fxfact.plan(network, ["channel_svd"], budget=fxfact.Latency(0.7, timer=timer), example_inputs=x)
    assert_here(record, "the fastest measures")


def test_slow_result_warns_at_the_callers_line(network: ThreeConvs, x: Tensor) -> None:
    timer = FakeTimer(
        lambda calls: [[4 * millions_of_macs(call)] * 3 for call in calls],
        in_turn([40.0, 30.0, 40.0, 35.0], [32.0], [30.0, 15.0], [30.0, 25.0]),
    )
    with pytest.warns(UserWarning, match="25 ms") as record:
        fxfact.factorize(network, ["channel_svd"], budget=fxfact.Latency(0.5, timer=timer), example_inputs=x)
    assert_here(record, "the dense network 30 ms")


def test_busy_machine_warns_at_the_callers_line(network: ThreeConvs, x: Tensor) -> None:
    timer = FakeTimer(lambda calls: [[1.0, 2.0, 2.0]] * len(calls))
    with pytest.warns(UserWarning, match="under load") as record:
        fxfact.plan(network, ["channel_svd"], budget=fxfact.Latency(0.5, timer=timer), example_inputs=x)
    assert_here(record, "of the MACs")


def test_latency_cache_that_is_damaged_warns_at_the_callers_line(
    network: ThreeConvs, x: Tensor, cache_folder: Path
) -> None:
    budget = fxfact.Latency(0.7, timer=FakeTimer())
    fxfact.plan(network, ["channel_svd"], budget=budget, example_inputs=x)
    (path,) = cache_folder.iterdir()
    path.write_text("{")
    with pytest.warns(UserWarning, match="damaged") as record:
        fxfact.plan(network, ["channel_svd"], budget=budget, example_inputs=x)
    assert_here(record, "times are measured again")


def test_latency_cache_that_cannot_be_written_warns_at_the_callers_line(
    network: ThreeConvs, x: Tensor, cache_folder: Path
) -> None:
    cache_folder.write_text("a file, no folder")
    with pytest.warns(UserWarning, match="times") as record:
        fxfact.plan(network, ["channel_svd"], budget=fxfact.Latency(0.7, timer=FakeTimer()), example_inputs=x)
    assert_here(record, "times are measured again", "Set FXFACT_CACHE")
