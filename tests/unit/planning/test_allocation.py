"""Rank allocation under a budget: a pure function of options, and the allocator that makes the options."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.conv import ConvLayer, ConvSpec, Cost, Skip, read_conv
from fxfact.errors import ArgumentError, BudgetError, WeightError
from fxfact.factorizations import FACTORIZATIONS, Factorization
from fxfact.factorizations.linalg import truncated_svd
from fxfact.factorizations.matrix_svd import ChannelSVD
from fxfact.factorizations.stages import pointwise
from fxfact.planning import (
    BudgetAllocator,
    ByPath,
    Choice,
    LayerOptions,
    SearchScope,
    allocate,
    build_plan,
    draft_plan,
    least_amount,
    parse_factorizations,
)
from fxfact.planning.allocation import Option, energy_loss
from fxfact.planning.error_curves import interpolate
from fxfact.utils import CLOCK_RESOLUTION_MS

NETWORK = Cost(1000, 10_000)
CONVS = SearchScope(kinds="conv")


def layer(*options: tuple[int, float], dense_macs: int = 1000, loss_without_layer: float = 1.0) -> LayerOptions:
    """A dense layer, and chains of so many MACs that increase the loss so much. Ranks count from 1."""
    dense = Option(Skip("dense"), Cost(100, dense_macs), 0.0)
    chains = [
        Option(Choice(ChannelSVD(), (k,), predicted_loss_increase=increase), Cost(macs // 10, macs), increase)
        for k, (macs, increase) in enumerate(options, 1)
    ]
    return LayerOptions((dense, *chains), loss_without_layer)


def ranks(choices: Sequence[Choice | Skip]) -> list[int | None]:
    return [choice.rank[0] if isinstance(choice, Choice) else None for choice in choices]


@dataclass(frozen=True, kw_only=True)
class DepthwiseFirst(Factorization):
    """Depthwise k×k, R maps of every channel → 1×1: an SVD of every input channel's kernels."""

    name = "depthwise_first"

    def _rejects(self, block: ConvSpec) -> str | None:
        return "transposed" if block.transposed else None

    def _max_rank(self, block: ConvSpec) -> tuple[int, ...]:
        return (min(math.prod(block.kernel_size), block.out_channels),)

    def _stages(self, block: ConvSpec, rank: tuple[int, ...]) -> tuple[ConvSpec, ...]:
        maps = block.in_channels * rank[0]
        return (replace(block, out_channels=maps, groups=block.in_channels), pointwise(block, maps, block.out_channels))

    def _weights(self, block: ConvSpec, weight: Tensor, rank: tuple[int, ...], random: Any) -> tuple[Tensor, ...]:
        parts = [truncated_svd(part.flatten(1), *rank) for part in weight.unbind(1)]
        return torch.cat([right for _, right in parts]), torch.cat([left for left, _ in parts], 1)


# The pure function


def test_allocate_takes_the_cheapest_increases_first() -> None:
    layers = [layer((100, 1.0), (500, 0.1)), layer((100, 5.0), (500, 3.0))]
    for saved, expected in [
        (0, [None, None]),
        (500, [2, None]),
        (900, [1, None]),
        (1400, [1, 2]),
        (1800, [1, 1]),
    ]:
        allocation = allocate(layers, NETWORK, fxfact.Macs(at_most=10_000 - saved))
        assert ranks(allocation.choices) == expected


def test_allocate_returns_the_choices_of_the_options_in_order() -> None:
    layers = [layer((100, 1.0)), layer((400, 0.5), dense_macs=500)]
    allocation = allocate(layers, NETWORK, fxfact.Macs(at_most=9100))
    assert allocation.choices == (layers[0].options[1].choice, layers[1].options[0].choice)
    assert layers[0].dense is layers[0].options[0]


