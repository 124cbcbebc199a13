"""Budgets in several processes."""

from __future__ import annotations

from importlib import import_module

import pytest
from torch import Tensor

import fxfact
from fxfact.errors import ArgumentError
from tests.support import Classifier


def test_latency_budget_is_refused_in_several_processes(
    classifier: Classifier, color_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("fxfact.search.search"), "rank_and_world_size", lambda: (1, 2))
    with pytest.raises(ArgumentError, match="times of its own"):
        fxfact.plan(classifier, budget=fxfact.Latency(0.5), calibration=color_images.split(8))
