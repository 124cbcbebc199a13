"""Budgets of milliseconds for networks that torch.compile runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxfact
from fxfact.search import inference
from tests.support import FakeTimer, ThreeConvs

pytestmark = pytest.mark.integration


def test_latency_budget_for_the_compiler_is_planned_and_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FXFACT_CACHE", str(tmp_path / "times"))
    torch.manual_seed(0)
    model, x = ThreeConvs().eval(), torch.randn(2, 3, 10, 10)
    compiled_networks: list[Callable[..., Any]] = []
    compile_network = inference._compile

    def recording_compile(network: nn.Module, *given: Any) -> Callable[..., Any]:
        compiled_networks.append(network)
        return compile_network(network, *given)

    monkeypatch.setattr(inference, "_compile", recording_compile)
    timer = FakeTimer(
        lambda calls: [[3.0] * 3, *[[1.0] * 3] * (len(calls) - 1)], lambda calls: [10.0, 9.0][: len(calls)]
    )
    small = fxfact.factorize(model, "tucker", budget=fxfact.Latency(0.9, compiled=True, timer=timer), example_inputs=x)
    assert len(compiled_networks) == 5  # the dense network, and both in turns, in a trial and as they are
    torch.testing.assert_close(compile_network(small, (x,), {})(x), small(x), rtol=1e-4, atol=1e-4)
