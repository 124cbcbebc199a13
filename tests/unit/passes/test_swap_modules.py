"""Plans applied by swapping modules: the model keeps its own Python."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.conv import ConvSite
from fxfact.errors import PlanError
from fxfact.passes import DecomposeOptions, decompose_layer, pass_history
from fxfact.passes.swap_modules import swap_modules
from tests.support import Branching, Small, copied_state, has_state


@pytest.fixture
def model() -> Branching:
    torch.manual_seed(0)
    return Branching().eval()


def captured_sites(model: nn.Module, image: Tensor) -> dict[str, ConvSite]:
    return {site.path: site for site in capture(model, image, how="modules").sites}


def planned(model: nn.Module, image: Tensor, **options: Any) -> fxfact.Plan:
    return fxfact.plan(model, "channel_svd", rank=0.5, example_inputs=image, capture="modules", **options)


def test_swap_modules_replaces_planned_modules_in_a_copy(model: Branching, image: Tensor) -> None:
    before = copied_state(model)
    plan = planned(model, image, include="second")
    result = swap_modules(model, captured_sites(model, image), plan, DecomposeOptions())
    assert isinstance(result, Branching)
    assert [type(result.first).__name__, type(result.second).__name__] == ["Conv2d", "FactorizedConv2d"]
    assert type(model.second) is nn.Conv2d
    assert has_state(model, before)
    assert pass_history(model) == ()
    (record,) = pass_history(result)
    assert record.plan == plan
    assert record.relative_error.keys() == {"second"}
    traced = fxfact.factorize(
        Small().eval(), "channel_svd", rank=0.5, example_inputs=image, include="second", capture="trace"
    )
    assert result.second(torch.randn(1, 8, 6, 6)).shape == traced.get_submodule("second")(torch.randn(1, 8, 6, 6)).shape


def test_swap_modules_copies_what_it_does_not_replace(model: Branching, image: Tensor) -> None:
    result = swap_modules(model, captured_sites(model, image), planned(model, image), DecomposeOptions())
    with torch.no_grad():
        for tensor in (*result.parameters(), *result.buffers()):
            tensor.zero_()
    assert all(float(weight.detach().abs().sum()) > 0 for weight in (model.first.weight, model.head.weight))


def test_swap_modules_uses_known_decompositions(model: Branching, image: Tensor) -> None:
    plan, sites = planned(model, image), captured_sites(model, image)
    decision = plan["second"]
    found = decompose_layer(sites["second"].layer, decision, None, None)
    doubled = replace(found, weights=[2 * found.weights[0], *found.weights[1:]])
    usual = swap_modules(model, sites, plan, DecomposeOptions())
    other = swap_modules(model, sites, plan, DecomposeOptions(), known={decision.rewrite: doubled})
    first, expected = next(other.second.parameters()), next(usual.second.parameters())
    torch.testing.assert_close(first, 2 * expected)


def test_swap_modules_refuses_a_plan_for_another_model(model: Branching, image: Tensor) -> None:
    other = Branching().eval()
    other.second = nn.Conv2d(8, 12, 5, padding=2)
    with pytest.raises(PlanError, match=r"second: the plan has Conv2d.*the model Conv2d"):
        swap_modules(other, captured_sites(other, image), planned(model, image), DecomposeOptions())
