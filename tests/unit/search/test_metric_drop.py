"""Budgets in the caller's own metric: what the result keeps, and functions that misbehave."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.errors import ArgumentError, ArgumentTypeError, BudgetError, MetricError
from fxfact.passes import DecomposeOptions
from fxfact.planning import BudgetAllocator, ByPath, MeasuredPoint, SearchScope, parse_factorizations
from fxfact.search import CalibrationData, search
from fxfact.search.metric_drop import largest_mean
from tests.support import FakeTimer, copied_state, has_state, millions_of_macs

X = F.avg_pool2d(torch.randn(64, 3, 11, 11, generator=torch.Generator().manual_seed(0)), 3, 1, 1)
Evaluate = Callable[[nn.Module], Any]


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convs = [nn.Conv2d(n, m, 3) for n, m in ((3, 12), (12, 16), (16, 20))]
        layers = [layer for conv in convs for layer in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)).eval()


class Agreement:
    """How near a network is to the model: minus the squared error of each sample, or its mean."""

    def __init__(self, model: nn.Module, *, mean: bool = False) -> None:
        self._expected, self._mean = model(X).detach(), mean
        self.networks: list[nn.Module] = []

    def __call__(self, network: nn.Module) -> Any:
        self.networks.append(network)
        assert not network.training
        scores = -(network(X) - self._expected).square().mean(1)
        return float(scores.detach().mean()) if self._mean else scores


@pytest.fixture
def planned(model: nn.Module, error_curves: fxfact.ErrorCurveCache) -> Callable[..., fxfact.Plan]:
    """Returns the plan for a metric."""

    def plan(evaluate: Any, at_most_drop: float = 1e-4, *, call: Any = fxfact.plan, **options: Any) -> Any:
        given = {name: options.pop(name) for name in ("calibration", "example_inputs") if name in options}
        metric = fxfact.Metric(evaluate, at_most_drop, **options)
        given = {"calibration": X.split(16), **given}
        return call(model, "channel_svd", budget=metric, likelihood="categorical", error_curves=error_curves, **given)

    return plan


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("data", [True, False])
def test_result_is_the_cheapest_network_measured_within_the_bound(
    model: nn.Module, error_curves: fxfact.ErrorCurveCache, mean: bool, data: bool
) -> None:
    before, evaluate = copied_state(model), Agreement(model, mean=mean)
    data_options: dict[str, Any] = {"calibration": X.split(16), "likelihood": "categorical"} if data else {}
    small = fxfact.factorize(
        model,
        "channel_svd",
        budget=fxfact.Metric(evaluate, at_most_drop=1e-4),
        example_inputs=X[:1],
        error_curves=error_curves,
        **data_options,
    )
    plan = fxfact.plan_of(small)
    dense, *others = plan.measured_points
    assert dense == MeasuredPoint(plan.network, 0.0, 0.0, 0.0, drop_at_most=0.0)
    assert 2 <= len(others) <= 6
    within = [point for point in others if (point.drop_at_most or 0.0) <= 1e-4]
    chosen = min(within, key=lambda point: point.cost.macs or 0)
    assert chosen.cost == plan.after
    assert len(evaluate.networks) == 2 + len(others)
    metric = evaluate(small)
    assert chosen.metric == pytest.approx(float(torch.as_tensor(metric).mean()), rel=1e-3)
    assert (chosen.drop_at_most == pytest.approx(-(chosen.metric or 0.0))) is mean  # else there is a margin
    assert has_state(model, before)
    assert f"{len(plan.measured_points)} networks were measured" in str(plan)


def test_error_is_bounded_as_a_score_is(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    evaluate = Agreement(model)
    score = planned(evaluate)
    error = planned(lambda network: -evaluate(network), lower_is_better=True)
    assert error.decisions == score.decisions
    assert [point.metric for point in error.measured_points] == [-(p.metric or 0.0) for p in score.measured_points]
    assert [p.drop_at_most for p in error.measured_points] == [p.drop_at_most for p in score.measured_points]


def test_larger_drop_gives_a_cheaper_network(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    plans = [planned(Agreement(model, mean=True), bound) for bound in (1e-7, 1e-6, 1e-5)]
    costs = [plan.after.macs or 0 for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 3


def test_parameters_are_minimised_if_asked_for(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    by_macs, by_params = (planned(Agreement(model), 1e-6, minimise=unit) for unit in (fxfact.Macs, fxfact.Params))
    assert by_params.after.params < by_macs.after.params


def test_milliseconds_are_minimised_if_asked_for(model: nn.Module, error_curves: fxfact.ErrorCurveCache) -> None:
    metric = fxfact.Metric(Agreement(model, mean=True), at_most_drop=1e-3, minimise=fxfact.Latency)
    allocator = BudgetAllocator(
        budget=fxfact.Latency(1.0, timer=FakeTimer()),
        factorizations=ByPath.parse("channel_svd", parse_factorizations),
        error_curves=error_curves,
    )
    found = search(
        capture(model, X[:16]), allocator, SearchScope(), CalibrationData(), options=DecomposeOptions(), bound=metric
    )
    plan = found.plan
    assert plan.after.ms is not None
    assert plan.network.ms is not None
    assert plan.after.ms < plan.network.ms
    chosen = next(point for point in plan.measured_points if point.cost == plan.after)
    assert chosen.drop_at_most is not None
    assert chosen.drop_at_most <= 1e-3
    assert plan.measured_points[0].cost == plan.network


def test_milliseconds_of_a_network_for_a_metric_are_measured(
    model: nn.Module, error_curves: fxfact.ErrorCurveCache
) -> None:
    def side_by_side(calls: Sequence[Callable[[], Any]]) -> list[float]:
        dense, *others = map(millions_of_macs, calls)
        return [dense, *(dense - (dense - other) / 4 for other in others)]  # networks save less than layers alone

    metric = fxfact.Metric(Agreement(model, mean=True), at_most_drop=1e-3, minimise=fxfact.Latency)
    allocator = BudgetAllocator(
        budget=fxfact.Latency(1.0, timer=FakeTimer(side_by_side=side_by_side)),
        factorizations=ByPath.parse("channel_svd", parse_factorizations),
        error_curves=error_curves,
    )
    captured = capture(model, X[:16])
    found = search(captured, allocator, SearchScope(), CalibrationData(), options=DecomposeOptions(), bound=metric)
    plan = found.plan
    assert plan.network.ms is not None
    assert plan.after.ms is not None
    saved = 16 * (plan.network.macs - plan.after.macs) / 1e6  # of 16 samples, for layers alone
    assert plan.network.ms - plan.after.ms == pytest.approx(saved / 4, rel=1e-3)
    assert f"{len(plan.measured_points)} networks were measured" in str(plan)


@pytest.mark.parametrize("mean", [True, False])
def test_refitted_networks_are_measured_and_returned(
    model: nn.Module, planned: Callable[..., fxfact.Plan], mean: bool
) -> None:
    evaluate = Agreement(model, mean=mean)
    before, plain = copied_state(model), planned(Agreement(model, mean=mean), 3e-5)
    small = planned(evaluate, 3e-5, call=fxfact.factorize, refit=True, example_inputs=X[:1])
    plan = fxfact.plan_of(small)
    chosen = next(point for point in plan.measured_points if point.cost == plan.after)
    assert [point.refitted for point in plan.measured_points] == [False, *[True] * (len(plan.measured_points) - 1)]
    assert chosen.metric == pytest.approx(float(torch.as_tensor(evaluate(small)).mean()), rel=1e-3)
    unrefitted = fxfact.apply(plan, model, calibration=X.split(16), likelihood="categorical")
    assert chosen.metric > float(torch.as_tensor(evaluate(unrefitted)).mean())
    assert plan.after.macs is not None
    assert plain.after.macs is not None
    assert plan.after.macs <= plain.after.macs
    assert "call fxfact.refit as well" in str(plan)
    assert fxfact.Plan.from_json(plan.to_json()) == plan
    assert has_state(model, before)


def test_refitting_without_a_module_or_batches_is_refused(
    model: nn.Module, planned: Callable[..., fxfact.Plan]
) -> None:
    program = torch.export.export(model, (X,))
    metric = fxfact.Metric(Agreement(model), 1e-4, refit=True)
    with pytest.raises(ArgumentError, match=r"refit=True takes a module\. Export the network after"):
        fxfact.plan(program, "channel_svd", budget=metric, calibration=[X, X])
    for data in (None, fxfact.calibrate(model, X.split(16), likelihood="categorical")):
        with pytest.raises(ArgumentError, match=r"refit=True needs batches\. Pass them as calibration"):
            fxfact.plan(model, "channel_svd", budget=metric, calibration=data, example_inputs=X)
    with pytest.raises(ArgumentTypeError, match="refit is True or False, got 'yes'"):
        fxfact.Metric(Agreement(model), 1e-4, refit="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(("dense", "bound", "warned"), [(0.87, 1.0, True), (0.87, 0.01, False), (-3.0, 1.0, False)])
def test_bound_that_allows_a_metric_to_be_lost_warns(
    model: nn.Module, planned: Callable[..., fxfact.Plan], dense: float, bound: float, warned: bool
) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        planned(lambda network: dense, bound)
    assert any("not less than the metric of the dense network" in str(each.message) for each in found) is warned


def test_metric_that_allows_nothing_leaves_the_network_dense(
    model: nn.Module, planned: Callable[..., fxfact.Plan]
) -> None:
    dense = model(X).detach()
    evaluate = lambda network: float(torch.equal(network(X), dense))  # noqa: E731
    with pytest.warns(UserWarning, match="rewrote none of the 4 layers.*the metric cannot bear it"):
        network = planned(evaluate, 0.5, call=fxfact.factorize)
    plan = fxfact.plan_of(network)
    assert not plan.rewrites
    assert len(plan.measured_points) > 1
    assert torch.equal(network(X), dense)


def test_exported_program_is_measured_as_a_module(model: nn.Module, error_curves: fxfact.ErrorCurveCache) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (X[:2],), dynamic_shapes=({0: batch},))
    metric = fxfact.Metric(lambda network: -float((network(X) - model(X)).square().mean()), at_most_drop=1e-3)
    small = fxfact.factorize(program, "channel_svd", budget=metric, error_curves=error_curves)
    assert isinstance(small, torch.export.ExportedProgram)
    assert fxfact.plan_of(small).rewrites


def test_network_to_measure_can_be_refitted(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    evaluate = Agreement(model, mean=True)
    plan = planned(lambda network: evaluate(fxfact.refit(network, model, X.split(16))[0]))
    assert plan.rewrites


# Functions that misbehave


def returns_nan(network: nn.Module) -> float:
    return float("nan")


def raises(network: nn.Module) -> float:
    raise RuntimeError("no such file")


def trains(network: nn.Module) -> float:
    network.train()(X)
    return 0.0


def halves_weights(network: nn.Module) -> float:
    next(network.parameters()).data.mul_(0.5)
    return 0.0


def on_meta(network: nn.Module) -> Tensor:
    return torch.empty(3, device="meta")


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        (raises, "evaluate raised on the dense network: RuntimeError: no such file"),
        (returns_nan, "1 NaN or Inf of 1 values for the dense network"),
        (lambda network: network(X)[:, 0] / 0, "NaN or Inf of 64 values"),
        (lambda network: network(X), r"shape \(64, 5\).*a tensor \(n,\) with the score of each sample"),
        (lambda network: torch.zeros(0), r"shape \(0,\)"),
        (lambda network: "91 %", "returned a str for the dense network"),
        (lambda network: None, "returned a NoneType"),
        (lambda network: 1j, "returned a complex"),
        (on_meta, "returned a Tensor for"),
        (trains, r"changed the network: 1\.running_mean.*Do not call train\(\)"),
        (halves_weights, r"changed the network: 0\.weight"),
    ],
)
def test_function_that_measures_nothing_is_refused_at_once(
    model: nn.Module, planned: Callable[..., fxfact.Plan], evaluate: Evaluate, words: str
) -> None:
    before, calls = copied_state(model), []

    def counted(network: nn.Module) -> Any:
        calls.append(network)
        return evaluate(network)

    with pytest.raises(MetricError, match=words):
        planned(counted)
    assert len(calls) == 1
    assert has_state(model, before)


def test_function_that_changes_the_original_is_refused(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    def evaluate(network: nn.Module) -> float:
        model[0].bias.data.add_(1)
        return 0.0

    with pytest.raises(MetricError, match=r"changed the original model: 0\.bias"):
        planned(evaluate)


@pytest.mark.parametrize(
    ("later", "words"),
    [
        (raises, r"evaluate raised on the network with 0\.\d\d of the MACs"),
        (returns_nan, r"NaN or Inf of 1 values for the network with 0\.\d\d of the MACs"),
        (lambda network: torch.zeros(3), "3 scores for the network .*, and 1 before"),
    ],
)
def test_function_that_fails_on_a_candidate_names_it(
    planned: Callable[..., fxfact.Plan], later: Evaluate, words: str
) -> None:
    calls: list[nn.Module] = []

    def evaluate(network: nn.Module) -> Any:
        calls.append(network)
        return 0.0 if len(calls) <= 2 else later(network)

    with pytest.raises(MetricError, match=words):
        planned(evaluate)


def test_random_function_is_said_to_be_random(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    generator, agreement = torch.Generator().manual_seed(0), Agreement(model, mean=True)
    with pytest.warns(UserWarning, match="evaluate is random: two calls on the dense network differ by"):
        planned(lambda network: agreement(network) + 1e-6 * float(torch.rand((), generator=generator)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(agreement)


@pytest.mark.parametrize("value", [3, np.float32(3), np.ones(64), [1.0] * 64, torch.ones(64, dtype=torch.bool)])
def test_numbers_and_arrays_are_scores(planned: Callable[..., fxfact.Plan], value: Any) -> None:
    plan = planned(lambda network: value, 0.5)
    assert plan.rewrites
    assert {point.metric for point in plan.measured_points} == {float(torch.as_tensor(value).double().mean())}


def test_scores_in_a_buffer_that_is_used_again_are_kept(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    evaluate, buffer = Agreement(model), torch.zeros(64, dtype=torch.float64)
    plan = planned(lambda network: buffer.copy_(evaluate(network)))
    assert plan.measured_points == planned(evaluate).measured_points


def test_too_few_scores_of_right_and_wrong_are_refused(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    first = model(X)[:, 0]
    threshold = float(first.median())
    with pytest.raises(BudgetError, match=r"64 scores cannot show.*at most 0\.01.*Evaluate more samples \(about \d"):
        planned(lambda network: network(X)[:, 0] > threshold, 0.01)
    assert planned(lambda network: (network(X)[:, 0] > threshold).double().mean(), 0.01).measured_points


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"evaluate": 3}, ArgumentTypeError, "a function of a network"),
        ({"at_most_drop": -0.1}, BudgetError, "at least 0"),
        ({"at_most_drop": float("nan")}, BudgetError, "at least 0"),
        ({"at_most_drop": None}, BudgetError, "at least 0"),
        ({"lower_is_better": 1}, ArgumentTypeError, "True or False"),
        ({"minimise": fxfact.Loss}, ArgumentTypeError, "the class fxfact.Macs"),
        ({"minimise": fxfact.Macs(0.5)}, ArgumentTypeError, "the class fxfact.Macs"),
        ({"evaluations": 2}, ArgumentError, "evaluations must be an int, at least 3"),
        ({"confidence": 95}, ArgumentError, "less than 1"),
    ],
)
def test_metric_that_makes_no_sense_is_refused(arguments: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        fxfact.Metric(**{"evaluate": returns_nan, "at_most_drop": 0.5, **arguments})


# The bound on other samples


@pytest.mark.parametrize("count", [20, 200, 2000])
@pytest.mark.parametrize("changed", [0.002, 0.02, 0.3])
def test_limit_of_the_mean_holds_for_rare_losses(count: int, changed: float) -> None:
    """A share of the samples is lost, and half as many are won."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(1000, count, generator=generator, dtype=torch.float64)
    values = (draws < changed).double() - (draws > 1 - changed / 2).double()
    held = [largest_mean(each, 1.0, 0.95) >= changed / 2 for each in values]
    assert sum(held) >= 940


@pytest.mark.parametrize("count", [4, 12, 100])
def test_limit_of_the_mean_is_near_that_of_students_test_for_numbers(count: int) -> None:
    values = torch.randn(4000, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held = sum(largest_mean(each, 1.0, 0.95) >= 0 for each in values) / 4000
    assert held >= 0.945
