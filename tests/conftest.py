"""Fixtures, and one thread for each worker process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for benchmarks and tests.support
import fxfact
from fxfact.conv import ConvSpec
from tests.support import SPECS, Classifier, Small

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: their threads would compete
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


os.environ["COLUMNS"] = "120"  # texts are as wide as without a terminal, wherever the tests run


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request: pytest.FixtureRequest) -> ConvSpec:
    return request.param


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    network = Small()
    with torch.no_grad():
        network.norm.running_mean.normal_()
    return network.eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 4, 10, 10, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def classifier() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier().eval()


@pytest.fixture
def color_images() -> Tensor:
    """24 samples for ``classifier``."""
    return torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(classifier: Classifier) -> nn.Module:
    return classifier


@pytest.fixture
def x(color_images: Tensor) -> Tensor:
    return color_images


@pytest.fixture
def data() -> Tensor:
    """32 samples for ``small``."""
    return torch.randn(32, 4, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def factorized(small: Small, image: Tensor) -> nn.Module:
    return fxfact.factorize(small, "tucker", rank=0.4, example_inputs=image)
