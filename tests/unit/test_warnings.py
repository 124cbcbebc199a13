"""What is said without being asked: an unknown accuracy, and a network that became slower."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.errors import TimingError
from fxfact.search import warn_if_slower
from fxfact.utils import Timer


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(400, 5))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(0))


# Accuracy


@pytest.mark.parametrize("call", [fxfact.plan, fxfact.factorize])
@pytest.mark.parametrize("how", [{}, {"rank": 0.4}, {"budget": fxfact.Params(0.5)}])
def test_ranks_without_data_warn_once(call: Callable[..., Any], how: dict[str, Any], network: nn.Module) -> None:
    with pytest.warns(fxfact.AccuracyWarning, match="without data.*calibration=batches.*fxfact.Macs") as caught:
        found = call(network, **how)
    assert len(caught) == 1
    plan = found if isinstance(found, fxfact.Plan) else fxfact.plan_of(found)
    assert "without calibration data" in str(plan).splitlines()[-1]


@pytest.mark.parametrize("how", [{}, {"rank": 0.4}, {"budget": fxfact.Params(0.5)}])
def test_ranks_with_data_do_not_warn_of_missing_data(how: dict[str, Any], network: nn.Module, images: Tensor) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = fxfact.factorize(network, calibration=images.split(4), **how)
    assert not any("without data" in str(warning.message) for warning in caught)
    assert "without calibration data" not in str(fxfact.plan_of(small))


def test_a_plan_that_changes_nothing_does_not_warn_of_accuracy(network: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxfact.plan(network, exclude="*")


def test_the_compiler_backend_warns_and_says_what_to_compile(network: nn.Module, images: Tensor) -> None:
    compiled = torch.compile(network, backend=fxfact.backend(inner="eager"))
    with torch.no_grad(), pytest.warns(fxfact.AccuracyWarning, match=r"Compile fxfact\.factorize"):
        compiled(images)


def test_data_without_ranks_and_budget_give_half_of_the_macs(network: nn.Module, images: Tensor) -> None:
    given = {"calibration": images.split(4)}
    assert fxfact.plan(network, **given) == fxfact.plan(network, budget=fxfact.Macs(0.5), **given)
    assert fxfact.plan(network, "tucker", **given) == fxfact.plan(network, "tucker", budget=fxfact.Macs(0.5), **given)


# Speed


class Turns(Timer):
    """Gives these times of the original and of the factorized network in turns."""

    def __init__(self, original: Sequence[float], factorized: Sequence[float]) -> None:
        self._times = [list(original), list(factorized)]

    def turns(self, calls: Sequence[Callable[[], Any]], **_: Any) -> list[list[float]]:
        for call in calls:
            call()
        return self._times


def test_a_network_that_became_slower_is_named_with_its_times(network: nn.Module, images: Tensor) -> None:
    small = fxfact.factorize(network, rank=0.5)
    captured = capture(network, images)
    with pytest.warns(fxfact.SpeedWarning, match=r"2 → 3 ms for inputs of shape \(16, 3, 9, 9\).*fxfact.Latency"):
        warn_if_slower(captured, small, timer=Turns([2.0, 4.0], [3.0, 6.0]))
    plan = fxfact.plan_of(small)
    assert plan.measured_ms == (2.0, 3.0)
    assert "2 → 3 ms, SLOWER than the original" in str(plan)
    assert "measured_ms" not in plan.to_json()


@pytest.mark.parametrize(
    ("slow", "shapes"), [({1}, r"\(1, 3, 9, 9\)"), ({8}, r"\(8, 3, 9, 9\)"), ({1, 8}, r"\(1, .* and .*\(8, ")]
)
def test_a_whole_batch_of_the_data_is_timed_besides_the_first_sample(
    slow: set[int], shapes: str, network: nn.Module, images: Tensor
) -> None:
    class SlowAt(Timer):
        def turns(self, calls: Sequence[Callable[[], Any]], **_: Any) -> list[list[float]]:
            return [[2.0], [3.0 if len(calls[0]()) in slow else 1.0]]

    small = fxfact.factorize(network, rank=0.5)
    with pytest.warns(fxfact.SpeedWarning, match=f"for inputs of shape {shapes}"):
        warn_if_slower(capture(network, images[:1]), small, images[:8], SlowAt())
    assert fxfact.plan_of(small).measured_ms == (2.0, 3.0)


def test_a_slow_network_is_timed_on_a_part_of_the_batch(network: nn.Module, images: Tensor) -> None:
    sizes = []

    class Slow(Timer):
        def turns(self, calls: Sequence[Callable[[], Any]], **_: Any) -> list[list[float]]:
            sizes.append(len(calls[0]()))
            return [[25.0 * sizes[-1]], [1.0]]

    warn_if_slower(capture(network, images[:1]), fxfact.factorize(network, rank=0.5), images, Slow())
    assert sizes[0] == 1
    assert 1 < sizes[1] < len(images)


@pytest.mark.parametrize(
    ("original", "factorized"),
    [([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]), ([2.0, 2.0, 2.0], [2.05, 2.05, 2.05]), ([2.0, 2.0, 2.0], [2.0, 9.0, 9.0])],
    ids=["faster", "as fast", "disturbed"],
)
def test_a_network_that_is_not_clearly_slower_does_not_warn(
    original: list[float], factorized: list[float], network: nn.Module, images: Tensor
) -> None:
    small = fxfact.factorize(network, rank=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_slower(capture(network, images), small, timer=Turns(original, factorized))
    assert fxfact.plan_of(small).measured_ms is None


def test_a_network_that_cannot_be_timed_is_left_alone(network: nn.Module, images: Tensor) -> None:
    class Broken(Timer):
        def turns(self, calls: Sequence[Callable[[], Any]], **_: Any) -> list[list[float]]:
            raise TimingError("no clock")

    small = fxfact.factorize(network, rank=0.5)
    warn_if_slower(capture(network, images), small, timer=Broken())
    assert fxfact.plan_of(small).measured_ms is None


def test_timing_leaves_modes_and_buffers_as_they_are(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    small = fxfact.factorize(network, rank=0.5, example_inputs=images)
    assert network.training
    assert small.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    norm = next(module for module in small.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 0
