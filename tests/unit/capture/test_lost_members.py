"""Methods and properties of a model's class that a graph would lose: the model is captured by its modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from tests.support import FakeTimer, Small, factorized


class Detector(nn.Module):
    """Modules addressed by index, a head that knows its strides, and methods that users call after training."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()),
            nn.Conv2d(8, 12, 3, stride=2),
        ]
        self.model, self.names = nn.ModuleList(blocks), {0: "cat"}
        self.make_weights()
        with torch.no_grad():
            self.stride = torch.tensor([16 / self._forward_once(torch.zeros(1, 4, 16, 16)).shape[-1]])

    def make_weights(self) -> None:
        nn.init.kaiming_normal_(self.model[1].weight)

    def _forward_once(self, x: Tensor) -> Tensor:
        for module in self.model:
            x = module(x)
        return x

    def scaled(self, x: Tensor) -> Tensor:
        return x * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self._forward_once(x))

    def fuse(self) -> Detector:
        """Fold the norm into the convolution before it."""
        conv, norm, act = self.model[0]
        self.model[0] = nn.Sequential(nn.utils.fusion.fuse_conv_bn_eval(conv, norm), act)
        return self

    @property
    def device(self) -> torch.device:
        return self.model[1].weight.device

    @classmethod
    def from_scratch(cls) -> Detector:
        return cls()


class Frozen(Small):
    """Keeps its norm in evaluation mode."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.eval()
        return self


def test_class_with_methods_is_captured_by_its_modules(image: Tensor) -> None:
    model = Detector().eval()
    result = factorized(model, image)
    assert type(result) is Detector
    plan = fxfact.plan_of(result)
    assert plan.refused == ("trace: the graph would lose fuse, device, from_scratch of Detector",)
    assert (result.names, result.device, result.stride.equal(model.stride)) == ({0: "cat"}, image.device, True)
    plan = fxfact.plan(model, capture="trace", example_inputs=image)
    assert (plan.capture, plan.refused) == ("trace", ())


def test_overridden_method_of_a_module_counts_wherever_it_is(image: Tensor) -> None:
    for model in (Frozen(), nn.Sequential(Frozen()), nn.Sequential(nn.Sequential(nn.Identity(), Frozen()))):
        result: Any = factorized(model, image)
        plan = fxfact.plan_of(result)
        assert plan.capture == "modules"
        assert "train of" in plan.refused[0]
        norm = next(module for module in result.train().modules() if isinstance(module, nn.BatchNorm2d))
        assert not norm.training


def test_class_with_helpers_only_is_traced(image: Tensor) -> None:
    class Helping(Small):
        """Private helpers, helpers that forward or the constructor calls, and what only describes the module."""

        size = 5

        def __init__(self) -> None:
            super().__init__()
            self._set_up()

        def _set_up(self) -> None:
            self.init_weights()

        def init_weights(self) -> None:
            nn.init.ones_(self.head.weight)

        def features(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.first(x)))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.second(self.features(x))).mean((2, 3)))

        def extra_repr(self) -> str:
            return "size=5"

        def _pool(self) -> None:
            pass

    for model in (Helping(), nn.Sequential(Helping()), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())):
        plan = fxfact.plan(model, example_inputs=image)
        assert (plan.capture, plan.refused) == ("trace", ())


def test_inner_module_with_methods_is_traced(image: Tensor) -> None:
    """Its methods are missing in the result, which raises an error and changes nothing without notice."""
    result: Any = factorized(nn.Sequential(Detector()), image)
    assert fxfact.plan_of(result).capture == "trace"
    with pytest.raises(AttributeError, match="fuse"):
        result.get_submodule("0").fuse()


def test_graph_is_kept_and_the_loss_is_told_where_modules_reach_fewer(image: Tensor) -> None:
    class Functional(Detector):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(
                super().forward(x), self.model[1].weight[:, :, :1, :1].repeat(1, 2, 1, 1)[:, :12]
            )

    class Sharing(Detector):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 12, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(super().forward(x), self.weight)

    plan = fxfact.plan(Sharing(), example_inputs=image)
    assert (plan.capture, len(plan.rewrites)) == ("trace", 3)
    assert plan.refused == ("modules: 2 layers, not 3. The graph loses fuse, device, from_scratch of Sharing",)


def test_loss_is_told_where_modules_are_not_tried(image: Tensor) -> None:
    lost = "The graph loses fuse, device, from_scratch of Detector"
    plan = fxfact.plan(Detector())
    assert plan.refused == (f"modules: not tried, without a run on example_inputs. {lost}",)
    assert plan.refused[0] in str(plan)
    budget = fxfact.Latency(1.0, timer=FakeTimer())
    plan = fxfact.plan(Detector(), "tucker", budget=budget, example_inputs=image)
    assert plan.capture == "trace"  # where batch norms can be folded
    assert plan.refused == (f"modules: not tried, because capture='auto' prefers a graph here. {lost}",)


def test_long_lists_of_lost_members_are_cut() -> None:
    methods = {f"method_{k}": lambda self: None for k in range(9)}
    captured = capture(type("Long", (Small,), methods)())
    assert captured.refused[0].endswith("method_3, method_4 and 4 more methods or properties of Long")
    assert len(captured.lost_members) == 9


def test_statistics_of_one_front_end_serve_plans_of_the_other(image: Tensor) -> None:
    model = Detector().eval()
    ways: tuple[Any, ...] = ("trace", "modules")
    for how, other in (ways, ways[::-1]):
        statistics = fxfact.calibrate(model, [image], likelihood="gaussian", capture=how)
        options = {"calibration": statistics, "example_inputs": image, "capture": other}
        result = fxfact.factorize(model, "channel_svd", rank=0.9, **options)
        assert len(fxfact.plan_of(result).rewrites) == 2


def test_network_with_a_fuse_method_is_fused_after_it_was_factorized(image: Tensor) -> None:
    model = Detector().eval()
    result = fxfact.factorize(model, rank=0.5, exclude="model.0.*", example_inputs=image)
    expected = result(image)
    assert result.fuse() is result
    assert result(image).allclose(expected, atol=1e-5)
    assert len(list(result.model[0])) == 2
