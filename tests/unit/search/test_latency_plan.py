"""Budgets that are refused early, times that contradict each other, and layers that nothing can replace."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import BudgetError
from fxfact.planning import Budget
from tests.support import FakeTimer, ThreeConvs, millions_of_macs

Calls = Sequence[Callable[[], Any]]


def contradicting(times: int) -> Callable[[Calls], list[float]]:
    """Networks of chains take a hundredth of the time of the dense one so many times, then as many as their MACs."""
    left = iter(range(times))

    def side_by_side(calls: Calls) -> list[float]:
        found = list(map(millions_of_macs, calls))
        if len(calls) == 2 and next(left, None) is not None:
            found[1] = 0.01 * found[0]
        return found

    return side_by_side


@pytest.fixture
def planned(three_convs: ThreeConvs, x: Tensor, error_curves: fxfact.ErrorCurveCache) -> Callable[..., fxfact.Plan]:
    """Returns the plan for a network of three convolutions within a budget."""

    def plan(budget: Budget, methods: Any = ("spatial_svd", "channel_svd"), **given: Any) -> fxfact.Plan:
        given = {"example_inputs": x, "error_curves": error_curves, **given}
        return fxfact.plan(three_convs, list(methods), budget=budget, kinds="conv", **given)

    return plan


def least_shares(plan: fxfact.Plan) -> list[float]:
    """What chains are foreseen to take, as shares of their convolutions."""
    return [chain / dense for dense, chain in (d.latencies_ms for d in plan.rewrites if d.latencies_ms) if dense]


# Times of a network that contradict those of its layers


@pytest.mark.parametrize(("times", "share"), [(1, 0.5), (2, 0.3)])
def test_network_that_measures_faster_than_its_chains_can_be_is_measured_again(
    times: int, share: float, planned: Callable[..., fxfact.Plan]
) -> None:
    undisturbed = planned(fxfact.Latency(share, timer=FakeTimer()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", fxfact.AccuracyWarning)  # the ranks are chosen without data
        plan = planned(fxfact.Latency(share, timer=FakeTimer(side_by_side=contradicting(times))))
    assert plan.after.macs is not None
    assert plan.network.macs is not None
    assert min(least_shares(plan)) > 0.05
    assert plan.after.macs == pytest.approx(undisturbed.after.macs, rel=0.15)


def test_layers_are_measured_again_if_the_network_still_contradicts_them(
    planned: Callable[..., fxfact.Plan], cache_folder: Path
) -> None:
    """The network takes four times as long as its layers at first, as if the machine had been busy."""
    first_attempt = iter(range(6))  # the smallest ranks of three layers, then the others

    def turns(calls: Calls) -> list[list[float]]:
        scale = 0.25 if next(first_attempt, None) is not None else 1.0
        return [[scale * millions_of_macs(call)] * 3 for call in calls]

    timer = FakeTimer(turns, lambda calls: list(map(millions_of_macs, calls)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", fxfact.AccuracyWarning)  # the ranks are chosen without data
        plan = planned(fxfact.Latency(0.5, timer=timer))
    assert plan.after.ms is not None
    assert plan.network.ms is not None
    assert 0.4 * plan.network.ms < plan.after.ms <= 0.5 * 1.03 * plan.network.ms
    assert min(least_shares(plan)) > 0.05
    (path,) = cache_folder.iterdir()
    longest = max(ms for times in json.loads(path.read_text())["ms"].values() for ms in times.values())
    assert longest > 3  # the largest convolution has 4.1 million MACs


@pytest.mark.parametrize(("share", "data"), [(0.5, True), (0.7, False)])
def test_times_that_always_contradict_each_other_warn_and_the_plan_is_made_by_macs(
    share: float, data: bool, planned: Callable[..., fxfact.Plan], x: Tensor, cache_folder: Path
) -> None:
    given = {"calibration": x.split(1)} if data else {}
    with pytest.warns(UserWarning, match=rf"under load.*network contradict.*layers.*{share:.2f} of the MACs"):
        plan = planned(fxfact.Latency(share, timer=FakeTimer(side_by_side=contradicting(999))), **given)
    by_macs = planned(fxfact.Macs(share), **given)
    assert [d.rank for d in plan] == [d.rank for d in by_macs]
    assert not cache_folder.exists()  # such times are not kept


def test_chains_that_take_little_time_alone_contradict_nothing(planned: Callable[..., fxfact.Plan]) -> None:
    """At rank 1 they have less than 0.05 of the MACs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", fxfact.AccuracyWarning)  # the ranks are chosen without data
        plan = planned(fxfact.Latency(0.02, timer=FakeTimer()), ["tt"])
    assert plan.after.ms is not None
    assert plan.network.ms is not None
    assert plan.after.ms <= 0.02 * 1.03 * plan.network.ms
    assert min(least_shares(plan)) < 0.02


