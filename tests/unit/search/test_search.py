"""Plans for a budget: what they count, what is measured on data held out, and that the rest is refused."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from fxfact.calibration import DivergenceEvaluator, mean_and_error, split_held_out
from fxfact.calibration.outputs import CATEGORICAL
from fxfact.capture import capture
from fxfact.conv import ConvLayer, read_conv
from fxfact.errors import ArgumentError, CalibrationError, WeightError
from fxfact.factorizations import FACTORIZATIONS
from fxfact.factorizations.cp import CPMobilenet
from fxfact.factorizations.matrix_svd import ChannelSVD
from fxfact.planning import BudgetAllocator, ByPath, parse_factorizations
from fxfact.planning.error_curves import interpolate
from fxfact.search import SearchScope


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convs = [nn.Conv2d(n, m, 3) for n, m in ((3, 12), (12, 16), (16, 20))]
        layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)).eval()


@pytest.fixture
def model() -> nn.Module:
    return network()


def data(seed: int = 0) -> Tensor:
    x = torch.randn(32, 3, 11, 11, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(x, 3, 1, 1)


def planned(model: nn.Module, **arguments: Any) -> fxfact.Plan:
    return fxfact.plan(model, example_inputs=data()[:1], **arguments)


def divergence(model: nn.Module, small: nn.Module, batches: tuple[Tensor, ...] | list[Any]) -> float:
    with torch.no_grad():
        return float(torch.cat([CATEGORICAL.divergence(model(x), small(x), 1.0) for x in batches]).mean())


@pytest.mark.parametrize("budget", [fxfact.Macs(0.3), fxfact.Params(0.3), fxfact.Loss(1e-4)], ids=str)
def test_what_a_plan_says_was_measured_is_what_the_network_does(model: nn.Module, budget: Any) -> None:
    batches = data().split(4)
    kept, held_out = split_held_out(batches)
    given: dict[str, Any] = {"calibration": batches}  # of which a bound on the loss holds some out
    if not isinstance(budget, fxfact.Loss):
        given = {"calibration": kept, "held_out": held_out}
    plan = planned(model, budget=budget, **given)
    small = fxfact.apply(plan, model, calibration=fxfact.calibrate(model, kept))
    assert plan.measured_loss_increase == pytest.approx(divergence(model, small, held_out), rel=1e-3)
    again = fxfact.factorize(model, budget=budget, example_inputs=data()[:1], **given)
    assert fxfact.plan_of(again) == plan
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters(), strict=True))


def test_where_nothing_is_held_out_all_data_are_learned_from(model: nn.Module) -> None:
    batches, budget = data().split(4), fxfact.Macs(0.3)
    small = fxfact.factorize(model, budget=budget, calibration=batches, example_inputs=data()[:1])
    statistics = fxfact.calibrate(model, batches)
    plan = planned(model, budget=budget, calibration=statistics, held_out=split_held_out(batches)[1])
    assert fxfact.plan_of(small) == replace(plan, measured_loss_increase=None)
    same = fxfact.apply(plan, model, calibration=statistics)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), same.parameters(), strict=True))


def deep() -> nn.Module:
    """Errors of its convolutions come to large ones of its output."""
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
def test_a_more_even_plan_is_taken_where_it_measures_clearly_better(share: float, even: bool, held_out: bool) -> None:
    model, batches = deep(), data().split(8)
    seen = data(1).split(8) if held_out else split_held_out(batches)[1]
    statistics = fxfact.calibrate(model, batches)
    what: dict[str, Any] = {"factorization": "channel_svd", "budget": fxfact.Macs(share)}
    foreseen = planned(model, calibration=statistics, **what)
    best = planned(model, calibration=batches, **what, **({"held_out": seen} if held_out else {}))
    assert foreseen.measured is None
    assert (best.rewrites != foreseen.rewrites) is even
    assert best.after.macs <= share * best.network.macs
    assert best.pareto_points == foreseen.pareto_points
    on = DivergenceEvaluator(model, seen, "categorical")
    found, usual = (on.divergences(fxfact.apply(plan, model, calibration=statistics)) for plan in (best, foreseen))
    mean, error = mean_and_error(found - usual)
    assert mean < -2 * error if even else mean == 0
    assert best.measured_loss_increase == (pytest.approx(float(found.mean()), rel=1e-3) if held_out else None)


def test_a_mean_comes_with_its_standard_error() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    expected = (float(values.mean()), float(values.std()) / 50**0.5)
    assert mean_and_error(values) == pytest.approx(expected)
    assert mean_and_error(values[:1]) == (float(values[0]), float("inf"))


def test_given_ranks_are_fitted_to_batches_with_labels(model: nn.Module) -> None:
    batches = [(batch, torch.zeros(len(batch))) for batch in data().split(8)]
    labelled = fxfact.factorize(model, rank=0.5, calibration=batches, example_inputs=data()[:1])
    plain = fxfact.factorize(model, rank=0.5, calibration=data().split(8), example_inputs=data()[:1])
    assert all(torch.equal(a, b) for a, b in zip(labelled.parameters(), plain.parameters(), strict=True))


def test_batches_to_learn_from_alone_are_not_kept(model: nn.Module) -> None:
    alive, most = weakref.WeakSet[Tensor](), 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for seed in range(12):
            batch = data(seed)
            alive.add(batch)
            most = max(most, len(alive))
            yield batch

    planned(model, calibration=stream(), rank=0.5)
    assert 1 <= most <= 3


def test_a_bound_on_the_loss_is_met_on_batches_of_the_callers_own(model: nn.Module) -> None:
    statistics, others = fxfact.calibrate(model, data().split(8)), data(1).split(8)
    plan = planned(model, budget=fxfact.Loss(1e-4), calibration=statistics, held_out=others)
    assert plan.rewrites
    assert divergence(model, fxfact.apply(plan, model, calibration=statistics), others) <= 1.001e-4


def test_evenness_lowers_what_is_relative_to_losing_a_convolution(model: nn.Module) -> None:
    statistics = fxfact.calibrate(model, data().split(8))
    captured, selected = capture(model, data()[:1]), SearchScope(None, None, allow_growth=False)
    every = ByPath.parse([kind() for kind in FACTORIZATIONS], parse_factorizations)
    plans = [
        selected.plan(
            captured, BudgetAllocator(fxfact.Macs(0.2), every, statistics=statistics, normalization=normalization)
        )
        for normalization in (0.0, 1.0)
    ]

    def relative(plan: fxfact.Plan) -> float:
        total = 0.0
        for decision in plan.rewrites:
            layer = read_conv(model.get_submodule(decision.path))
            assert isinstance(layer, ConvLayer)
            metric = statistics.metric(decision.path, layer.spec)
            assert metric is not None
            assert decision.predicted_loss_increase is not None
            total += decision.predicted_loss_increase / metric.loss_increase(layer.spec, -layer.weight.detach())
        return total

    nats = [plan.predicted_loss_increase for plan in plans]
    assert nats[0] is not None
    assert nats[1] is not None
    assert nats[0] < nats[1]
    assert relative(plans[1]) < relative(plans[0])


class Unequal(nn.Module):
    """One of its convolutions matters less."""

    def __init__(self) -> None:
        super().__init__()
        self.strong, self.weak, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(3, 32, 3), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.strong(x) + 0.35 * self.weak(x)).mean((2, 3)))


def test_increases_count_by_the_root_of_what_losing_a_convolution_costs() -> None:
    torch.manual_seed(0)
    model = Unequal().eval()
    statistics = fxfact.calibrate(model, data().split(8))
    plan = planned(model, factorization="channel_svd", budget=fxfact.Macs(0.5), calibration=statistics)
    choices, chosen = [], 0.0
    for decision in plan:
        layer = read_conv(model.get_submodule(decision.path))
        assert isinstance(layer, ConvLayer)
        metric = statistics.metric(decision.path, layer.spec)
        assert metric is not None
        root = metric.loss_increase(layer.spec, -layer.weight.detach()) ** 0.5
        own = [(decision.before.macs or 0, 0.0, 0.0)]
        (curve,) = statistics.curves[decision.path].values()
        ranks = ChannelSVD().ranks(layer.spec)
        for rank, increase in zip(ranks, interpolate(curve, ranks), strict=True):
            chain = replace(decision, factorization=ChannelSVD(), rank=rank, reason="")
            own.append((chain.after.macs or 0, increase, increase / root))
        choices.append(own)
        chosen += (decision.predicted_loss_increase or 0.0) / root
    macs, nats, counted = zip(*(map(sum, zip(*each, strict=True)) for each in itertools.product(*choices)), strict=True)
    allowed = sum(decision.after.macs or 0 for decision in plan)
    within = [k for k, cost in enumerate(macs) if cost <= allowed]
    assert chosen == pytest.approx(min(counted[k] for k in within), rel=0.01)
    assert counted[min(within, key=nats.__getitem__)] > 1.05 * chosen  # by nats alone it would be another plan


def test_a_loss_of_ones_own_is_planned_with_and_not_measured(model: nn.Module) -> None:
    def own(output: Tensor) -> Tensor:
        return output.square().sum()

    plan = planned(model, budget=fxfact.Macs(0.5), calibration=data().split(8), likelihood=own)
    assert plan.rewrites
    assert plan.measured_loss_increase is None
    for measured in ({"budget": fxfact.Loss(0.1)}, {"budget": fxfact.Macs(0.5), "held_out": [data(1)]}):
        with pytest.raises(CalibrationError, match="cannot measure a loss"):
            planned(model, calibration=data().split(8), likelihood=own, **measured)


def test_one_batch_is_planned_with_and_not_measured(model: nn.Module) -> None:
    assert planned(model, budget=fxfact.Macs(0.5), calibration=[data()]).measured_loss_increase is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda s: {"budget": fxfact.Macs(0.5), "held_out": [data()]}, "pass calibration, other"),
        (lambda s: {"budget": fxfact.Loss(0.5), "calibration": s}, "held_out=batches"),
        (lambda s: {"budget": fxfact.Loss(0.5)}, "pass two or more as calibration"),
        (lambda s: {"budget": fxfact.Macs(0.5), "calibration": s, "held_out": []}, "no batch"),
        (lambda s: {"budget": fxfact.Macs(0.5), "calibration": s, "held_out": [data() / 0]}, "contains NaN or Inf"),
        (lambda s: {"budget": fxfact.Macs(0.5), "calibration": s, "held_out": [data()[:, :2]]}, "fails on a batch"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: nn.Module, arguments: Callable[[fxfact.Statistics], dict[str, Any]], words: str
) -> None:
    with pytest.raises(CalibrationError, match=words):
        planned(model, **arguments(fxfact.calibrate(model, [data()])))


def test_what_begins_at_random_is_foreseen_without_chance(model: nn.Module) -> None:
    asked: dict[str, Any] = {"budget": fxfact.Macs(0.6), "calibration": data().split(8), "example_inputs": data()[:1]}
    made = [
        fxfact.factorize(model, CPMobilenet(init="random"), generator=torch.Generator().manual_seed(seed), **asked)
        for seed in (1, 1, 2)
    ]
    ranks = [[decision.rank for decision in fxfact.plan_of(each)] for each in made]
    assert ranks[0] == ranks[1] == ranks[2] == [d.rank for d in fxfact.plan(model, CPMobilenet(init="random"), **asked)]
    one, same, other = (each(data()) for each in made)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_given_ranks_are_not_measured(model: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="held_out is for budgets"):
        planned(model, rank=0.5, held_out=[data()])


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, held_out in (("alone", None), ("beside", data(1)[rank::2].split(2))):
        plan = planned(network(), budget=fxfact.Macs(0.3), calibration=data()[rank::2].split(2), held_out=held_out)
        plan.save(f"{folder}/{name}{rank}.json")
    dist.destroy_process_group()


def test_two_processes_measure_on_the_data_of_both(tmp_path: Path) -> None:
    mp.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    for name in ("alone", "beside"):
        one, other = (fxfact.Plan.load(tmp_path / f"{name}{rank}.json") for rank in range(2))
        assert one == other
        assert (one.measured_loss_increase is not None) == (name == "beside")


class Score(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean(1)


def test_one_number_a_sample_is_an_output_too() -> None:
    given: dict[str, Any] = {"calibration": data().split(8), "held_out": [data(1)], "likelihood": "gaussian"}
    plan = planned(Score().eval(), budget=fxfact.Macs(0.5), **given)
    assert plan.measured_loss_increase is not None
    assert 0 < plan.measured_loss_increase < 1e3


class Named(Score):
    def forward(self, **given: Tensor) -> Tensor:
        return self.inner(given["x"])


def test_arguments_by_any_name_are_all_kept() -> None:
    batches = [{"x": batch} for batch in data().split(8)]
    assert fxfact.plan(Named().eval(), budget=fxfact.Macs(0.5), calibration=batches).rewrites


def test_statistics_of_another_model_are_refused(model: nn.Module) -> None:
    other = fxfact.calibrate(Score().eval(), data().split(8), likelihood="gaussian")
    for how in ({"rank": 0.5}, {"budget": fxfact.Macs(0.5)}):
        with pytest.raises(CalibrationError, match=r"cover none of the convolutions.*inner\.0.*Calibrate this model"):
            planned(model, calibration=other, **how)
    nn.init.zeros_(model[-1].weight)
    with pytest.raises(CalibrationError, match="reach no convolution"):
        planned(model, calibration=data().split(8), budget=fxfact.Macs(0.5))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"budget": fxfact.Macs(0.5)}, "2: the weight holds 1 NaN"),
        ({"rank": fxfact.VBMF()}, "2: the weight holds 1 NaN"),
        ({"rank": fxfact.Energy(0.9)}, "2: the weight holds 1 NaN"),
    ],
    ids=["budget", "VBMF", "energy"],
)
def test_weights_that_are_no_numbers_are_named_before_ranks_are_chosen(
    how: dict[str, Any], words: str, model: nn.Module
) -> None:
    model[2].weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(WeightError, match=f"^{words}"):
        planned(model, **how)
