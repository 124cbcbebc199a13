"""A classifier, data for it, and error curves that tests share."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import fxfact
from tests.support import Classifier


@pytest.fixture
def model(classifier: Classifier) -> nn.Module:
    return classifier


@pytest.fixture
def x(color_images: Tensor) -> Tensor:
    return color_images


@pytest.fixture(scope="session")
def error_curves() -> fxfact.ErrorCurveCache:
    """Curves that tests share, so that each is computed once."""
    return fxfact.ErrorCurveCache()
