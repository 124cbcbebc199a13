"""Adapters are found by the convention of their owners, and in graphs by their names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import fxfact
from fxfact.capture.adapters import find_adapters


class WithAdapters(nn.Module):
    """A convolution with an adapter of two parts, as adapter libraries make it."""

    adapter_layer_names = ("down", "up", "scale")

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Conv2d(4, 16, 3, padding=1)
        self.down = nn.ModuleDict({name: nn.Conv2d(4, 2, 3, padding=1, bias=False) for name in ("one", "two")})
        self.up = nn.ModuleDict({name: nn.Sequential(nn.Conv2d(2, 16, 1)) for name in ("one", "two")})
        self.check = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        for name in self.down:
            result = result + self.up[name](self.down[name](x))
        return self.check(result)


class Aggregating(nn.Module):
    """Has a part named base_layer, but no adapters: as deep layer aggregation has."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.level0, self.level1 = (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.level1(self.level0(self.base_layer(x)))


MEMBERS = {"down.one", "down.two", "up.one", "up.one.0", "up.two", "up.two.0"}


def test_members_of_adapters_are_found_with_their_owner() -> None:
    model = nn.Sequential(nn.Identity(), WithAdapters())
    found = find_adapters(model)
    assert set(found) == {f"1.{member}" for member in MEMBERS}
    assert found["1.up.two.0"] == "the adapter 'two' of 1"
    assert find_adapters(WithAdapters())["down.one"] == "the adapter 'one' of the model"


def test_members_are_found_in_graphs_that_have_lost_the_classes() -> None:
    model, x = nn.Sequential(nn.Identity(), WithAdapters()), torch.randn(1, 4, 6, 6)
    for graph in (fx.symbolic_trace(model), torch.export.export(model, (x,)).module()):
        assert set(find_adapters(graph)) == {f"1.{member}" for member in MEMBERS}


@pytest.mark.parametrize("base", [nn.Conv2d(4, 8, 3), nn.Sequential(nn.Conv2d(4, 8, 3))], ids=["conv", "sequential"])
def test_a_part_of_the_same_name_is_no_adapter(base: nn.Module) -> None:
    model, x = Aggregating(base), torch.randn(1, 4, 8, 8)
    assert not find_adapters(model)
    assert len(fxfact.plan(model, "tucker", rank=0.5, example_inputs=x).rewrites) == 3


def test_without_include_adapters_stay_dense_on_every_front_end() -> None:
    model, x = nn.Sequential(nn.Identity(), WithAdapters()).eval(), torch.randn(1, 4, 6, 6)
    program = torch.export.export(model, (x,))
    plans = [fxfact.plan(model, "tucker", rank=0.6, example_inputs=x, capture=how) for how in ("trace", "modules")]
    for plan in (*plans, fxfact.plan(program, "tucker", rank=0.6)):
        assert [decision.path for decision in plan.rewrites] == ["1.base_layer", "1.check"]
        reasons = {d.path: d.reason for d in plan if d.reason}
        assert reasons["1.down.one"] == (
            "it belongs to the adapter 'one' of 1: merge the adapter first, or name the layer in include="
        )
    plan = fxfact.plan(model, "tucker", rank=2, example_inputs=x, include="1.down.*", allow_growth=True)
    assert [decision.path for decision in plan.rewrites] == ["1.down.one", "1.down.two"]


def test_a_convolution_tied_to_an_adapter_stays_dense_with_it() -> None:
    owner = WithAdapters()
    owner.down["two"].weight = owner.down["one"].weight
    plan = fxfact.plan(nn.Sequential(owner), "tucker", rank=0.6)
    assert {d.path for d in plan if "adapter" in d.reason} == {"0.down.one", "0.down.two", "0.up.one.0", "0.up.two.0"}
