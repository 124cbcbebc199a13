"""Plans for fixed ranks and for budgets: what they learn from, what they are measured on, and what is refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from fxfact.calibration import DivergenceEvaluator, mean_and_error, split_held_out
from fxfact.capture import capture
from fxfact.errors import ArgumentError, BudgetError, CalibrationError, WeightError
from fxfact.factorizations.cp import CPMobilenet
from fxfact.passes import DecomposeOptions
from fxfact.planning import BudgetAllocator, ByPath, FixedRanks, SearchScope, build_plan, parse_factorizations
from fxfact.search import CalibrationData, search

QUICK = ["tucker", "channel_svd"]


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convs = [nn.Conv2d(n, m, 3) for n, m in ((3, 12), (12, 16), (16, 20))]
        layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)).eval()


def images(seed: int = 0) -> Tensor:
    x = torch.randn(32, 3, 11, 11, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(x, 3, 1, 1)


@pytest.fixture
def planned(error_curves: fxfact.ErrorCurveCache) -> Callable[..., fxfact.Plan]:
    """Returns the plan of a model; curves are computed once for all tests."""

    def plan(model: nn.Module, factorization: Any = None, **arguments: Any) -> fxfact.Plan:
        if not isinstance(arguments.get("calibration"), fxfact.Statistics | None):
            arguments = {"likelihood": "categorical", **arguments}
        return fxfact.plan(
            model, factorization, example_inputs=images()[:1], **{"error_curves": error_curves, **arguments}
        )

    return plan


class Score(nn.Module):
    """One number a sample."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean(1)


def divergence(model: nn.Module, small: nn.Module, batches: tuple[Tensor, ...] | list[Any]) -> float:
    return DivergenceEvaluator(model, list(batches), "categorical").divergence(small)


# The data


@pytest.mark.parametrize(
    ("methods", "budget"),
    [(None, fxfact.Macs(0.3)), (QUICK, fxfact.Params(0.3)), (QUICK, fxfact.Loss(1e-4))],
    ids=["MACs, all factorizations", "parameters", "loss"],
)
def test_measured_loss_increase_is_that_of_the_network_on_held_out_data(
    model: nn.Module, methods: Any, budget: Any, error_curves: fxfact.ErrorCurveCache
) -> None:
    batches = images().split(4)
    kept, held_out = split_held_out(batches)
    given: dict[str, Any] = {"calibration": batches}  # a bound on the loss holds some of them out
    if not isinstance(budget, fxfact.Loss):
        given = {"calibration": kept, "held_out": held_out}
    given |= {
        "budget": budget,
        "example_inputs": images()[:1],
        "error_curves": error_curves,
        "likelihood": "categorical",
    }
    plan = fxfact.plan(model, methods, **given)
    small = fxfact.apply(plan, model, calibration=fxfact.calibrate(model, kept, likelihood="categorical"))
    assert plan.measured_loss_increase == pytest.approx(divergence(model, small, held_out), rel=1e-3)
    again = fxfact.factorize(model, methods, **given)
    assert fxfact.plan_of(again) == plan
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters(), strict=True))


def test_search_learns_from_all_data_if_none_are_held_out(
    model: nn.Module, planned: Callable[..., fxfact.Plan], error_curves: fxfact.ErrorCurveCache
) -> None:
    batches = images().split(4)
    arguments: dict[str, Any] = {"budget": fxfact.Macs(0.3), "error_curves": error_curves}
    small = fxfact.factorize(
        model, QUICK, calibration=batches, example_inputs=images()[:1], likelihood="categorical", **arguments
    )
    statistics = fxfact.calibrate(model, batches, likelihood="categorical")
    plan = planned(model, QUICK, calibration=statistics, held_out=split_held_out(batches)[1], **arguments)
    assert fxfact.plan_of(small) == replace(plan, measured_on_held_out=False)
    same = fxfact.apply(plan, model, calibration=statistics)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), same.parameters(), strict=True))


