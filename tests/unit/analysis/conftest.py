"""A network with every kind of outcome, factorized and reported once for the tests of the room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.analysis import Report

FACTORIZATIONS: dict[str, Any] = {"stem": "channel_svd", "body": "tucker", "up": "cp", "*": "svd"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.body = nn.Conv2d(12, 12, 3, padding=1, groups=2)
        self.thin = nn.Conv2d(12, 1, 1)
        self.up = nn.ConvTranspose2d(12, 10, 4, stride=2, bias=False)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.body(x) * self.thin(x))
        return self.head(self.up(x).mean((2, 3)))


class Untraceable(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


@pytest.fixture(scope="session")
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def make_networks(x: Tensor) -> Callable[..., tuple[Any, Any]]:
    """Makes the original, captured as 'trace', 'modules' or 'export', and the factorized network."""

    def make(capture: str = "trace", factorization: Any = FACTORIZATIONS) -> tuple[Any, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = (Untraceable if capture == "modules" else Net)().eval()
        if capture == "export":
            model = torch.export.export(model, (x,))
        inputs = None if capture == "export" else x
        return model, fxfact.factorize(model, factorization, rank=0.5, allow_growth=True, example_inputs=inputs)

    return make


@pytest.fixture(scope="session")
def networks(make_networks: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
    return make_networks()


@pytest.fixture(scope="session")
def report(networks: tuple[Any, Any], x: Tensor) -> Report:
    return fxfact.report(*networks, x)
