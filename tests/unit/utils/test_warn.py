"""Warnings point to the line of the caller, however deep in the package they are issued."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fxfact.utils import warn_caller


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