# Budgets that cannot be met


def never_read() -> Iterator[Tensor]:
    pytest.fail("data were read")
    yield torch.empty(0)


@pytest.mark.parametrize(
    "budget",
    [fxfact.Macs(0.005), fxfact.Macs(at_most=900), fxfact.Params(0.005), fxfact.Params(at_most=500)],
    ids=["MACs", "number of MACs", "parameters", "number of parameters"],
)
@pytest.mark.parametrize("data", [True, False])
def test_budget_that_cannot_be_met_is_refused_before_data_are_read(
    budget: Budget, data: bool, planned: Callable[..., fxfact.Plan]
) -> None:
    curves = fxfact.ErrorCurveCache()
    with pytest.raises(BudgetError, match=r"can go down to (?:about )?[\d.,]+ \(0\.\d+ of [\d.,]+\)") as caught:
        planned(budget, error_curves=curves, calibration=never_read() if data else None)
    assert caught.value.least is not None
    assert caught.value.least > 0
    assert not len(curves)


@pytest.mark.parametrize("bound", [{"fraction": 0.005}, {"at_most_ms": 0.02}], ids=["share", "milliseconds"])
@pytest.mark.parametrize("data", [True, False])
def test_milliseconds_that_cannot_be_met_are_refused_before_errors_are_computed(
    bound: dict[str, float], data: bool, planned: Callable[..., fxfact.Plan], three_convs: ThreeConvs, x: Tensor
) -> None:
    curves, timer = fxfact.ErrorCurveCache(), FakeTimer()
    three_convs.second.weight.data[0] = float("nan")  # would be refused when errors are computed
    given = {"calibration": fxfact.calibrate(ThreeConvs().eval(), [x])} if data else {}
    with pytest.raises(BudgetError, match=r"the budget is 0\.0\d+ ms.*can go down to about 0\.867 \(0\.122 of 7\.095"):
        planned(fxfact.Latency(**bound, timer=timer), error_curves=curves, **given)
    assert not len(curves)
    assert timer.calls_timed[-3:] == [2, 2, 2]  # the network of the fastest chains, three times
    assert max(timer.calls_timed[1:]) <= 5  # of each layer the dense one and two ranks of each factorization


def test_milliseconds_that_a_trial_meets_are_not_refused_early(planned: Callable[..., fxfact.Plan]) -> None:
    """In the network chains save more than alone."""
    alone = FakeTimer(
        lambda calls: [[1.0] * 3, *[[0.5] * 3] * (len(calls) - 1)], lambda calls: [4.0, 2.2, 4, 4][: len(calls)]
    )
    plan = planned(fxfact.Latency(at_most_ms=1.25, timer=alone))
    assert plan.after.ms == pytest.approx(2.2 * 2.2 / 4.0)


# Layers that nothing can replace


