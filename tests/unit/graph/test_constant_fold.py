"""Weights that a graph computes from parameters are folded into parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxfact
from fxfact.graph import fold_computed_weights
from tests.support import apart


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.flatten(1).std(1).reshape(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def test_standardized_weights_are_folded_in_a_graph_and_in_a_program(image: Tensor) -> None:
    model = nn.Sequential(Standardised(4, 8, 3), nn.ReLU(), Standardised(8, 8, 3, bias=False)).eval()
    for source in (model, torch.export.export(model, (image,))):
        inputs = image if source is model else None
        assert all("computed" in d.reason for d in fxfact.plan(source, example_inputs=inputs, capture="auto"))
        result = fxfact.factorize(source, "cp", example_inputs=inputs, fold_weights=True, verify=True)
        plan = fxfact.plan_of(result)
        assert [d.path for d in plan.rewrites] == ["0", "2"]
        assert plan.network.params == sum(p.numel() for p in model.parameters())
        dense = fxfact.factorize(source, "tt", rank=10**6, allow_growth=True, example_inputs=inputs, fold_weights=True)
        run = dense if source is model else dense.module()
        assert apart(model(image), run(image)) < 1e-5


def test_parts_of_one_weight_get_different_names(image: Tensor) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.conv.weight
            parts = [F.conv2d(x, part, padding=1) for part in (weight[:3], weight[3:6], weight[6:])]
            return torch.cat(parts, 1) * weight.abs().max()

    model = Parts()
    result = fxfact.factorize(model, "tt", rank=10**6, allow_growth=True, example_inputs=image, fold_weights=True)
    assert [d.path for d in fxfact.plan_of(result).rewrites] == [f"conv.weight_folded_{k}" for k in range(3)]
    assert apart(model(image), result(image)) < 1e-5


def test_parameters_of_called_modules_are_kept(image: Tensor) -> None:
    class Reusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            centred = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
            scaled = self.norm.weight.view(-1, 1, 1, 1) * self.conv.weight
            return self.norm(self.conv(x) + F.conv2d(x, centred, padding=1)) + F.conv2d(x, scaled, padding=1)

    model = Reusing().eval()
    nn.init.uniform_(model.norm.weight)
    options: dict[str, Any] = {"rank": 10**6, "allow_growth": True, "fold_weights": True, "capture": "trace"}
    for inputs in (None, image):
        result = fxfact.factorize(model, "tt", example_inputs=inputs, **options)
        paths = [decision.path for decision in fxfact.plan_of(result).rewrites]
        assert paths == ["conv", "conv_folded_0", "conv_folded_1"]
        assert apart(model(image), result(image)) < 1e-5


def test_weights_that_depend_on_the_input_or_on_random_numbers_are_not_folded(image: Tensor) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(x, F.dropout(self.kernel, 0.5, True))
            return F.conv2d(x, self.kernel * x.mean())

    traced = fx.symbolic_trace(Changing())
    assert fold_computed_weights(traced) == ()
    plan = fxfact.plan(Changing(), example_inputs=image, fold_weights=True)
    assert all("computed" in d.reason for d in plan)
    assert plan.rewrites == ()