def test_allocate_is_pure() -> None:
    layers = [layer((100, 1.0), (500, 0.1)), layer((100, 5.0), (500, 3.0), loss_without_layer=7.0)]
    before = copy.deepcopy([(own.options, own.loss_without_layer) for own in layers])
    network, budget = Cost(1000, 10_000), fxfact.Macs(0.87)
    first = allocate(layers, network, budget)
    assert allocate(layers, network, budget) == first
    assert [(own.options, own.loss_without_layer) for own in layers] == before
    assert (network, budget) == (Cost(1000, 10_000), fxfact.Macs(0.87))
    assert allocate(layers, network, fxfact.Macs(0.9)) != first
    assert allocate(layers, network, budget) == first


def test_allocate_divides_increases_by_a_power_of_the_loss_without_the_layer() -> None:
    """The first layer matters much: losing it costs 100 nats, the second one 1."""
    layers = [layer((100, 2.0), loss_without_layer=100.0), layer((100, 1.0), loss_without_layer=1.0)]
    budget = fxfact.Macs(at_most=9100)
    assert ranks(allocate(layers, NETWORK, budget, normalization=0.0).choices) == [None, 1]  # 2 against 1
    assert ranks(allocate(layers, NETWORK, budget, normalization=0.5).choices) == [1, None]  # 0.2 against 1
    assert ranks(allocate(layers, NETWORK, budget).choices) == [1, None]  # the default is ½
    nearly = [layer((100, 9.0), loss_without_layer=100.0), layer((100, 1.0), loss_without_layer=1.0)]
    assert ranks(allocate(nearly, NETWORK, budget, normalization=0.4).choices) == [None, 1]
    assert ranks(allocate(nearly, NETWORK, budget, normalization=0.5).choices) == [1, None]
    free = [layer((100, 1e-9), loss_without_layer=0.0), layer((100, 1.0))]
    assert ranks(allocate(free, NETWORK, budget).choices) in ([1, None], [None, 1])


def test_allocate_counts_the_cost_of_everything_else_in_the_network() -> None:
    layers = [layer((100, 1.0))]
    assert ranks(allocate(layers, Cost(1000, 10_000), fxfact.Macs(0.91)).choices) == [1]
    assert ranks(allocate(layers, Cost(1000, 10_000), fxfact.Params(0.91)).choices) == [1]
    with pytest.raises(BudgetError, match=r"budget is 9,000 MACs.*can go down to 9,100 \(0\.910 of 10,000\)") as caught:
        allocate(layers, Cost(1000, 10_000), fxfact.Macs(0.9))
    assert caught.value.least == 9100


def test_allocate_without_layers_accepts_only_budgets_that_the_network_meets() -> None:
    assert allocate([], NETWORK, fxfact.Macs(1.0)).choices == ()
    assert allocate([], NETWORK, fxfact.Macs(1.0)).pareto_points == ()
    with pytest.raises(BudgetError, match="can go down to 10,000"):
        allocate([], NETWORK, fxfact.Macs(0.9))


def test_allocate_returns_a_pareto_front_from_the_cheapest_network_to_the_dense_one() -> None:
    layers = [layer((100, 1.0), (500, 0.1)), layer((100, 5.0), (500, 3.0))]
    points = allocate(layers, NETWORK, fxfact.Macs(0.9)).pareto_points
    assert points == allocate(layers, NETWORK, fxfact.Macs(1.0)).pareto_points  # whatever the budget is
    macs, increases = [p.cost.macs for p in points], [p.predicted_loss_increase for p in points]
    assert (macs[0], increases[0]) == (8200, 6.0)
    assert (macs[-1], increases[-1]) == (10_000, 0.0)
    assert macs == sorted(macs)
    assert increases == sorted(increases, reverse=True)
    assert points[-1].cost == NETWORK


def test_allocate_leaves_out_pareto_points_that_are_worse_than_cheaper_ones() -> None:
    """Normalized increases decide, so a dearer network may be worse."""
    layers = [layer((100, 2.0), loss_without_layer=100.0), layer((90, 1.0), loss_without_layer=1.0)]
    increases = [p.predicted_loss_increase for p in allocate(layers, NETWORK, fxfact.Macs(1.0)).pareto_points]
    assert increases == sorted(increases, reverse=True)