def test_fixed_ranks_are_fitted_to_batches_with_labels(model: nn.Module) -> None:
    batches = [(batch, torch.zeros(len(batch))) for batch in images().split(8)]
    labelled, plain = (
        fxfact.factorize(model, ["tucker", "tt"], rank=0.5, calibration=given, example_inputs=images()[:1])
        for given in (batches, images().split(8))
    )
    assert all(torch.equal(a, b) for a, b in zip(labelled.parameters(), plain.parameters(), strict=True))


def test_fixed_ranks_do_not_keep_the_batches_that_they_learn_from(
    model: nn.Module, planned: Callable[..., fxfact.Plan]
) -> None:
    alive, most = weakref.WeakSet[Tensor](), 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for seed in range(12):
            batch = images(seed)
            alive.add(batch)
            most = max(most, len(alive))
            yield batch

    planned(model, calibration=stream(), rank=0.5)
    assert 1 <= most <= 3


def test_search_accepts_batches_whose_arguments_have_any_name(model: nn.Module) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **given: Tensor) -> Tensor:
            return self.inner(given["x"])

    batches = [{"x": batch} for batch in images().split(8)]
    assert fxfact.plan(Named().eval(), "channel_svd", budget=fxfact.Macs(0.5), calibration=batches).rewrites


