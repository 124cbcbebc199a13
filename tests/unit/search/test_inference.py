"""The fastest exact variant of a network, and the fallback to the dense network if the result is slower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.conv import is_conv
from fxfact.errors import ArgumentError, ArgumentTypeError, BudgetError, PlanError
from fxfact.passes import run_passes
from fxfact.search.inference import DenseBaseline, best_inference_passes
from fxfact.utils import Timer
from tests.support import BranchingThreeConvs, FakeTimer, ThreeConvs, millions_of_macs


def last_is_fastest(calls: Sequence[Callable[[], Any]]) -> list[float]:
    return [10.0 - k for k in range(len(calls))]


# for_inference


@pytest.mark.parametrize("kind", [ThreeConvs, BranchingThreeConvs])
def test_for_inference_computes_the_same_on_memory_of_its_own(
    kind: type[ThreeConvs], three_convs: ThreeConvs, x: Tensor
) -> None:
    model = kind().eval()
    model.load_state_dict(three_convs.state_dict())
    quick = fxfact.for_inference(model.train(), x, timer=FakeTimer())
    torch.testing.assert_close(quick(x), three_convs(x), rtol=1e-4, atol=1e-5)
    assert model.training
    model.first.weight.data.zero_()
    model.head.weight.data.zero_()
    torch.testing.assert_close(quick(x), three_convs(x), rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, nn.BatchNorm2d) for module in quick.modules()) == (kind is BranchingThreeConvs)


def test_for_inference_refuses_programs_and_needs_example_inputs(three_convs: ThreeConvs, x: Tensor) -> None:
    with pytest.raises(ArgumentError, match="exported program"):
        fxfact.for_inference(torch.export.export(three_convs, (x,)), x)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="needs example_inputs"):
        fxfact.for_inference(three_convs, None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"timer must be a fxfact\.utils\.Timer, got 3"):
        fxfact.for_inference(three_convs, x, timer=3)  # type: ignore[arg-type]


def test_for_inference_measures_with_this_machines_clock_by_default(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type[Timer]] = []

    def side_by_side(self: Timer, calls: Sequence[Callable[[], Any]], **options: Any) -> list[float]:
        seen.append(type(self))
        return [1.0] * len(calls)

    monkeypatch.setattr(Timer, "side_by_side", side_by_side)
    fxfact.for_inference(nn.Conv2d(3, 8, 3), x)
    assert seen == [Timer]


def test_for_inference_takes_the_variant_that_measures_fastest(three_convs: ThreeConvs, x: Tensor) -> None:
    fastest_first = FakeTimer(side_by_side=lambda calls: [1.0, *[2.0] * (len(calls) - 1)])
    by_pass = {
        timer: fxfact.for_inference(three_convs, x, timer=timer).second.weight
        for timer in (fastest_first, FakeTimer(side_by_side=last_is_fastest))
    }
    is_channels_last = [w.is_contiguous(memory_format=torch.channels_last) for w in by_pass.values()]
    assert is_channels_last == [False, True]
    assert [timer.calls_timed for timer in by_pass] == [[2], [2]]


def test_for_inference_does_not_count_in_buffers_while_it_measures() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.conv(x) + self.calls

    model, x = Counting().eval(), torch.randn(1, 3, 16, 16)
    quick = fxfact.for_inference(model, x, timer=FakeTimer())
    assert float(model.calls) == float(quick.calls) == 0
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-5)


def test_for_inference_in_inference_mode_returns_parameters_that_can_be_trained() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        quick = fxfact.for_inference(model, x, timer=FakeTimer())
    assert not any(tensor.is_inference() for tensor in quick.state_dict().values())
    quick(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_for_inference_and_latency_may_compute_3d_convolutions_with_onednn(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3)).eval().to(dtype)
    x = torch.randn(1, 8, 6, 6, 6, dtype=dtype)
    timer = FakeTimer(side_by_side=last_is_fastest)
    quick = fxfact.for_inference(model, x, timer=timer)
    assert {type(module).__name__ for module in quick.modules() if is_conv(module)} == {
        "OneDNNConv3d" if dtype == torch.float32 else "Conv3d"
    }
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-5)
    small = fxfact.factorize(model, "tucker", budget=fxfact.Latency(0.9, timer=timer), example_inputs=x)
    assert ("onednn" in fxfact.plan_of(small).inference_passes) == (dtype == torch.float32)
    torch.testing.assert_close(fxfact.apply(fxfact.plan_of(small), model)(x), small(x))


class ViewedOutput(nn.Module):
    """Its ``view`` fails on feature maps in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32 * 100, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.relu(self.a(x))).view(x.shape[0], -1))


def test_for_inference_and_latency_leave_out_variants_that_do_not_run(x: Tensor) -> None:
    def timed(calls: Sequence[Callable[[], Any]]) -> list[float]:
        for call in calls:
            call()
        return last_is_fastest(calls)

    timer = FakeTimer(lambda calls: [[3.0] * 2, *[[1.0] * 2] * (len(calls) - 1)], timed)
    model = ViewedOutput().eval()
    with pytest.raises(RuntimeError, match="view size"):
        run_passes(model, ["channels_last"])(x)
    torch.testing.assert_close(fxfact.for_inference(model, x, timer=timer)(x), model(x), rtol=1e-4, atol=1e-5)
    budget = fxfact.Latency(0.9, timer=timer)
    small = fxfact.factorize(model, "tucker", budget=budget, example_inputs=x, verify=True)
    assert fxfact.plan_of(small).rewrites
    assert "channels_last" not in fxfact.plan_of(small).inference_passes
    assert small(x).shape == (2, 4)