# What an error costs without statistics


def test_energy_loss_is_the_error_while_small_and_adds_up_over_layers() -> None:
    assert energy_loss(0.0) == 0.0
    assert energy_loss(1e-4) == pytest.approx(1e-4, rel=1e-4)
    assert energy_loss(0.3) + energy_loss(0.5) == pytest.approx(energy_loss(1 - 0.7 * 0.5))


def test_energy_loss_grows_without_bound_but_stays_finite_and_increasing() -> None:
    errors = [0.0, 0.5, 0.9, 0.99, 1 - 1e-5, 1 - 1e-7, 1.0, 1.0 + 1e-6, 1.5, 40.0]
    losses = [energy_loss(error) for error in errors]
    assert losses == sorted(set(losses))
    assert losses[errors.index(1.0)] > 1000 * energy_loss(0.99) * len(errors)
    assert math.isfinite(losses[-1])


def test_allocate_gives_no_layer_up_for_others_unless_the_budget_asks_for_it() -> None:
    """A chain of 100 MACs loses all of a layer; the same MACs can be saved by halving the energy of eight layers."""
    lost = layer((100, energy_loss(1.0)))
    halved = [layer((880, energy_loss(0.5)), (100, energy_loss(1.2))) for _ in range(8)]
    choices = allocate([lost, *halved], NETWORK, fxfact.Macs(at_most=9100)).choices
    assert ranks(choices) == [None, *[1] * 8]
    assert ranks(allocate([lost, *halved], NETWORK, fxfact.Macs(at_most=8200)).choices)[0] == 1  # not error 1.2
    assert ranks(allocate([lost, *halved], NETWORK, fxfact.Macs(at_most=1900)).choices) == [1, *[2] * 8]


# The options that the allocator makes


def allocator(budget: Any, methods: object = "channel_svd", **options: Any) -> BudgetAllocator:
    return BudgetAllocator(budget=budget, factorizations=ByPath.parse(methods, parse_factorizations), **options)


def test_layer_options_start_with_the_dense_layer_and_cost_no_more(model: nn.Module, x: Tensor) -> None:
    draft = draft_plan(capture(model, x[:1]), CONVS)
    methods = [kind() for kind in FACTORIZATIONS if "cp" not in kind.name]
    curves = fxfact.ErrorCurveCache()
    options = allocator(fxfact.Macs(0.5), methods, error_curves=curves).layer_options(draft.candidates)
    keys = {
        (method, candidate.path): key
        for method, candidate in itertools.product(methods, draft.candidates)
        for key in curves
        if key.startswith(f"{method.name} ") and candidate.weight_digest() in key
    }
    assert len(options) == len(draft.candidates) == 3
    for candidate, own in zip(draft.candidates, options, strict=True):
        assert isinstance(own.dense.choice, Skip)
        assert own.dense.cost == candidate.dense_cost
        assert own.dense.predicted_loss_increase == 0.0
        assert own.loss_without_layer == 1.0  # without statistics
        assert len({option.choice.factorization for option in own.options[1:]}) > 1
        for choice, cost, increase in own.options[1:]:
            assert isinstance(choice, Choice)
            assert choice.predicted_loss_increase is None
            assert cost == candidate.cost(choice.factorization, choice.rank)
            assert not cost.exceeds(candidate.dense_cost)
            (error,) = interpolate(curves[keys[choice.factorization, candidate.path]], [choice.rank])
            assert increase == energy_loss(error) >= error


def test_layer_options_with_statistics_are_in_nats(model: nn.Module, x: Tensor) -> None:
    statistics = fxfact.calibrate(model, x.split(8))
    draft = draft_plan(capture(model, x[:1]), CONVS)
    (first, *_) = allocator(fxfact.Macs(0.5), statistics=statistics).layer_options(draft.candidates)
    fisher, weight = statistics.fisher("first", draft.candidates[0].spec), draft.candidates[0].layer.weight
    assert first.loss_without_layer == pytest.approx(fisher.loss_increase(draft.candidates[0].spec, -weight.detach()))
    for choice, _, increase in first.options[1:]:
        assert choice.predicted_loss_increase == increase
        assert increase < first.loss_without_layer