def test_search_measures_outputs_of_one_number_a_sample(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    given: dict[str, Any] = {"calibration": images().split(8), "held_out": [images(1)], "likelihood": "gaussian"}
    plan = planned(Score(model).eval(), QUICK, budget=fxfact.Macs(0.5), **given)
    assert plan.measured_loss_increase is not None
    assert 0 < plan.measured_loss_increase < 1e3


def test_search_plans_with_a_likelihood_of_the_caller_but_does_not_measure(
    model: nn.Module, planned: Callable[..., fxfact.Plan]
) -> None:
    def own(output: Tensor) -> Tensor:
        return output.square().sum()

    plan = planned(model, QUICK, budget=fxfact.Macs(0.5), calibration=images().split(8), likelihood=own)
    assert plan.rewrites
    assert plan.measured_loss_increase is None
    for measured in ({"budget": fxfact.Loss(0.1)}, {"budget": fxfact.Macs(0.5), "held_out": [images(1)]}):
        with pytest.raises(CalibrationError, match="cannot measure how far"):
            planned(model, calibration=images().split(8), likelihood=own, **measured)


def test_search_measures_on_the_only_batch(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    plan = planned(model, QUICK, budget=fxfact.Macs(0.5), calibration=[images()])
    assert plan.measured_loss_increase is not None
    assert not plan.measured_on_held_out
    assert "measured" in str(plan).splitlines()[-1]
    assert "nats on a part of the data" in str(plan).splitlines()[-1]


def test_search_returns_the_statistics_and_the_decompositions_that_it_measured(model: nn.Module) -> None:
    captured, batches = capture(model, images()[:1]), images().split(8)
    data = CalibrationData(calibration=batches[:3], held_out=batches[3:])
    allocator = fxfact.planning.BudgetAllocator(
        budget=fxfact.Macs(0.5),
        factorizations=fxfact.planning.ByPath.parse("channel_svd", fxfact.planning.parse_factorizations),
    )
    found = search(captured, allocator, SearchScope(), data, options=DecomposeOptions())
    assert found.statistics is not None
    assert found.statistics.samples == 24
    assert {decision.rewrite for decision in found.plan.rewrites} <= found.decompositions.keys()
    ranks = FixedRanks.parse("channel_svd", 0.5)
    found = search(captured, ranks, SearchScope(), CalibrationData(), options=DecomposeOptions())
    assert (found.statistics, found.decompositions) == (None, {})
    assert found.plan.rewrites


# Two normalizations, and bounds on the loss


def deep_network() -> nn.Module:
    """Errors of its convolutions add up to large ones of its output."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, *(8,) * 7):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU()]
        layers[-2].weight.data *= 2.4
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    layers[-1].weight.data *= 20
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize(("share", "even"), [(0.4, True), (0.15, False)])
def test_search_takes_a_more_even_plan_if_it_measures_clearly_better(
    share: float, even: bool, held_out: bool, planned: Callable[..., fxfact.Plan]
) -> None:
    model, batches = deep_network(), images().split(8)
    measured_on = images(1).split(8) if held_out else split_held_out(batches)[1]
    statistics = fxfact.calibrate(model, batches, likelihood="categorical")
    arguments: dict[str, Any] = {"factorization": "channel_svd", "budget": fxfact.Macs(share)}
    predicted = planned(model, calibration=statistics, **arguments)
    best = planned(model, calibration=batches, **arguments, **({"held_out": measured_on} if held_out else {}))
    assert predicted.measured_loss_increase is None
    assert (best.rewrites != predicted.rewrites) is even
    assert best.after.macs <= share * best.network.macs
    assert best.pareto_points == predicted.pareto_points
    evaluator = DivergenceEvaluator(model, measured_on, "categorical")
    found, usual = (
        evaluator.divergences(fxfact.apply(plan, model, calibration=statistics)) for plan in (best, predicted)
    )
    mean, error = mean_and_error(found - usual)
    assert mean < -2 * error if even else mean == 0
    assert best.measured_loss_increase == pytest.approx(float(found.mean()), rel=1e-3)
    assert best.measured_on_held_out is held_out


def test_loss_budget_is_met_on_batches_of_the_caller(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    statistics, others = fxfact.calibrate(model, images().split(8), likelihood="categorical"), images(1).split(8)
    plan = planned(model, "channel_svd", budget=fxfact.Loss(1e-4), calibration=statistics, held_out=others)
    measured = {point.cost: point.measured_loss_increase for point in plan.measured_points}
    assert len(measured) > 1
    assert measured[plan.after] == plan.measured_loss_increase
    assert plan.rewrites
    assert divergence(model, fxfact.apply(plan, model, calibration=statistics), others) <= 1.001e-4


def test_larger_loss_budget_gives_a_cheaper_network(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    bounds = (1e-6, 1e-4)
    plans = [planned(model, "channel_svd", budget=fxfact.Loss(nats), calibration=images().split(4)) for nats in bounds]
    assert all(plan.measured_loss_increase <= nats for plan, nats in zip(plans, bounds, strict=True))
    assert plans[1].after.macs <= plans[0].after.macs
    assert plans[1].rewrites
    assert "held-out" in str(plans[1])


def test_loss_budget_that_allows_nothing_leaves_the_network_dense(
    model: nn.Module, planned: Callable[..., fxfact.Plan]
) -> None:
    plan = planned(model, "channel_svd", budget=fxfact.Loss(1e-15), calibration=images().split(4))
    assert not plan.rewrites
    assert plan.measured_loss_increase == 0.0


def test_search_predicts_random_initial_factors_without_chance(
    model: nn.Module, planned: Callable[..., fxfact.Plan]
) -> None:
    method = CPMobilenet(init="random", sweeps=2)
    asked: dict[str, Any] = {"budget": fxfact.Macs(0.8), "calibration": images().split(8), "include": "2"}
    made = [
        fxfact.factorize(
            model, method, generator=torch.Generator().manual_seed(seed), example_inputs=images()[:1], **asked
        )
        for seed in (1, 1, 2)
    ]
    ranks = [[decision.rank for decision in fxfact.plan_of(each)] for each in made]
    assert ranks[0] == ranks[1] == ranks[2] == [d.rank for d in planned(model, method, **asked)]
    assert any(ranks[0])
    one, same, other = (each(images()) for each in made)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda s: {"budget": fxfact.Macs(0.5), "held_out": [images()]}, "pass calibration, other"),
        (lambda s: {"budget": fxfact.Loss(0.5), "calibration": s}, "held_out=batches"),
        (lambda s: {"budget": fxfact.Loss(0.5)}, "pass two or more as calibration"),
        (lambda s: {"budget": fxfact.Macs(0.5), "calibration": s, "held_out": []}, "no batch"),
        (lambda s: {"budget": fxfact.Macs(0.5), "calibration": s, "held_out": [images() / 0]}, "contains NaN or Inf"),
        (lambda s: {"budget": fxfact.Macs(0.5), "calibration": s, "held_out": [images()[:, :2]]}, "fails on a batch"),
    ],
)
def test_data_that_cannot_be_measured_on_are_refused(
    model: nn.Module,
    planned: Callable[..., fxfact.Plan],
    arguments: Callable[[fxfact.Statistics], dict[str, Any]],
    words: str,
) -> None:
    with pytest.raises(CalibrationError, match=words):
        planned(model, **arguments(fxfact.calibrate(model, [images()])))


def test_latency_budget_is_refused_in_several_processes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("fxfact.search.search"), "rank_and_world_size", lambda: (1, 2))
    with pytest.raises(ArgumentError, match="times of its own"):
        fxfact.plan(model, budget=fxfact.Latency(0.5), calibration=images().split(8))


def test_budget_of_macs_without_sizes_is_refused_before_errors_are_computed(
    model: nn.Module, error_curves: fxfact.ErrorCurveCache
) -> None:
    model.get_parameter("0.weight").data[0] = float("nan")  # would be refused when errors are computed
    with pytest.raises(BudgetError, match="needs example_inputs"):
        fxfact.plan(model, budget=fxfact.Macs(0.5), error_curves=error_curves)
    factorizations = ByPath.parse("tucker", parse_factorizations)
    allocator = BudgetAllocator(budget=fxfact.Macs(0.5), factorizations=factorizations)
    with pytest.raises(BudgetError, match="needs example_inputs"):
        build_plan(capture(model), allocator, SearchScope())


def test_fixed_ranks_are_measured_on_held_out_data(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    statistics = fxfact.calibrate(model, images().split(8), likelihood="categorical")
    plan = planned(model, rank=0.2, calibration=statistics, held_out=[images()])
    small = fxfact.apply(plan, model, calibration=statistics)
    with torch.no_grad():
        expected, found = (network(images()).log_softmax(1) for network in (model, small))
    divergence = (expected.exp() * (expected - found)).sum(1).mean()
    assert plan.measured_loss_increase == pytest.approx(float(divergence), rel=1e-3)
    assert plan.measured_on_held_out
    with pytest.raises(CalibrationError, match="held_out is only measured on: pass calibration"):
        planned(model, rank=0.5, held_out=[images()])


def test_statistics_of_another_model_are_refused(model: nn.Module, planned: Callable[..., fxfact.Plan]) -> None:
    other = fxfact.calibrate(Score(model).eval(), images().split(8), likelihood="gaussian")
    for how in ({"rank": 0.5}, {"budget": fxfact.Macs(0.5)}):
        with pytest.raises(CalibrationError, match=r"cover none of the layers.*inner\.0.*Calibrate this model"):
            planned(model, calibration=other, **how)


@pytest.mark.parametrize(
    "how",
    [{"budget": fxfact.Macs(0.5)}, {"rank": fxfact.ranks.VBMF()}, {"rank": fxfact.ranks.Energy(0.9)}],
    ids=["budget", "VBMF", "energy"],
)
def test_weights_that_are_not_finite_are_named_before_ranks_are_chosen(
    how: dict[str, Any], model: nn.Module, planned: Callable[..., fxfact.Plan]
) -> None:
    model[2].weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(WeightError, match=r"^2: the weight holds 1 NaN"):
        planned(model, **how)
