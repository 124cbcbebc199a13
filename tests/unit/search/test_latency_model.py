"""The latencies of layers and chains: measured once, on the inputs that they have, in the network's memory format."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.errors import BudgetError, TimingError
from fxfact.search.inference import FastestPasses
from fxfact.search.latency_model import MeasuredLatencyModel
from fxfact.utils import CLOCK_RESOLUTION_MS, Timer
from tests.support import FakeTimer, ThreeConvs

Calls = Sequence[Callable[[], Any]]


@pytest.fixture
def planned(three_convs: ThreeConvs, x: Tensor, error_curves: fxfact.ErrorCurveCache) -> Callable[..., fxfact.Plan]:
    """Returns the plan for a network of three convolutions within a share of its time."""

    def plan(share: float, timer: FakeTimer) -> fxfact.Plan:
        budget = fxfact.Latency(share, timer=timer)
        return fxfact.plan(three_convs, kinds="conv", budget=budget, example_inputs=x, error_curves=error_curves)

    return plan


def test_latency_model_measures_layouts_on_the_inputs_of_the_layer(three_convs: ThreeConvs, x: Tensor) -> None:
    sites, timer = capture(three_convs, x).sites, FakeTimer()
    model = MeasuredLatencyModel(sites, FastestPasses((), 7.0, linear_undecided=False), compiled=False, timer=timer)
    dense, halved = model.latencies_ms(
        "second", [lambda spec: (spec,), lambda spec: (fxfact.ConvSpec.parse(32, 24, (3, 3), padding=1),)]
    )
    assert model.network_ms == 7.0
    assert dense == pytest.approx(2 * 100 * 48 * 32 * 9 / 1e6 + 0.01)  # 2 samples of 10 × 10 positions
    assert halved == pytest.approx(100 * 48 * 32 * 9 / 1e6 + 0.01)
    assert timer.calls_timed == [2]
    assert not model.is_noisy


def test_latency_model_keeps_layers_dense_whose_chains_are_not_faster(planned: Callable[..., fxfact.Plan]) -> None:
    timer = FakeTimer(lambda calls: [[1.0] * 3, *[[2.0] * 3] * (len(calls) - 1)])
    with pytest.raises(BudgetError, match="can go down to"):
        planned(0.5, timer)
    plan = planned(1.0, timer)
    assert not plan.rewrites
    assert "no chain measures faster: 1 ms as it is, 2 ms at best" in plan["second"].reason


def test_latency_model_keeps_layers_dense_that_are_too_short_to_be_timed(planned: Callable[..., fxfact.Plan]) -> None:
    plan = planned(1.0, FakeTimer(lambda calls: [[CLOCK_RESOLUTION_MS] * 3] * len(calls)))
    assert not plan.rewrites
    assert "too little for this machine's clock" in plan["second"].reason


@pytest.mark.parametrize("faster", [True, False])
def test_latency_model_makes_chains_matrix_products_if_those_measure_faster(
    three_convs: ThreeConvs, x: Tensor, faster: bool
) -> None:
    def turns(calls: Calls) -> list[list[float]]:
        return (
            [[2.0, 2.0], [1.0 if faster else 3.0] * 2]
            if len(calls) == 2
            else [[1.0 + len(calls)] * 2, *[[1.0] * 2] * (len(calls) - 1)]
        )

    timer = FakeTimer(turns, lambda calls: [20.0, 15.0, 12.0, 10.0][: len(calls)])
    small = fxfact.factorize(three_convs, "tucker", budget=fxfact.Latency(0.8, timer=timer), example_inputs=x)
    plan = fxfact.plan_of(small)
    assert plan.rewrites
    assert ("pointwise_linear" in plan.inference_passes) == faster
    assert any(type(module).__name__ == "PointwiseConv2d" for module in small.modules()) == faster
    torch.testing.assert_close(fxfact.apply(plan, three_convs)(x), small(x))


def test_latency_model_raises_timing_errors_of_the_device(
    three_convs: ThreeConvs, x: Tensor, error_curves: fxfact.ErrorCurveCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: device is lost")

    before = {key: value.clone() for key, value in three_convs.state_dict().items()}
    monkeypatch.setattr(nn.Sequential, "forward", lost)  # of the chains that are timed
    timer = FakeTimer(turns=Timer().turns)
    with pytest.raises(TimingError, match=r"did not run.*device is lost.*Nothing was changed"):
        fxfact.plan(
            three_convs,
            budget=fxfact.Latency(0.9, timer=timer),
            example_inputs=x,
            error_curves=error_curves,
        )
    assert all(torch.equal(value, before[key]) for key, value in three_convs.state_dict().items())


def test_latency_model_under_load_warns_and_the_plan_is_made_by_macs(
    planned: Callable[..., fxfact.Plan],
    three_convs: ThreeConvs,
    x: Tensor,
    error_curves: fxfact.ErrorCurveCache,
    cache_folder: Path,
) -> None:
    spread = [1.0, 2.0, 2.0]
    with pytest.warns(UserWarning, match=r"under load.*0\.50 of the MACs"):
        plan = planned(0.5, FakeTimer(lambda calls: [spread] * len(calls)))
    by_macs = fxfact.plan(three_convs, budget=fxfact.Macs(0.5), example_inputs=x, error_curves=error_curves)
    assert [d.rank for d in plan] == [d.rank for d in by_macs]
    assert not cache_folder.exists()  # such times are not kept


def test_latency_model_times_layers_that_share_a_weight_each_with_its_own_stride(x: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 48, 1)
            self.two = nn.Conv2d(48, 48, 3, padding=1)
            self.three = nn.Conv2d(48, 48, 3, padding=1, stride=2, bias=False)
            self.three.weight = self.two.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.three(torch.relu(self.two(self.one(x))))

    methods = ["tucker", "tt", "spatial_svd", "channel_svd"]
    budget = fxfact.Latency(0.6, timer=FakeTimer())
    plan = fxfact.plan(Tied().eval(), methods, budget=budget, example_inputs=x)
    macs = [sum(d.before.macs for d in plan.rewrites), sum(d.after.macs for d in plan.rewrites)]
    assert [d.path for d in plan.rewrites] == ["two", "three"]
    assert plan["two"].latencies_ms == pytest.approx([len(x) * each / 1e6 for each in macs], abs=0.02)
    assert plan["three"].latencies_ms == (0.0, 0.0)
    assert plan.after.ms <= 0.6 * plan.network.ms


# Times that are kept


def test_latency_model_measures_each_layer_once(planned: Callable[..., fxfact.Plan]) -> None:
    timer = FakeTimer()
    planned(0.5, timer)
    first = list(timer.calls_timed)
    assert sum(first) > 20
    timer.calls_timed.clear()
    planned(0.7, timer)
    # the variants of the network, its three convolutions, the network again, and a trial
    assert timer.calls_timed == [first[0], 1, 1, 1, 1, 2]


@pytest.mark.parametrize("slower", [0.5, 1.2, 4.0])
def test_latency_model_measures_again_what_was_kept_under_load(
    planned: Callable[..., fxfact.Plan], cache_folder: Path, slower: float
) -> None:
    """If a layer takes a little more time than before, or less, the kept times are rescaled."""
    timer = FakeTimer()
    expected = planned(0.5, timer)
    (path,) = cache_folder.iterdir()
    kept = json.loads(path.read_text())
    *_, times = kept["ms"].values()  # of the largest convolution
    times.update({key: slower * ms for key, ms in times.items()})
    path.write_text(json.dumps(kept))
    timer.calls_timed.clear()
    found = planned(0.5, timer)
    assert (sum(timer.calls_timed) > 20) == (slower > 1.5)
    assert [d.rank for d in found] == [d.rank for d in expected]
    for mine, same in zip(found.rewrites, expected.rewrites, strict=True):
        assert mine.latencies_ms == pytest.approx(same.latencies_ms)
    assert found.after.ms == pytest.approx(expected.after.ms)
    assert json.loads(path.read_text())["ms"].keys() == kept["ms"].keys()