def test_layer_options_have_ranks_that_are_multiples(model: nn.Module, x: Tensor) -> None:
    draft = draft_plan(capture(model, x[:1]), CONVS)
    for own in allocator(fxfact.Macs(0.5), multiple=4).layer_options(draft.candidates):
        for option in own.options[1:]:
            assert option.choice.rank[0] % 4 == 0
    with pytest.raises(ArgumentError, match="multiple_of"):
        allocator(fxfact.Macs(0.5), multiple=0)


def test_layer_without_gradients_has_only_its_dense_option(model: nn.Module, x: Tensor) -> None:
    statistics = fxfact.calibrate(model, x.split(8))
    seen = replace(statistics, moments={k: v for k, v in statistics.moments.items() if k != "up"})
    draft = draft_plan(capture(model, x[:1]), CONVS)
    *_, up = allocator(fxfact.Macs(0.5), statistics=seen).layer_options(draft.candidates)
    assert [option.choice for option in up.options] == [Skip("no gradient reached it in calibration")]
    timed = allocator(
        fxfact.Latency(0.5),
        statistics=seen,
        latency_model=FakeLatencies({"first": 3.0, "grouped": 2.0, "up": 1.0}, 0.5),
    )
    for options in (timed.layer_options(draft.candidates), timed.smallest_options(draft.candidates)):
        (dense,) = options[-1].options
        assert dense.choice == Skip("no gradient reached it in calibration")
        assert dense.cost.ms == 1.0


@pytest.mark.parametrize(
    ("methods", "reasons"),
    [
        ({"first": "tt"}, [None, "no factorization is given for it", "no factorization is given for it"]),
        ("svd", ["the kernel is 3×3, not 1×1"] * 3),
        (["svd", DepthwiseFirst()], [None, None, "the kernel is 3×3, not 1×1; transposed"]),
    ],
    ids=["by path", "rejected", "rejected by two"],
)
@pytest.mark.parametrize("timed", [False, True])
def test_layer_without_chains_says_why(
    methods: Any, reasons: list[str | None], timed: bool, model: nn.Module, x: Tensor
) -> None:
    draft = draft_plan(capture(model, x[:1]), CONVS)
    model_of_times = FakeLatencies({"first": 3.0, "grouped": 2.0, "up": CLOCK_RESOLUTION_MS}, 0.5) if timed else None
    options = allocator(fxfact.Params(0.9), methods, latency_model=model_of_times).layer_options(draft.candidates)
    assert [len(own.options) == 1 for own in options] == [reason is not None for reason in reasons]
    for own, reason in zip(options, reasons, strict=True):
        assert isinstance(own.dense.choice, Skip)
        assert reason in (None, own.dense.choice.reason)
        assert (own.dense.cost.ms is not None) == timed


def test_smallest_options_cost_as_little_as_all_options_and_compute_no_errors(model: nn.Module, x: Tensor) -> None:
    draft = draft_plan(capture(model, x[:1]), CONVS)
    for budget in (fxfact.Macs(0.5), fxfact.Params(0.5)):
        for multiple in (1, 4):
            chooser = allocator(budget, ["tucker", "spatial_svd", "tt"], multiple=multiple)
            smallest = chooser.smallest_options(draft.candidates)
            assert not len(chooser.error_curves)
            found = [
                least_amount(own, draft.network, budget) for own in (smallest, chooser.layer_options(draft.candidates))
            ]
            assert found[0] == found[1] < budget.amount(draft.network)


