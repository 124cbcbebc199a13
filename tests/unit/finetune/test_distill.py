"""Distillation: arguments, and training that fails. What training achieves is in the integration tests."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import ArgumentError
from tests.support import Small


def test_augment_may_write_to_its_tensors(small: Small, factorized: nn.Module, data: Tensor) -> None:
    def blanked(maps: Tensor) -> Tensor:
        assert not bool((maps[..., :3, :3] == 0).all())
        maps[..., :3, :3] = 0
        return maps

    before = data.clone()
    fxfact.distill(factorized, small, data.split(8), steps=12, augment=blanked)
    assert torch.equal(data, before)


def test_model_without_gradients_cannot_be_distilled(data: Tensor) -> None:
    class NoGrad(Small):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = NoGrad().eval()
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=data[:2])
    with pytest.raises(ArgumentError, match="no gradient flows from the output to the parameters"):
        fxfact.distill(small, model, data.split(8))


def test_distill_refuses_bad_arguments(small: Small, factorized: nn.Module, data: Tensor) -> None:
    frozen = copy.deepcopy(factorized).requires_grad_(False)
    with pytest.raises(ArgumentError, match="has none"):
        fxfact.distill(frozen, small, data.split(8))
    for argument, number in (("steps", 0), ("patience", True), ("seed", "a")):
        with pytest.raises(ArgumentError, match=f"{argument} must be an int"):
            fxfact.distill(factorized, small, data.split(8), **{argument: number})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="seconds must be a positive number, got 0"):
        fxfact.distill(factorized, small, data.split(8), seconds=0)
    with pytest.raises(ArgumentError, match="lr must be a positive number, got 'fast'"):
        fxfact.distill(factorized, small, data.split(8), lr="fast")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"augment fails on a tensor \(8, 4, 10, 10\)"):
        fxfact.distill(factorized, small, data.split(8), augment=lambda part: part.no_such_thing)


def test_training_that_becomes_nan_returns_the_best_state_with_a_warning(
    small: Small, factorized: nn.Module, data: Tensor
) -> None:
    with pytest.warns(UserWarning, match="NaN or Inf"):
        kept, report = fxfact.distill(
            factorized, small, data.split(8), steps=2, augment=lambda part: part * float("nan")
        )
    assert kept(data).equal(factorized(data))
    assert report.after == report.before


def test_distill_result_prints_what_was_done() -> None:
    result = fxfact.DistillResult(before=0.25, after=0.125, seconds=1.23, steps=60)
    assert str(result) == "60 steps in 1.2 s: 0.25 → 0.125 nats per sample from the original, on held-out batches"
