"""The measured loss of plans: that of the network with their kernels, each kernel decomposed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.calibration import DivergenceEvaluator, mean_and_error
from fxfact.capture import Captured, capture
from fxfact.passes import DecomposeOptions, apply_plan
from fxfact.search.plan_loss import PlanLoss
from fxfact.utils import alias_copy
from tests.support import Classifier


@pytest.fixture
def captured(classifier: Classifier, color_images: Tensor) -> Captured:
    return capture(classifier, color_images[:1])


@pytest.fixture
def statistics(classifier: Classifier, color_images: Tensor) -> fxfact.Statistics:
    return fxfact.calibrate(classifier, color_images.split(8))


@pytest.fixture
def decomposed() -> list[int]:
    """Gets one entry for each kernel that is decomposed."""
    return []


@pytest.fixture
def plan_loss(
    captured: Captured, statistics: fxfact.Statistics, color_images: Tensor, decomposed: list[int]
) -> PlanLoss:
    def bar(iterable: Any, *, total: int, desc: str) -> Any:
        decomposed.extend(range(total))
        return iterable

    network = alias_copy(captured.network).eval()
    evaluator = DivergenceEvaluator(network, color_images.split(8), "categorical")
    return PlanLoss(captured, network, statistics, evaluator, DecomposeOptions(progress=bar), on_held_out=False)


def planned(model: nn.Module, x: Tensor, statistics: fxfact.Statistics, rank: float) -> fxfact.Plan:
    return fxfact.plan(model, "channel_svd", rank=rank, calibration=statistics, example_inputs=x[:1])


def test_plan_loss_is_the_divergence_of_the_applied_plan(
    plan_loss: PlanLoss, captured: Captured, statistics: fxfact.Statistics, classifier: Classifier, color_images: Tensor
) -> None:
    plan = planned(classifier, color_images, statistics, 0.4)
    small = fxfact.apply(plan, classifier, calibration=statistics)
    evaluator = DivergenceEvaluator(classifier, color_images.split(8), "categorical")
    expected = evaluator.divergences(small)
    torch.testing.assert_close(plan_loss.divergences(plan), expected, rtol=1e-3, atol=1e-6)
    assert plan_loss.mean(plan) == pytest.approx(mean_and_error(plan_loss.divergences(plan))[0])
    assert plan_loss.mean(plan) > 0
    again = apply_plan(plan, captured, DecomposeOptions(), statistics=statistics, known=plan_loss.decompositions)
    assert isinstance(again, nn.Module)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


def test_plan_loss_decomposes_each_kernel_once_and_keeps_divergences(
    plan_loss: PlanLoss,
    statistics: fxfact.Statistics,
    classifier: Classifier,
    color_images: Tensor,
    decomposed: list[int],
) -> None:
    plan = planned(classifier, color_images, statistics, 0.4)
    first = plan_loss.divergences(plan)
    assert len(decomposed) == len(plan.rewrites) == len(plan_loss.decompositions) == 3
    assert plan_loss.divergences(plan) is first
    edited = plan.edited("up", rank=1)
    assert not plan_loss.divergences(edited).equal(first)
    assert len(decomposed) == len(plan_loss.decompositions) == 4  # only the edited one was decomposed again
    assert plan_loss.divergences(plan) is first


def test_plan_loss_of_a_dense_plan_is_zero_whatever_was_measured_before(
    plan_loss: PlanLoss, statistics: fxfact.Statistics, classifier: Classifier, color_images: Tensor
) -> None:
    plan = planned(classifier, color_images, statistics, 0.3)
    dense = plan
    for decision in plan.rewrites:
        dense = dense.edited(decision.path, skip="dense")
    assert plan_loss.mean(plan) > 0
    assert plan_loss.mean(dense) == pytest.approx(0.0, abs=1e-9)


def test_plan_loss_calls_a_plan_clearly_better_only_beyond_chance(
    plan_loss: PlanLoss, statistics: fxfact.Statistics, classifier: Classifier, color_images: Tensor
) -> None:
    mild, strong = (planned(classifier, color_images, statistics, rank) for rank in (0.8, 1))
    assert plan_loss.is_clearly_better(mild, strong)
    assert not plan_loss.is_clearly_better(strong, mild)
    assert not plan_loss.is_clearly_better(mild, mild)


def test_plan_loss_leaves_the_captured_network_unchanged(
    plan_loss: PlanLoss,
    captured: Captured,
    statistics: fxfact.Statistics,
    classifier: Classifier,
    color_images: Tensor,
) -> None:
    before = {name: value.clone() for name, value in captured.network.state_dict().items()}
    plan_loss.mean(planned(classifier, color_images, statistics, 0.4))
    assert all(value.equal(before[name]) for name, value in captured.network.state_dict().items())


def test_plan_loss_measures_convolutions_that_share_a_weight(color_images: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3)
            self.three, self.head = nn.Conv2d(12, 12, 3, stride=2), nn.Linear(12, 4)
            self.three.weight = self.two.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.three(torch.relu(self.two(self.one(x))))).mean((2, 3)))

    torch.manual_seed(0)
    model = Tied().eval()
    captured, statistics = capture(model, color_images[:1]), fxfact.calibrate(model, color_images.split(8))
    plan = planned(model, color_images, statistics, 0.5)
    assert [decision.path for decision in plan.rewrites] == ["one", "two", "three"]
    network = alias_copy(captured.network).eval()
    evaluator = DivergenceEvaluator(network, [color_images], "categorical")
    plan_loss = PlanLoss(captured, network, statistics, evaluator, DecomposeOptions(), on_held_out=True)
    small = fxfact.apply(plan, model, calibration=statistics)
    expected = DivergenceEvaluator(model, [color_images], "categorical").divergences(small)
    torch.testing.assert_close(plan_loss.divergences(plan), expected, rtol=1e-3, atol=1e-6)
    assert len(plan_loss.decompositions) == 2
    assert plan_loss.on_held_out


class Running(nn.Module):
    """Subtracts a running mean, which every call changes."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 5)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        self.mean.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
        return self.head(x - self.mean)


def test_plan_loss_of_a_network_with_state_does_not_depend_on_earlier_plans(color_images: Tensor) -> None:
    torch.manual_seed(0)
    model, batches = Running().eval(), color_images.split(8)
    captured, statistics = capture(model, color_images[:1]), fxfact.calibrate(model, batches)
    assert captured.frontend == "modules"
    plans = [planned(model, color_images, statistics, rank) for rank in (0.2, 0.6)]

    def measured() -> PlanLoss:
        network = alias_copy(captured.network).eval()
        evaluator = DivergenceEvaluator(network, batches, "categorical")
        return PlanLoss(captured, network, statistics, evaluator, DecomposeOptions(), on_held_out=False)

    both = measured()
    assert [both.divergences(plan).equal(measured().divergences(plan)) for plan in plans] == [True, True]
    dense = plans[0].edited("conv", skip="to measure the original")
    assert both.mean(dense) == 0.0
    assert not model.mean.any()