@pytest.mark.parametrize("kind", [fxfact.Macs, fxfact.Params])
def test_budget_that_cannot_be_met_is_refused_before_errors_are_computed(
    kind: type[fxfact.Macs | fxfact.Params], model: nn.Module, x: Tensor
) -> None:
    draft = draft_plan(capture(model, x[:1]), CONVS)
    chooser = allocator(kind(0.01), ["tucker", "spatial_svd"])
    least = least_amount(chooser.smallest_options(draft.candidates), draft.network, kind(0.01))
    with pytest.raises(BudgetError, match="can go down to") as caught:
        chooser.choose(draft.candidates, draft.network)
    assert caught.value.least == least
    assert not len(chooser.error_curves)
    reachable = replace(chooser, budget=kind(at_most=least))
    assert len(reachable.choose(draft.candidates, draft.network).choices) == 3


def test_layer_options_check_patterns_and_weights(model: nn.Module, x: Tensor) -> None:
    draft = draft_plan(capture(model, x[:1]), CONVS)
    with pytest.raises(ArgumentError, match="factorization: nothing to factorize at 'elsewhere'"):
        allocator(fxfact.Macs(0.5), {"elsewhere": "tt"}).layer_options(draft.candidates)
    only_first = allocator(fxfact.Macs(0.5), {"first": "tt"}).layer_options(draft.candidates)
    assert [len(own.options) > 1 for own in only_first] == [True, False, False]
    model.up.weight.data[0] = math.nan
    with pytest.raises(WeightError, match=r"^up: "):
        allocator(fxfact.Macs(0.5)).layer_options(draft_plan(capture(model, x[:1]), CONVS).candidates)


class FakeLatencies:
    """Milliseconds by path for the dense layer; chains take a share of them."""

    def __init__(self, dense_ms: dict[str, float], share: float) -> None:
        self.network_ms, self._dense_ms, self._share = 10.0, dense_ms, share

    def latencies_ms(self, path: str, layouts: Sequence[Any]) -> list[float]:
        dense = self._dense_ms[path]
        return [dense, *[self._share * dense] * (len(layouts) - 1)]


def test_layer_options_with_a_latency_model_are_faster_than_the_dense_layer(model: nn.Module, x: Tensor) -> None:
    draft = draft_plan(capture(model, x[:1]), CONVS)
    dense_ms = {"first": 3.0, "grouped": CLOCK_RESOLUTION_MS, "up": 2.0}
    budget = fxfact.Latency(0.9)
    fast = allocator(budget, latency_model=FakeLatencies(dense_ms, 0.5)).layer_options(draft.candidates)
    first, grouped, up = fast
    assert all(option.cost.ms == 1.5 for option in first.options[1:])
    assert all(option.choice.latencies_ms == (2.0, 1.0) for option in up.options[1:])
    assert (first.dense.cost.ms, len(grouped.options)) == (3.0, 1)
    assert "too little for this machine's clock" in grouped.dense.choice.reason
    slow = allocator(budget, latency_model=FakeLatencies(dense_ms, 0.98)).layer_options(draft.candidates)
    assert [len(own.options) for own in slow] == [1, 1, 1]
    assert "no chain measures faster: 3 ms as it is, 2.94 ms at best" in slow[0].dense.choice.reason
    allocation = allocator(budget, latency_model=FakeLatencies(dense_ms, 0.5)).choose(draft.candidates, draft.network)
    assert [rank is not None for rank in ranks(allocation.choices)] in ([True, False, False], [False, False, True])
    assert allocation.pareto_points[-1].cost.ms == pytest.approx(10.0)


# Whole plans


@pytest.fixture
def smooth_images() -> Tensor:
    x = torch.randn(32, 3, 11, 11, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(x, 3, 1, 1)


def test_normalization_lowers_increases_relative_to_losing_the_layer(smooth_images: Tensor) -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(n, m, 3) for n, m in ((3, 12), (12, 16), (16, 20))]
    layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)).eval()
    statistics, captured = (
        fxfact.calibrate(model, smooth_images.split(8), likelihood="categorical"),
        capture(model, smooth_images[:1]),
    )
    methods = ["tucker", "spatial_svd"]
    plans = [
        build_plan(
            captured,
            allocator(fxfact.Macs(0.5), methods, normalization=n, statistics=statistics),
            CONVS,
        )
        for n in (0.0, 1.0)
    ]

    def relative(plan: fxfact.Plan) -> float:
        total = 0.0
        for decision in plan.rewrites:
            conv = read_conv(model.get_submodule(decision.path))
            assert isinstance(conv, ConvLayer)
            fisher = statistics.fisher(decision.path, conv.spec)
            assert fisher is not None
            assert decision.predicted_loss_increase is not None
            total += decision.predicted_loss_increase / fisher.loss_increase(conv.spec, -conv.weight.detach())
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