def test_for_inference_and_latency_leave_the_callers_random_numbers_alone(x: Tensor) -> None:
    class Noisy(ThreeConvs):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.1 * torch.randn_like(x))

    model = Noisy().eval()
    for timed in (
        lambda: fxfact.for_inference(model, x, timer=FakeTimer()),
        lambda: fxfact.plan(
            model, ["tucker", "channel_svd"], budget=fxfact.Latency(0.7, timer=FakeTimer()), example_inputs=x
        ),
    ):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        timed()
        assert torch.rand(1).equal(expected)


def test_for_inference_merges_stages_and_verify_says_that_they_cannot_be_verified(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 48, 1)).eval()
    small = fxfact.factorize(model, "tucker", rank=0.5, include="2", example_inputs=x)
    merged = fxfact.for_inference(small, x, timer=FakeTimer())
    torch.testing.assert_close(merged(x), small(x), rtol=1e-4, atol=1e-5)
    assert sum(map(is_conv, merged.modules())) == 4
    assert fxfact.verify(model, small, x).ok
    with pytest.raises(PlanError, match=r"2: the plan made 3 stages here.*for_inference"):
        fxfact.verify(model, merged, x)


def test_for_inference_records_its_passes_in_the_plan(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    small = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=x)
    quick = fxfact.for_inference(small, x, timer=FakeTimer(side_by_side=last_is_fastest))
    passes = fxfact.plan_of(quick).inference_passes
    assert passes == ("fold_batch_norms", "merge_pointwise", "channels_last", "pointwise_linear")
    assert fxfact.plan_of(small).inference_passes == ()
    torch.testing.assert_close(fxfact.apply(fxfact.plan_of(quick), model)(x), quick(x), rtol=1e-4, atol=1e-5)


# best_inference_passes and DenseBaseline


def test_best_inference_passes_returns_the_fastest_variant_and_its_time(three_convs: ThreeConvs, x: Tensor) -> None:
    timer = FakeTimer(side_by_side=lambda calls: [20.0, 15.0, 12.0, 10.0][: len(calls)])
    fastest = best_inference_passes(capture(three_convs, x), compiled=False, timer=timer)
    assert (fastest.passes, fastest.ms) == (("fold_batch_norms", "channels_last"), 10.0)
    assert fastest.linear_undecided  # the network has no 1×1 convolution, which would have decided it
    timer = FakeTimer(side_by_side=lambda calls: [10.0, 15.0, 12.0, 20.0][: len(calls)])
    fastest = best_inference_passes(capture(three_convs, x), compiled=False, timer=timer)
    assert (fastest.passes, fastest.ms, fastest.linear_undecided) == ((), 10.0, False)


def test_best_inference_passes_does_not_change_a_program_and_measures_it(three_convs: ThreeConvs, x: Tensor) -> None:
    timer = FakeTimer()
    program = capture(torch.export.export(three_convs, (x,)))
    fastest = best_inference_passes(program, compiled=False, timer=timer)
    assert (fastest.passes, fastest.linear_undecided, timer.calls_timed) == ((), False, [1])


def test_best_inference_passes_needs_example_inputs(three_convs: ThreeConvs) -> None:
    with pytest.raises(BudgetError, match="needs example_inputs"):
        best_inference_passes(capture(three_convs, None), compiled=False, timer=FakeTimer())


def test_dense_baseline_measures_the_dense_network_and_another_one_in_turns(three_convs: ThreeConvs, x: Tensor) -> None:
    timer = FakeTimer()
    baseline = DenseBaseline(capture(three_convs, x), ["fold_batch_norms"], compiled=False, timer=timer)
    dense, other = millions_of_macs(lambda: three_convs(x)), nn.Sequential(nn.Conv2d(3, 4, 3)).train()
    assert baseline.milliseconds() == dense
    assert baseline.compare(other) == (dense, millions_of_macs(lambda: other(x)))
    assert timer.calls_timed == [1, 2]
    assert other.training


# A result that is slower than the dense network


def test_latency_falls_back_to_the_dense_network_if_the_result_is_slower(
    three_convs: ThreeConvs, x: Tensor, error_curves: fxfact.ErrorCurveCache
) -> None:
    taken = iter([[40.0, 30.0, 40.0, 35.0], [30.0], [40.0, 35.0], [30.0, 31.0]])  # variants, dense, trial, result
    budget = fxfact.Latency(0.9, timer=FakeTimer(side_by_side=lambda calls: next(taken)))
    small = fxfact.factorize(three_convs, budget=budget, example_inputs=x, error_curves=error_curves)
    plan = fxfact.plan_of(small)
    assert not plan.rewrites
    assert plan.inference_passes == ("fold_batch_norms",)
    assert plan.measured_ms == (30.0, 30.0)
    assert "the whole network measured slower: 30 → 31 ms" in [decision.reason for decision in plan]
    torch.testing.assert_close(small(x), three_convs(x), rtol=1e-4, atol=1e-5)


def test_latency_warns_if_the_result_is_far_from_the_budget(
    three_convs: ThreeConvs, x: Tensor, error_curves: fxfact.ErrorCurveCache
) -> None:
    taken = iter([[40.0, 30.0, 40.0, 35.0], [32.0], [30.0, 15.0], [30.0, 25.0]])  # variants, dense, trial, result
    timer = FakeTimer(lambda calls: [[4 * millions_of_macs(c)] * 3 for c in calls], lambda calls: next(taken))
    budget = fxfact.Latency(0.5, timer=timer)
    with pytest.warns(UserWarning, match=r"measures 25 ms and the dense network 30 ms.*not what was asked"):
        small = fxfact.factorize(three_convs, budget=budget, example_inputs=x, error_curves=error_curves)
    assert fxfact.plan_of(small).measured_ms == (30.0, 25.0)
