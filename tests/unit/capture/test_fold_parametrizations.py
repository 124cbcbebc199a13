"""Weights that are computed from others: listed, or folded where the caller agrees."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxfact
from fxfact.graph import fold_computed_weights
from tests.support import apart

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def spectral(conv: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(conv)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own parametrization": lambda conv: parametrize.register_parametrization(conv, "weight", Halved()),
    "two on one": lambda conv: parametrizations.weight_norm(
        parametrize.register_parametrization(conv, "bias", Halved()), name="weight"
    ),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": spectral,
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
    "pruned twice": lambda conv: prune.random_unstructured(prune.l1_unstructured(conv, "weight", 0.3), "weight", 0.3),
}


def computing(way: str, branches: bool) -> nn.Module:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = WAYS[way](nn.Conv2d(4, 8, 3, padding=1))
            self.up = WAYS[way](nn.ConvTranspose2d(8, 6, 3, stride=2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.up(x if branches and x.sum() > 1e9 else x + 1)

    torch.manual_seed(0)
    return Two()


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_computed_weight_is_listed_or_folded(way: str, branches: bool, image: Tensor) -> None:
    model = computing(way, branches).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected, kinds = model(image), [type(module) for module in model.modules()]
    listed = fxfact.plan(model, example_inputs=image)
    assert all("fold_weights=True" in decision.reason for decision in listed)
    options = {"rank": 10**6, "example_inputs": image, "allow_growth": True, "fold_weights": True, "verify": True}
    result = fxfact.factorize(model, "spatial_svd", **options)
    plan = fxfact.plan_of(result)
    assert ([d.path for d in plan.rewrites], plan.fold_weights) == (["conv", "up"], True)
    assert plan.capture == ("modules" if branches else "trace")
    assert apart(expected, result(image)) < 1e-5
    assert set(model.state_dict()) == set(before)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds
    assert model(image).equal(expected)
    assert all(p.requires_grad for p in result.parameters())
    if branches:
        pickle.dumps(result.up)
    again = fxfact.apply(fxfact.Plan.from_json(plan.to_json()), model, weights="empty")
    again.load_state_dict(result.state_dict())
    assert again.eval()(image).equal(result(image))
    assert fxfact.verify(model, again, image).ok


def test_folding_takes_the_value_of_evaluation_mode(image: Tensor) -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 8, 3))).train()
    u = model[0].parametrizations.weight[0]._u.clone()
    result = fxfact.factorize(model, example_inputs=image, fold_weights=True, verify=True, rank=0.9)
    assert model.training
    assert model[0].parametrizations.weight[0]._u.equal(u)
    assert result.training


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.flatten(1).std(1).reshape(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def test_weight_standardisation_is_folded_in_a_graph_and_in_a_program(image: Tensor) -> None:
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


def test_parts_of_one_weight_get_names_of_their_own(image: Tensor) -> None:
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


def test_what_a_weight_is_computed_from_stays_in_the_modules_that_are_called(image: Tensor) -> None:
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


def test_weights_that_depend_on_the_input_or_on_chance_are_never_folded(image: Tensor) -> None:
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
