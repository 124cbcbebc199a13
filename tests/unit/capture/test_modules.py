"""The front end 'modules': the model keeps its Python code, and its convolutions are replaced."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from fxfact.errors import ArgumentError, PlanError, WeightError
from tests.support import Branching, Small, apart, factorized


def test_replacement_has_the_attributes_and_the_output_of_the_convolution(image: Tensor) -> None:
    model = Branching().eval()
    result = factorized(model, image)
    assert type(result) is Branching
    for name in ("first", "second"):
        old, new = getattr(model, name), getattr(result, name)
        assert isinstance(new, nn.Conv2d)
        for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(new, attribute) == getattr(old, attribute)
        assert (new.padding_mode, new.transposed, new.output_padding) == ("zeros", False, (0, 0))
        assert (new.weight.shape, new.weight.dtype) == (old.weight.shape, old.weight.dtype)
        assert (new.bias is None) == (old.bias is None)
        x = torch.randn(2, old.in_channels, 7, 7)
        assert apart(F.conv2d(x, new.weight, new.bias, new.stride, new.padding), new(x)) < 1e-5
        with pytest.raises(ArgumentError, match=r"stride of a factorized convolution.* its stages 0, 1, 2"):
            new.stride = old.stride
        with pytest.raises(WeightError, match=rf"^{name} \(FactorizedConv2d\).* its stages 0, 1, 2"):
            new.weight = old.weight


def test_modules_result_has_the_names_of_a_graph_and_can_be_copied_trained_and_inspected(image: Tensor) -> None:
    result = factorized(Branching().eval(), image)
    assert set(result.state_dict()) == set(factorized(Small(), image).state_dict())
    twin = copy.deepcopy(result)
    twin.load_state_dict(result.state_dict())
    assert twin(image).equal(result(image))
    assert fxfact.plan_of(twin) == fxfact.plan_of(result)
    result.train()(image).square().mean().backward()
    assert all(parameter.grad is not None for parameter in result.parameters())
    shown = str(fxfact.inspect(result, example_inputs=image))
    assert "tucker" in shown
    assert "Conv2d(4→" in shown
    changes = fxfact.diff(Branching(), result).table()
    assert "first.0: Conv2d(" in changes


def test_modules_keeps_hooks(small: Small, image: Tensor) -> None:
    calls: list[str] = []
    small.register_forward_hook(lambda module, args, output: output * 2)
    small.second.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    result = factorized(small, image)
    assert fxfact.plan_of(result).capture == "modules"
    assert len(fxfact.plan_of(result).rewrites) == 2
    calls.clear()
    result(image)
    assert calls == ["FactorizedConv2d"]


def test_modules_shares_the_chain_of_tied_and_shared_convolutions(image: Tensor) -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(4, 4, 3, padding=1)
            self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.two.weight = self.one.weight
            self.three = self.one
            self.hidden = [self.one]

        def forward(self, x: Tensor) -> Tensor:
            x = x if x.sum() > 1e9 else x + 1
            return self.three(self.two(self.hidden[0](x)))

    result = factorized(Sharing(), image)
    plan = fxfact.plan_of(result)
    assert [(d.path, d.tied_to) for d in plan.rewrites] == [("one", None), ("two", "one")]
    assert result.three is result.one is result.hidden[0]
    assert result.get_submodule("two.0").weight is result.get_submodule("one.0").weight
    assert sum(p.numel() for p in result.parameters()) == plan.after.params

    class HeldByALinear(Sharing):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Linear(1, 1)
            self.embedding.weight = self.one.weight

    left = {d.path: d.reason for d in fxfact.plan(HeldByALinear(), example_inputs=image)}
    assert (left["one"], left["two"]) == ("its weight is also held by embedding",) * 2
    assert "its attributes describe a weight of (1, 1)" in left["embedding"]


def test_modules_saves_tied_convolutions_that_are_called_in_reverse_order(image: Tensor, tmp_path: Path) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self.one.weight = self.two.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.two(x if x.sum() > 1e9 else x + 1))

    model = Backwards()
    small = factorized(model, image)
    plan = fxfact.plan_of(small)
    assert (plan.capture, plan["one"].tied_to) == ("modules", "two")
    torch.testing.assert_close(fxfact.apply(plan, model)(image), small(image))
    fxfact.save(small, tmp_path / "small.pt")
    torch.testing.assert_close(fxfact.load(tmp_path / "small.pt", Backwards())(image), small(image))


def test_modules_plan_is_applied_only_to_a_model_that_it_fits(image: Tensor) -> None:
    plan = fxfact.plan(Branching(), example_inputs=image)
    loaded = fxfact.Plan.from_json(plan.to_json())
    assert loaded == plan
    assert fxfact.apply(loaded, Branching())(image).shape == (3, 5)

    class Other(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(8, 14, 3)

    with pytest.raises(PlanError, match="second: the plan has"):
        fxfact.apply(plan, Other())


def test_convolutions_keep_other_tensors_and_modules_that_they_hold(image: Tensor) -> None:
    class Laden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self.one.gain = nn.Parameter(torch.rand(4, 1, 1))
            self.two.side = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x) * self.one.gain
            return self.two(x) + self.two.side(x)

    model = Laden()
    for how in ("trace", "modules"):
        result = factorized(model, image, capture=how, verify=True)
        assert {decision.path for decision in fxfact.plan_of(result).rewrites} == {"one", "two", "two.side"}
        assert result.get_submodule("one").gain.equal(model.one.gain)
        assert copy.deepcopy(result)(image).equal(result(image))
        twin = fxfact.apply(fxfact.plan_of(result), model, weights="empty")
        twin.load_state_dict(result.state_dict())
        assert twin(image).equal(result(image))
    assert result.get_submodule("two.side.0").weight is not None


def test_replacement_of_a_subclass_runs_in_several_threads_at_once(image: Tensor) -> None:
    meetings = [threading.Barrier(1)]

    class Meeting(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            meetings[-1].wait(timeout=60)
            output = F.conv2d(input, self.weight, self.bias, self.stride, self.padding)
            meetings[-1].wait(timeout=60)
            return output

    small = factorized(nn.Sequential(Meeting(4, 8, 3)), image, capture="modules")
    expected = small(image)
    meetings.append(threading.Barrier(2))
    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(small, [image] * 8):
            assert torch.equal(found, expected)