def test_budget_plan_is_the_best_of_all_by_the_root_of_the_loss_without_each_layer(
    smooth_images: Tensor,
) -> None:
    torch.manual_seed(0)
    model, curves = Unequal().eval(), fxfact.ErrorCurveCache()
    statistics, x = fxfact.calibrate(model, smooth_images.split(8)), smooth_images[:1]
    asked: dict[str, Any] = {"budget": fxfact.Macs(0.5), "calibration": statistics, "example_inputs": x}
    plan = fxfact.plan(model, "channel_svd", error_curves=curves, **asked)
    options, chosen = [], 0.0
    for decision, key in zip((plan["strong"], plan["weak"]), curves, strict=True):
        conv = read_conv(model.get_submodule(decision.path))
        assert isinstance(conv, ConvLayer)
        fisher = statistics.fisher(decision.path, conv.spec)
        assert fisher is not None
        root = fisher.loss_increase(conv.spec, -conv.weight.detach()) ** 0.5
        own = [(decision.before.macs or 0, 0.0, 0.0)]
        all_ranks = ChannelSVD().ranks(conv.spec)
        for rank, increase in zip(all_ranks, interpolate(curves[key], all_ranks), strict=True):
            chain = replace(decision, factorization=ChannelSVD(), rank=rank, reason="")
            own.append((chain.after.macs or 0, increase, increase / root))
        options.append(own)
        chosen += (decision.predicted_loss_increase or 0.0) / root
    macs, nats, counted = zip(*(map(sum, zip(*each, strict=True)) for each in itertools.product(*options)), strict=True)
    allowed = sum(decision.after.macs or 0 for decision in plan)
    within = [k for k, cost in enumerate(macs) if cost <= allowed]
    assert chosen == pytest.approx(min(counted[k] for k in within), rel=0.01)
    assert counted[min(within, key=nats.__getitem__)] > 1.05 * chosen  # by nats alone it would be another plan


@pytest.mark.parametrize("factorization", ["channel_svd", "spatial_svd"])
@pytest.mark.parametrize("settings", [{"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2, "bias": False}])
def test_budget_is_met_if_convolutions_that_share_a_weight_differ(
    factorization: str, settings: dict[str, Any], image: Tensor
) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(4, 16, 1)
            self.two = nn.Conv2d(16, 16, 3, padding=1)
            self.three = nn.Conv2d(16, 16, 3, **settings)
            self.three.weight = self.two.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.three(torch.relu(self.two(self.one(x))))

    for share in (0.5, 0.7):
        plan = fxfact.plan(Tied(), factorization, budget=fxfact.Macs(share), example_inputs=image)
        assert plan.after.macs <= share * plan.network.macs
        assert [decision.path for decision in plan.rewrites] == ["two", "three"]
        (point,) = {point.cost for point in plan.pareto_points if point.cost.macs == plan.after.macs}
        assert point.params == plan.after.params


def test_factorization_with_grouped_first_stage_is_planned_on_data(model: nn.Module, x: Tensor) -> None:
    asked: dict[str, Any] = {"calibration": x.split(8), "example_inputs": x[:1], "verify": True}
    given = fxfact.factorize(model, DepthwiseFirst(), rank=2, **asked)
    within = fxfact.factorize(model, DepthwiseFirst(), budget=fxfact.Macs(0.7), **asked)
    assert [d.path for d in fxfact.plan_of(given).rewrites] == ["first", "grouped"]
    assert fxfact.plan_of(within).rewrites
