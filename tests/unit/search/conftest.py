"""Networks to time, and a cache folder for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fxfact
from tests.support import ThreeConvs


@pytest.fixture
def three_convs() -> ThreeConvs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ThreeConvs()
        model.norm.running_mean.normal_()
        model.norm.weight.data.uniform_(0.5, 2)
        return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def error_curves() -> fxfact.ErrorCurveCache:
    """Curves that tests share, so that each is computed once."""
    return fxfact.ErrorCurveCache()


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keep the measured times of a test in a folder of its own."""
    folder = tmp_path / "times"
    monkeypatch.setenv("FXFACT_CACHE", str(folder))
    return folder
