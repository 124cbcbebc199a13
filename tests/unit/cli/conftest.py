"""Fixtures of the command-line tests: a folder with models and data, and a way to run a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxfact.cli import main

_MODELS = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 4)).eval()

def normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3)))

def nothing():
    return 3

def score(network):
    x = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    return -(network(x) - small()(x)).square().mean(1)

def error(network):
    return -score(network).mean()

def nan(network):
    return float("nan")
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: a module of models (shop), an exported model, state dicts, and data."""
    (tmp_path / "shop.py").write_text(_MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import shop  # noqa: PLC0415

    model, x = shop.small(), torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", max=64)
    torch.export.save(torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},)), "net.pt2")
    torch.save(model.state_dict(), "state.pt")
    torch.save({name: torch.zeros_like(value) for name, value in model.state_dict().items()}, "zero.pt")
    np.save("data.npy", x.numpy())
    yield tmp_path
    sys.modules.pop("shop", None)


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command with --json, checks its exit status, and returns what it printed."""

    def run(*arguments: str, status: int = 0) -> Any:
        assert main([*arguments, "--json"]) == status
        return json.loads(capsys.readouterr().out)

    return run
