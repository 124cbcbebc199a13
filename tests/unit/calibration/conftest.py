"""A classifier and data for it."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from tests.support import Classifier


@pytest.fixture
def model(classifier: Classifier) -> nn.Module:
    return classifier


@pytest.fixture
def x(color_images: Tensor) -> Tensor:
    return color_images
