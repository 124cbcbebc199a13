"""Weights that are computed from other parameters are listed, or folded with fold_weights=True."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxfact
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
def test_computed_weight_is_listed_or_folded(way: str, branches: bool, image: Tensor) -> None:
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


def test_folded_weight_has_its_value_in_evaluation_mode(image: Tensor) -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 8, 3))).train()
    u = model[0].parametrizations.weight[0]._u.clone()
    result = fxfact.factorize(model, example_inputs=image, fold_weights=True, verify=True, rank=0.9)
    assert model.training
    assert model[0].parametrizations.weight[0]._u.equal(u)
    assert result.training
