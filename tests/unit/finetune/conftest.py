"""A factorized network and data for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfact
from tests.support import Small


@pytest.fixture
def data() -> Tensor:
    return torch.randn(32, 4, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def factorized(small: Small, image: Tensor) -> nn.Module:
    return fxfact.factorize(small, "tucker", rank=0.4, example_inputs=image)