class ManyKinds(nn.Module):
    """A gate without gradient, a depthwise, a tied, an excluded and a small layer, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        nn.init.constant_(self.gate.bias, 100.0)
        self.excluded, self.depthwise = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
        self.wide, self.tied = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.tied.weight = self.wide.weight
        self.unused = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x * nn.functional.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = self.depthwise(self.excluded(x)).relu()
        return self.tied(self.wide(x).relu()).mean((2, 3))


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("frontend", ["trace", "modules"])
@pytest.mark.parametrize(
    "budget",
    [
        fxfact.Latency(0.9, timer=FakeTimer()),
        fxfact.Latency(at_most_ms=3.0, timer=FakeTimer()),
        fxfact.Macs(0.9),
        fxfact.Params(0.9),
    ],
    ids=["share of the time", "milliseconds", "MACs", "parameters"],
)
def test_budgets_leave_layers_that_nothing_can_replace_dense_with_their_reasons(
    budget: Budget, frontend: Any, data: bool, error_curves: fxfact.ErrorCurveCache
) -> None:
    torch.manual_seed(0)
    model, x = ManyKinds().eval(), torch.randn(8, 3, 14, 14)
    plan = fxfact.plan(
        model,
        ["channel_svd", "svd"],
        budget=budget,
        calibration=x.split(2) if data else None,
        example_inputs=x,
        exclude="excluded",
        capture=frontend,
        error_curves=error_curves,
    )
    assert budget.amount(plan.after) <= 1.03 * budget.allowed(plan.network)
    assert plan.rewrites
    reasons = {decision.path: decision.reason for decision in plan if decision.reason}
    assert reasons["excluded"] == "excluded"
    assert "single output channel" in reasons["depthwise"]
    if data:
        assert reasons["gate"] == "no gradient reached it in calibration"
    if frontend == "modules":
        assert reasons["unused"] == "forward does not call it"


def test_latency_with_only_layers_that_nothing_can_replace_is_refused_or_dense() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)).eval(),
        torch.randn(2, 8, 9, 9),
    )
    with pytest.raises(BudgetError, match=r"can go down to .*\(1\.000 of"):
        fxfact.plan(model, "channel_svd", budget=fxfact.Latency(0.5, timer=FakeTimer()), example_inputs=x)
    plan = fxfact.plan(model, "channel_svd", budget=fxfact.Latency(1.0, timer=FakeTimer()), example_inputs=x)
    assert not plan.rewrites


# Networks without data


class Tower(nn.Module):
    """Untrained convolutions of growing width."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64, 128)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 1 + (b > a), 1, bias=False) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).relu()
        return x


def with_traffic(calls: Calls) -> list[float]:
    """A chain takes time for its MACs, and for the maps that its stages write."""
    found = []
    for call in calls:
        with _Written() as written:
            macs = millions_of_macs(call)
        found.append(0.02 * macs + written.count / 4e5)
    return found


class _Written(torch.utils._python_dispatch.TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if "convolution" in str(func):
            self.count += found.numel()
        return found


@pytest.mark.parametrize(
    "budget",
    [
        fxfact.Latency(0.6, timer=FakeTimer(lambda calls: [[ms] * 3 for ms in with_traffic(calls)], with_traffic)),
        fxfact.Macs(0.4),
        fxfact.Params(0.3),
    ],
    ids=["milliseconds", "MACs", "parameters"],
)
def test_budgets_without_data_give_no_layer_up_for_others(budget: Budget) -> None:
    torch.manual_seed(0)
    model, x = Tower().eval(), torch.randn(1, 3, 32, 32)
    plan = fxfact.plan(model, ["spatial_svd", "channel_svd"], budget=budget, example_inputs=x)
    assert plan.predicted_loss_increase is None
    errors = [
        d.factorization.error_estimates(fxfact.conv.read_conv(model.get_submodule(d.path)), [d.rank])[0]
        for d in plan.rewrites
    ]
    assert len(errors) > 1
    assert max(errors) < 0.8
