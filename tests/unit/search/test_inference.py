"""Networks for inference: exact passes, budgets of milliseconds, never slower. Times are made up, and so known."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxfact
from fxfact.conv import CHANNELS_LAST, is_conv, write_conv
from fxfact.errors import ArgumentError, BudgetError, PlanError, TimingError
from fxfact.graph import fusion
from fxfact.passes import run_passes
from fxfact.passes.inference_passes import ChannelsLast, FoldBatchNorms, MergePointwise, OneDNN, PointwiseLinear
from fxfact.search import inference, latency_model, latency_search
from fxfact.search.latency_cache import LatencyCache, describe_machine
from fxfact.search.packed_convs import pack_chain
from fxfact.utils import TICK, timing
from tests.support import SPECS, random_input, random_layer

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def normed(channels: int, order: int, **options: Any) -> nn.Module:
    norm = NORMS[order - 1](channels, **options).double().eval()
    random = torch.Generator().manual_seed(1)
    for tensor in [*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())]:
        tensor.data.copy_(torch.rand(tensor.shape, generator=random, dtype=torch.float64) + 0.5)
    return norm


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_becomes_part_of_the_convolution_before_it(name: str, affine: bool) -> None:
    spec = SPECS[name]
    layer = random_layer(spec)
    stages = write_conv(spec, layer.weight.double(), None if layer.bias is None else layer.bias.double())
    model = nn.Sequential(*stages, normed(spec.out_channels, spec.order, affine=affine), nn.ReLU()).eval()
    traced = fx.symbolic_trace(model)
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    result = FoldBatchNorms()(traced)
    assert result is not None
    assert result.modified
    folded = result.graph_module
    assert not any(isinstance(module, NORMS) for module in folded.modules())
    x = random_input(spec).double()
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())
    again = FoldBatchNorms()(folded)
    assert again is not None
    assert not again.modified
    assert again.graph_module is folded


class Awkward(nn.Module):
    """Norms that must stay: in training mode, without statistics, behind what is read elsewhere or called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.training_norm, self.read, self.twice = (nn.BatchNorm2d(4) for _ in range(3))
        self.unknown = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.unknown(self.two(self.training_norm(self.one(x))))
        y = self.three(x)
        z = self.read(y) + y
        return self.twice(self.four(z)) + self.four(x)


def test_a_batch_norm_that_is_not_only_the_convolutions_stays() -> None:
    model = Awkward().eval()
    model.training_norm.train()
    result = FoldBatchNorms()(fx.symbolic_trace(model))
    assert result is not None
    assert not result.modified


@pytest.mark.parametrize("how", ["hook", "own forward", "subclass"])
def test_a_batch_norm_that_does_more_than_its_class_stays(how: str) -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    norm = Doubled(4) if how == "subclass" else nn.BatchNorm2d(4)
    if how == "hook":
        norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    if how == "own forward":
        norm.forward = partial(F.threshold, threshold=0.5, value=1.0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), norm).eval()
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(fxfact.for_inference(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [8, 16])
def test_a_norm_over_the_positions_of_an_unbatched_map_stays(length: int) -> None:
    norm = nn.BatchNorm1d(length).eval()
    norm.running_mean.uniform_()
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), norm).eval()
    x = torch.randn(4, length)
    torch.testing.assert_close(fxfact.for_inference(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_forward_counts_is_not_counted_in_timing() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.conv(x) + self.calls

    model, x = Counting().eval(), torch.randn(1, 3, 16, 16)
    quick = fxfact.for_inference(model, x)
    assert float(model.calls) == float(quick.calls) == 0
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_is_made_in_inference_mode_can_be_trained() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        quick = fxfact.for_inference(model, x)
    assert not any(tensor.is_inference() for tensor in quick.state_dict().values())
    quick(x).sum().backward()


@pytest.mark.parametrize("bias", [(True, True), (False, True), (True, False), (False, False)])
def test_pointwise_neighbours_become_one(bias: tuple[bool, bool]) -> None:
    first, second = nn.Conv2d(6, 8, 1, stride=2, bias=bias[0]), nn.Conv2d(8, 5, 1, bias=bias[1])
    model = nn.Sequential(first, second, nn.ReLU(), nn.Conv2d(5, 5, 3), nn.Conv2d(5, 2, 1)).double().eval()
    result = MergePointwise()(fx.symbolic_trace(model))
    assert result is not None
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-12, atol=1e-12)
    assert sum(map(is_conv, result.graph_module.modules())) == 3
    assert sum(map(is_conv, model.modules())) == 4


@pytest.mark.parametrize("last", [nn.Conv2d(2, 6, 1, padding=1), nn.Conv2d(2, 6, 1, groups=2), nn.Conv2d(2, 6, 1)])
def test_pointwise_neighbours_that_would_grow_or_change_stay(last: nn.Module) -> None:
    result = MergePointwise()(fx.symbolic_trace(nn.Sequential(nn.Conv2d(6, 2, 1), last)))
    assert result is not None
    assert not result.modified


class TiedNorm(nn.Module):
    """Decodes with the weight of a convolution whose batch norm comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), normed(8, 2).float()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv_transpose2d(self.norm(self.conv(x)), self.conv.weight, padding=1)


class ReadPointwise(nn.Module):
    """Gives the weights of two 1×1 convolutions away."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.other(self.one(x)), self.other.weight.square().sum(), self.one.weight.square().sum()


@pytest.mark.parametrize("kind", [TiedNorm, ReadPointwise])
def test_convolutions_whose_weights_are_read_elsewhere_stay(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), torch.randn(4, 3, 8, 8)
    quick = fxfact.for_inference(model, x)
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-4)
    for exact in (FoldBatchNorms(), MergePointwise()):
        result = exact(fx.symbolic_trace(model))
        assert result is not None
        assert not result.modified


def test_a_form_that_computes_something_else_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(TiedNorm(), nn.Conv2d(3, 8, 3)).eval(), torch.randn(4, 3, 8, 8)
    small = fxfact.factorize(model, "tucker", rank="same", example_inputs=x, include="1")
    assert fxfact.verify(model, fxfact.for_inference(small, x), x).ok
    as_if_read_once: dict[object, int] = defaultdict(lambda: 1)
    monkeypatch.setattr(fusion, "_uses", lambda graph_module: as_if_read_once)
    assert not fxfact.verify(model, fxfact.for_inference(small, x), x).ok


def test_channels_last_is_of_the_weights_and_of_what_comes_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    result = ChannelsLast()(fx.symbolic_trace(model))
    assert result is not None
    x = torch.randn(2, 3, 9, 9)
    out = result.graph_module(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
    assert model[0].weight.is_contiguous()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolutions_become_matrix_products_and_stay_convolutions(order: int, bias: bool) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1]
    others = [kind(8, 8, 1, stride=2), kind(8, 8, 1, padding=1), kind(8, 8, 1, groups=2), kind(8, 8, 3, bias=bias)]
    model = nn.Sequential(kind(6, 8, 1, bias=bias), *others, kind(8, 4, 1, bias=bias)).eval()
    result = PointwiseLinear()(fx.symbolic_trace(model))
    assert result is not None
    linear = result.graph_module
    assert [type(module).__name__ for module in linear.modules() if is_conv(module)] == [
        f"PointwiseConv{order}d", *[kind.__name__] * 4, f"PointwiseConv{order}d"
    ]  # fmt: skip
    for form in (torch.contiguous_format, CHANNELS_LAST.get(order + 2, torch.contiguous_format)):
        x = torch.randn(2, 6, *[7] * order).contiguous(memory_format=form)
        for network in (linear, copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)), fx.symbolic_trace(linear)):
            torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear(x[0]), model(x[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(linear, (x,)).module()(x), model(x), rtol=1e-4, atol=1e-5)
    assert {key: value.shape for key, value in linear.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert type(model[0]) is kind
    again = fxfact.factorize(linear, "pointwise_svd", rank=0.9, example_inputs=x, allow_growth=True, verify=True)
    assert "0" in [decision.path for decision in fxfact.plan_of(again).rewrites]


def test_3d_convolutions_are_computed_by_onednn_and_stay_convolutions() -> None:
    left = [nn.Conv3d(8, 8, 3, padding=1, padding_mode="circular"), nn.Conv3d(8, 8, 2, padding="same")]
    named = [nn.Conv3d(8, 8, (1, 3, 5), padding="same", dilation=(1, 1, 2)), nn.Conv3d(8, 8, 2, padding="valid")]
    taken = [
        nn.Conv3d(3, 8, 3, padding=1),
        nn.Conv3d(8, 8, (1, 3, 2), stride=2, dilation=(1, 1, 2), groups=2, bias=False),
    ]
    model = nn.Sequential(*taken, *named, *left, nn.ConvTranspose3d(8, 4, 2)).eval()
    result = OneDNN()(fx.symbolic_trace(model))
    assert result is not None
    quick = result.graph_module
    names = [type(module).__name__ for module in quick.modules() if is_conv(module)]
    assert names == [*["OneDNNConv3d"] * 4, "Conv3d", "Conv3d", "ConvTranspose3d"]
    assert type(model[0]) is nn.Conv3d
    x = torch.randn(1, 3, 9, 8, 10)
    for form in (torch.contiguous_format, torch.channels_last_3d):
        mapped = x.contiguous(memory_format=form)
        for network in (quick, copy.deepcopy(quick), pickle.loads(pickle.dumps(quick)), fx.symbolic_trace(quick)):
            torch.testing.assert_close(network(mapped), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quick(x[0]), model(x[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(quick).double()(x.double()), copy.deepcopy(model).double()(x.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quick(x), model(x))
    for network in (quick, model):
        network(x).square().sum().backward()
    for name, parameter in quick.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, rtol=1e-3, atol=1e-4)
    program = torch.export.export(quick, (x,))
    assert "mkldnn" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_derivatives_forward_and_maps_are_those_of_pytorchs_own_convolution() -> None:
    model, x = nn.Sequential(nn.Conv3d(4, 8, 3)).eval().requires_grad_(requires_grad=False), torch.randn(2, 4, 6, 6, 6)
    other = run_passes(model, ["onednn"])
    one, two = (torch.func.jvp(each, (x,), (torch.ones_like(x),))[1] for each in (model, other))
    torch.testing.assert_close(one, two)
    one, two = (torch.func.vmap(each)(x[:, None]) for each in (model, other))
    torch.testing.assert_close(one, two)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(other(dual)).tangent is not None


@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_what_onednn_computes_is_counted_and_factorized(capture: Any) -> None:
    model = nn.Sequential(nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3)).eval()
    x = torch.randn(1, 8, 6, 6, 6)
    quick = run_passes(model, ["onednn"])
    plans = [fxfact.plan(network, "tucker", rank=0.6, example_inputs=x, capture=capture) for network in (model, quick)]
    assert [plan.network for plan in plans] == [plans[0].network] * 2
    small = fxfact.factorize(quick, "tucker", rank=0.6, exclude="0", example_inputs=x, capture=capture, verify=True)
    assert [d.path for d in fxfact.plan_of(small).rewrites] == ["2"]
    assert type(small.get_submodule("0")).__name__ == "OneDNNConv3d"
    assert len(fxfact.plan_of(fxfact.factorize(fx.symbolic_trace(quick), rank=0.6, example_inputs=x)).rewrites) == 2
    again = fxfact.apply(plans[1], quick)
    torch.testing.assert_close(again(x), fxfact.apply(plans[0], model)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fastest_form_of_a_3d_network_may_be_by_onednn(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3)).eval().to(dtype)
    x = torch.randn(1, 8, 6, 6, 6, dtype=dtype)
    monkeypatch.setattr(inference, "side_by_side", lambda calls, **options: [10.0 - k for k in range(len(calls))])
    quick = fxfact.for_inference(model, x)
    assert {type(module).__name__ for module in quick.modules() if is_conv(module)} == {
        "OneDNNConv3d" if dtype == torch.float32 else "Conv3d"
    }
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-5)
    small = fxfact.factorize(model, "tucker", budget=fxfact.Latency(0.9), example_inputs=x)
    assert ("onednn" in fxfact.plan_of(small).inference_passes) == (dtype == torch.float32)
    torch.testing.assert_close(fxfact.apply(fxfact.plan_of(small), model)(x), small(x))


def test_matrix_products_are_factorized_where_a_model_keeps_its_own_python() -> None:
    class Branches(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.mean() < 100 else x / 2)

    model = run_passes(Branches(nn.Conv2d(6, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval(), ["pointwise_linear"])
    x = torch.randn(2, 6, 5, 5)
    small = fxfact.factorize(model, "pointwise_svd", rank=0.7, exclude="0", example_inputs=x, verify=True)
    assert fxfact.plan_of(small).capture == "modules"
    assert [type(module).__name__ for module in small.children()] == ["PointwiseConv2d", "ReLU", "FactorizedConv2d"]
    torch.testing.assert_close(copy.deepcopy(small)(x), small(x))
    assert fxfact.verify(model, small, x).ok


def test_what_must_not_become_a_matrix_product_does_not() -> None:
    hooked = nn.Conv2d(6, 8, 1)
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    kept = [hooked, nn.ConvTranspose2d(8, 8, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))]
    same = run_passes(nn.Sequential(*kept), ["pointwise_linear"])
    x = torch.randn(2, 6, 5, 5)
    assert same(x).equal(nn.Sequential(*kept)(x))


class Flat(nn.Module):
    """What PyTorch cannot ``view`` so where maps are channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32 * 100, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.relu(self.a(x))).view(x.shape[0], -1))


def test_a_form_in_which_the_network_does_not_run_is_none(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(calls: Sequence[Callable[[], object]], **options: Any) -> list[float]:
        for call in calls:
            call()
        return [10.0 - k for k in range(len(calls))]  # the last is the fastest

    monkeypatch.setattr(inference, "side_by_side", timed)
    monkeypatch.setattr(
        latency_model, "milliseconds", lambda calls, **options: [[3.0] * 2, *[[1.0] * 2] * (len(calls) - 1)]
    )
    model = Flat().eval()
    with pytest.raises(RuntimeError, match="view size"):
        run_passes(model, ["channels_last"])(x)
    torch.testing.assert_close(fxfact.for_inference(model, x)(x), model(x), rtol=1e-4, atol=1e-5)
    small = fxfact.factorize(model, "tucker", budget=fxfact.Latency(0.9), example_inputs=x, verify=True)
    assert fxfact.plan_of(small).rewrites
    assert "channels_last" not in fxfact.plan_of(small).inference_passes
    assert small(x).shape == (2, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 48, 3, padding=1)
        self.third = nn.Conv2d(48, 48, 3, padding=1)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(self.third(torch.relu(self.second(x))).mean((2, 3)))


class Own(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


@pytest.fixture
def model() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Net()
        made.norm.running_mean.normal_()
        made.norm.weight.data.uniform_(0.5, 2)
        return made.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def macs_of(call: Callable[[], Any]) -> float:
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 2e6 + 0.01


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """A machine on which a million multiply-accumulates take a millisecond, and times are kept in a folder of the
    test's; how many calls were timed at once.
    """
    timed: list[int] = []

    def milliseconds(calls: Sequence[Callable[[], Any]], **options: Any) -> list[list[float]]:
        timed.append(len(calls))
        return [[macs_of(call)] * 3 for call in calls]

    monkeypatch.setattr(latency_model, "milliseconds", milliseconds)
    monkeypatch.setattr(inference, "side_by_side", lambda calls, **options: [min(t) for t in milliseconds(calls)])
    monkeypatch.setenv("FXFACT_CACHE", str(tmp_path / "times"))
    return timed


def test_what_a_network_draws_while_it_is_timed_is_not_of_the_callers_generators(x: Tensor) -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.1 * torch.randn_like(x))

    model = Noisy().eval()
    for timed in (
        fxfact.for_inference,
        lambda *of: fxfact.plan(of[0], budget=fxfact.Latency(0.7), example_inputs=of[1]),
    ):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        timed(model, x)
        assert torch.rand(1).equal(expected)


@pytest.mark.parametrize("kind", [Net, Own])
def test_the_form_for_inference_computes_the_same(kind: type[Net], model: Net, x: Tensor) -> None:
    own = kind().eval()
    own.load_state_dict(model.state_dict())
    found = fxfact.for_inference(own.train(), x)
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)
    assert own.training
    own.first.weight.data.zero_()  # the copy has memory of its own
    own.head.weight.data.zero_()
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, nn.BatchNorm2d) for module in found.modules()) == (kind is Own)
    with pytest.raises(ArgumentError, match="exported program"):
        fxfact.for_inference(torch.export.export(model, (x,)), x)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="needs example_inputs"):
        fxfact.for_inference(model, None)  # type: ignore[arg-type]


def test_stages_that_were_merged_cannot_be_verified_and_that_is_said(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 48, 1)).eval()
    small = fxfact.factorize(model, "tucker", rank=0.5, include="2", example_inputs=x)
    merged = fxfact.for_inference(small, x)
    torch.testing.assert_close(merged(x), small(x), rtol=1e-4, atol=1e-5)
    assert sum(map(is_conv, merged.modules())) == 4
    assert fxfact.verify(model, small, x).ok
    with pytest.raises(PlanError, match=r"2: the plan says 3 stages.*for_inference"):
        fxfact.verify(model, merged, x)


@pytest.mark.parametrize("kind", [Net, Own])
@pytest.mark.parametrize("budget", [fxfact.Latency(0.5), fxfact.Latency(at_most_ms=2.0)])
def test_a_budget_of_milliseconds_is_met_as_measured(kind: type[Net], budget: Any, model: Net, x: Tensor) -> None:
    own = kind().eval()
    own.load_state_dict(model.state_dict())
    random_state = torch.get_rng_state()
    small = fxfact.factorize(own, budget=budget, example_inputs=x, verify=True)
    plan = fxfact.plan_of(small)
    assert plan.network.ms == pytest.approx(2 * plan.network.macs / 1e6 + 0.01)
    assert plan.after.ms is not None
    assert plan.after.ms <= budget.allowed(plan.network)
    assert plan.measured_ms is not None
    assert plan.measured_ms[1] == pytest.approx(plan.after.ms, rel=0.05)
    assert not small.training
    assert all(rank % 8 == 0 or rank in (32, 48, 3) for decision in plan.rewrites for rank in decision.rank or ())
    assert "ms" in str(plan)
    assert fxfact.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    again = fxfact.apply(plan, own)
    torch.testing.assert_close(again(x), small(x))
    assert fxfact.verify(own, small, x).ok
    assert fxfact.report(own, small, x).ok
    assert torch.get_rng_state().equal(random_state)  # whether times were known or not


def test_an_exported_program_is_planned_and_rehearsed(
    model: Net, x: Tensor, told: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fxfact"):
        small = fxfact.factorize(torch.export.export(model, (x,)), budget=fxfact.Latency(0.5))
    *rehearsals, last = [text for text in caplog.messages if "carried out" in text]
    assert rehearsals
    assert all("rehearsed with random numbers" in text for text in rehearsals)
    assert "rehearsed" not in last
    plan = fxfact.plan_of(small)
    assert plan.after.ms is not None
    assert plan.network.ms is not None
    assert plan.after.ms <= 0.5 * 1.03 * plan.network.ms
    assert told[-1] == 2  # the rehearsal
    assert isinstance(small, torch.export.ExportedProgram)
    assert fxfact.verify(torch.export.export(model, (x,)), small, x).ok


def test_what_does_not_measure_faster_stays_with_that_reason(
    model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        latency_model, "milliseconds", lambda calls, **options: [[1.0] * 3, *[[2.0] * 3] * (len(calls) - 1)]
    )
    with pytest.raises(BudgetError, match="can go down to"):
        fxfact.plan(model, budget=fxfact.Latency(0.5), example_inputs=x)
    plan = fxfact.plan(model, budget=fxfact.Latency(1.0), example_inputs=x)
    assert not plan.rewrites
    assert "no chain measures faster: 1 ms as it is, 2 ms at best" in plan["second"].reason


def test_a_network_that_is_not_faster_in_the_whole_stays_dense(
    model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter([[40.0, 30.0, 40.0, 35.0], [30.0], [40.0, 35.0], [30.0, 31.0]])  # forms, dense, rehearsal, result
    monkeypatch.setattr(inference, "side_by_side", lambda calls, **options: next(taken))
    small = fxfact.factorize(model, budget=fxfact.Latency(0.9), example_inputs=x)
    plan = fxfact.plan_of(small)
    assert not plan.rewrites
    assert plan.inference_passes == ("fold_batch_norms",)
    assert "the whole network measured slower: 30 → 31 ms" in [decision.reason for decision in plan]
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_network_far_from_what_was_foreseen_is_said(model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([[40.0, 30.0, 40.0, 35.0], [32.0], [30.0, 15.0], [30.0, 25.0]])  # forms, dense, rehearsal, result
    monkeypatch.setattr(inference, "side_by_side", lambda calls, **options: next(taken))
    with pytest.warns(UserWarning, match=r"measures 25 ms and the dense network 30 ms.*not what was asked"):
        small = fxfact.factorize(model, budget=fxfact.Latency(0.5), example_inputs=x)
    assert fxfact.plan_of(small).measured_ms == (30.0, 25.0)


def test_no_chain_is_foreseen_to_take_less_than_nothing(model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "side_by_side", lambda calls, **options: [10.0, 0.5, 10.0, 10.0][: len(calls)])
    plan = fxfact.plan(model, budget=fxfact.Latency(0.9), example_inputs=x)
    assert plan.rewrites
    assert all(decision.milliseconds[1] > 0 for decision in plan.rewrites if decision.milliseconds)


def test_what_one_chain_cannot_save_the_others_do(model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.1, *[0.9] * 99])  # of a convolution's milliseconds, for its chains
    monkeypatch.setattr(
        latency_model, "milliseconds", lambda calls, **options: [[1.0] * 3, *[[next(shares)] * 3] * (len(calls) - 1)]
    )
    monkeypatch.setattr(inference, "side_by_side", lambda calls, **options: [10.0, 5.0, 10.0, 7.1][-len(calls) :])
    plan = fxfact.plan(model, budget=fxfact.Latency(at_most_ms=3.55), example_inputs=x)
    assert len(plan.rewrites) == 3
    assert plan.after.ms == pytest.approx(plan.network.ms * 0.71)
    assert sorted(decision.milliseconds[1] for decision in plan.rewrites) == pytest.approx([0.05, 0.75, 0.75])


def test_plans_are_rehearsed_until_their_networks_meet_the_budget(
    model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def half_as_much(calls: Sequence[Callable[[], Any]], **options: Any) -> list[float]:
        """In the network a chain saves half of what it saves alone."""
        dense, *others = (macs_of(call) for call in calls)
        asked.extend(found := [dense, *(dense - (dense - ms) / 2 for ms in others)])
        return found

    monkeypatch.setattr(inference, "side_by_side", half_as_much)
    plan = fxfact.plan(model, budget=fxfact.Latency(0.7), example_inputs=x)
    assert plan.network.ms is not None
    assert plan.after.ms is not None
    assert plan.after.ms == pytest.approx(asked[-1])
    assert 0.6 * plan.network.ms < plan.after.ms <= 0.7 * 1.03 * plan.network.ms
    assert plan.after.macs is not None
    assert plan.network.macs is not None
    assert plan.after.macs < 0.5 * plan.network.macs
    with pytest.raises(BudgetError, match="can go down to"):
        fxfact.plan(model, budget=fxfact.Latency(0.3), example_inputs=x)


def test_chains_may_save_more_in_the_network_than_the_clock_foresees(
    model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        latency_model, "milliseconds", lambda calls, **options: [[1.0] * 3, *[[0.9] * 3] * (len(calls) - 1)]
    )
    monkeypatch.setattr(inference, "side_by_side", lambda calls, **options: [10.0, 5.0, 10.0, 10.0][: len(calls)])
    with pytest.raises(BudgetError, match="can go down to"):  # 9.7 ms for all that the clock knows
        fxfact.plan(model, budget=fxfact.Latency(0.3), example_inputs=x)
    plan = fxfact.plan(model, budget=fxfact.Latency(at_most_ms=2.52), example_inputs=x)
    assert plan.after.ms == pytest.approx(2.5)
    assert len(plan.rewrites) == 3


def test_networks_that_save_less_or_more_than_their_chains_meet_the_budget(
    model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mild chains save nothing in the network, strong ones twice of what they save alone: no one factor tells that."""

    def little_or_much(calls: Sequence[Callable[[], Any]], **options: Any) -> list[float]:
        dense, *others = map(macs_of, calls)
        return [dense, *(dense - max(0.0, 1.6 * (dense - ms) - 0.6 * dense) for ms in others)]

    monkeypatch.setattr(inference, "side_by_side", little_or_much)
    for share in (0.9, 0.7, 0.5):
        plan = fxfact.plan(model, budget=fxfact.Latency(share), example_inputs=x)
        assert plan.after.ms is not None
        assert plan.network.ms is not None
        assert (share - 0.1) * plan.network.ms < plan.after.ms <= share * 1.03 * plan.network.ms
        front = [point.cost.ms / plan.network.ms for point in plan.pareto_points if point.cost.ms]
        assert min(front) < share < max(front)
        assert " ms " in str(plan.pareto_front).split("\n")[0]


def test_one_bad_rehearsal_does_not_refuse_a_budget(model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed: list[float] = []

    def disturbed_at_first(calls: Sequence[Callable[[], Any]], **options: Any) -> list[float]:
        found = list(map(macs_of, calls))
        if len(calls) == 2:
            rehearsed.append(found[1])
            found[1] = 0.97 * found[0] if len(rehearsed) == 1 else found[1]
        return found

    monkeypatch.setattr(inference, "side_by_side", disturbed_at_first)
    plan = fxfact.plan(model, budget=fxfact.Latency(0.5), example_inputs=x)
    assert plan.after.ms is not None
    assert plan.network.ms is not None
    assert 0.4 * plan.network.ms < plan.after.ms <= 0.5 * 1.03 * plan.network.ms
    assert rehearsed[1] < rehearsed[0]  # the fastest, before it is refused


def test_a_budget_is_refused_by_what_three_rehearsals_say_of_the_fastest_plan(
    model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.9, 0.55, 0.7, 0.6])  # of the plan asked for, and thrice of the fastest

    def rehearsed(calls: Sequence[Callable[[], Any]], **options: Any) -> list[float]:
        dense, *others = map(macs_of, calls)
        return [dense, dense * next(shares)] if len(calls) == 2 else [dense, *others]

    monkeypatch.setattr(inference, "side_by_side", rehearsed)
    with pytest.raises(BudgetError, match=r"can go down to [\d.]+ \(0\.600 of"):
        fxfact.plan(model, budget=fxfact.Latency(0.5), example_inputs=x)
    assert next(shares, None) is None


def test_a_budget_that_no_rehearsal_meets_is_said(model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_search, "_REHEARSALS", 1)
    monkeypatch.setattr(inference, "side_by_side", lambda calls, **options: [10.0, 9.0, 9.5, 9.7][: len(calls)])
    with pytest.warns(UserWarning, match=r"the budget is 6\.3 ms.*fastest measures 8\.1 ms"):
        plan = fxfact.plan(model, budget=fxfact.Latency(0.7), example_inputs=x)
    assert plan.after.ms == pytest.approx(8.1)


@pytest.mark.parametrize("name", ["plain", "strided", "dilated", "groups", "3-D", "1-D", "reflect", "transposed"])
def test_frozen_convolutions_compute_the_same(name: str) -> None:
    layer = random_layer(SPECS[name])
    bias = None if layer.bias is None else layer.bias.float()
    chain = nn.Sequential(*write_conv(layer.spec, layer.weight.float(), bias), nn.Identity())
    x = random_input(layer.spec).float()
    ready = pack_chain(chain, x)
    torch.testing.assert_close(ready(x), chain(x), rtol=1e-4, atol=1e-4)
    packed = name in ("plain", "strided", "dilated", "groups", "3-D") and torch._C._has_mkldnn
    assert is_conv(ready[0]) == (not packed)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_frozen_matrix_products_compute_the_same(order: int) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1]
    chain: Any = run_passes(
        nn.Sequential(kind(6, 8, 3), kind(8, 4, 1, bias=False), kind(4, 5, 1)), ["pointwise_linear"]
    )
    x = torch.randn(2, 6, *[6] * order)
    ready = pack_chain(chain, x)
    torch.testing.assert_close(ready(x), chain(x), rtol=1e-4, atol=1e-4)
    assert sum(map(is_conv, ready)) == (3 if order == 1 else 0 if torch._C.has_mkl else 2)


@pytest.mark.parametrize("faster", [True, False])
def test_chains_are_matrix_products_where_those_measure_faster(
    model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    def measured(calls: Sequence[Callable[[], object]], **options: Any) -> list[list[float]]:
        return (
            [[2.0, 2.0], [1.0 if faster else 3.0] * 2]
            if len(calls) == 2
            else [[1.0 + len(calls)] * 2, *[[1.0] * 2] * (len(calls) - 1)]
        )

    monkeypatch.setattr(latency_model, "milliseconds", measured)
    monkeypatch.setattr(inference, "side_by_side", lambda calls, **options: [20.0, 15.0, 12.0, 10.0][: len(calls)])
    small = fxfact.factorize(model, "tucker", budget=fxfact.Latency(0.8), example_inputs=x)
    plan = fxfact.plan_of(small)
    assert plan.rewrites
    assert ("pointwise_linear" in plan.inference_passes) == faster
    assert any(type(module).__name__ == "PointwiseConv2d" for module in small.modules()) == faster
    torch.testing.assert_close(fxfact.apply(plan, model)(x), small(x))


@pytest.mark.integration
def test_a_budget_for_the_compiler_is_planned_and_compiled(
    model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Callable[..., Any]] = []
    monkeypatch.setattr(inference, "side_by_side", lambda calls, **options: [10.0, 9.0][: len(calls)])
    monkeypatch.setattr(
        latency_model, "milliseconds", lambda calls, **options: [[3.0] * 3, *[[1.0] * 3] * (len(calls) - 1)]
    )
    compiled = inference._compiled

    def noted(network: nn.Module, *given: Any) -> Callable[..., Any]:
        seen.append(network)
        return compiled(network, *given)

    monkeypatch.setattr(inference, "_compiled", noted)
    small = fxfact.factorize(model, budget=fxfact.Latency(0.9, compiled=True), example_inputs=x)
    assert len(seen) == 5  # the dense network, and both side by side, rehearsed and as they are
    torch.testing.assert_close(compiled(small, (x,), {})(x), small(x), rtol=1e-4, atol=1e-4)


def test_what_is_too_short_to_be_timed_stays(model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_model, "milliseconds", lambda calls, **options: [[TICK] * 3] * len(calls))
    plan = fxfact.plan(model, budget=fxfact.Latency(1.0), example_inputs=x)
    assert not plan.rewrites
    assert "too little for this machine's clock" in plan["second"].reason


def test_a_device_that_vanishes_is_said(model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: device is lost")

    monkeypatch.setattr(latency_model, "milliseconds", timing.milliseconds)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(nn.Sequential, "forward", lost)  # of the chains that are timed
    with pytest.raises(TimingError, match=r"did not run.*device is lost.*Nothing was changed"):
        fxfact.plan(model, budget=fxfact.Latency(0.9), example_inputs=x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_under_load_it_says_so_and_plans_by_macs(model: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = [1.0, 2.0, 2.0]
    monkeypatch.setattr(latency_model, "milliseconds", lambda calls, **options: [spread] * len(calls))
    with pytest.warns(UserWarning, match=r"under load.*0\.50 of the MACs"):
        plan = fxfact.plan(model, budget=fxfact.Latency(0.5), example_inputs=x)
    by_macs = fxfact.plan(model, budget=fxfact.Macs(0.5), example_inputs=x)
    assert [d.rank for d in plan] == [d.rank for d in by_macs]


def test_times_are_of_what_a_gpu_s_kernels_are_chosen_by() -> None:
    gpu, before, precise = (
        torch.device("cuda"),
        describe_machine(torch.device("cuda")),
        torch.backends.cudnn.conv.fp32_precision,
    )
    assert "threads" not in before
    assert describe_machine(torch.device("cpu"))["threads"] == torch.get_num_threads()
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # which cudnn.allow_tf32 cannot tell
        assert describe_machine(gpu) != before
    finally:
        torch.backends.cudnn.conv.fp32_precision = precise
    assert describe_machine(gpu) == before


def test_convolutions_that_share_a_weight_are_timed_each_with_its_own_stride(x: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 48, 1)
            self.two = nn.Conv2d(48, 48, 3, padding=1)
            self.three = nn.Conv2d(48, 48, 3, padding=1, stride=2, bias=False)
            self.three.weight = self.two.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.three(torch.relu(self.two(self.one(x))))

    plan = fxfact.plan(Tied().eval(), budget=fxfact.Latency(0.6), example_inputs=x)
    of_all = [sum(d.before.macs for d in plan.rewrites), sum(d.after.macs for d in plan.rewrites)]
    assert [d.path for d in plan.rewrites] == ["two", "three"]
    assert plan["two"].milliseconds == pytest.approx([len(x) * macs / 1e6 for macs in of_all], abs=0.02)
    assert plan.after.ms <= 0.6 * plan.network.ms


def test_neighbours_of_another_order_are_not_merged() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv1d(9, 4, 1)).eval(), torch.randn(3, 9, 9)  # of one sample
    torch.testing.assert_close(fxfact.for_inference(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_times_are_measured_once(model: Net, x: Tensor, told: list[int]) -> None:
    fxfact.plan(model, budget=fxfact.Latency(0.5), example_inputs=x)
    first = list(told)
    assert sum(first) > 20
    told.clear()
    fxfact.plan(model, budget=fxfact.Latency(0.7), example_inputs=x)
    assert told == [first[0], 1, 1, 1, 1, 2]  # forms of the network, its convolutions, itself again, and a rehearsal


@pytest.mark.parametrize("slower", [0.5, 1.2, 4.0])
def test_what_was_kept_under_another_load_is_measured_again(
    model: Net, x: Tensor, told: list[int], tmp_path: Path, slower: float
) -> None:
    """Faster, or a little slower, is scaled, the convolution and its chains alike."""
    expected = fxfact.plan(model, budget=fxfact.Latency(0.5), example_inputs=x)
    (path,) = (tmp_path / "times").iterdir()
    kept = json.loads(path.read_text())
    *_, times = kept["ms"].values()  # of the largest convolution
    times.update({key: slower * ms for key, ms in times.items()})
    path.write_text(json.dumps(kept))
    told.clear()
    found = fxfact.plan(model, budget=fxfact.Latency(0.5), example_inputs=x)
    assert (sum(told) > 20) == (slower > 1.5)
    assert [d.rank for d in found] == [d.rank for d in expected]
    for mine, same in zip(found.rewrites, expected.rewrites, strict=True):
        assert mine.milliseconds == pytest.approx(same.milliseconds)
    assert found.after.ms == pytest.approx(expected.after.ms)
    assert json.loads(path.read_text())["ms"].keys() == kept["ms"].keys()


def test_a_budget_of_milliseconds_needs_inputs_and_numbers(model: Net) -> None:
    with pytest.raises(BudgetError, match="example_inputs"):
        fxfact.plan(model, budget=fxfact.Latency(0.5))
    with pytest.raises(BudgetError, match="no budget"):
        fxfact.Latency(1.5)
    with pytest.raises(BudgetError, match="no budget"):
        fxfact.Latency(0.5, at_most_ms=3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "damaged"),
        (b"\xff\xfe", "can't decode"),
        (b"[]", "damaged"),
        (b'{"format": "fxfact times", "version": 2, "machine": {}, "ms": {"a": {"b": 1.0}}}', "another machine"),
        (
            b'{"format": "fxfact times", "version": 2, "machine": {"kind": "toaster"}, "ms": {"a": {"b": -1.0}}}',
            "no times",
        ),
        (b'{"format": "fxfact times", "version": 2, "machine": {"kind": "toaster"}, "ms": {"a": 1.0}}', "damaged"),
        (
            b'{"format": "fxfact times", "version": 2, "machine": {"kind": "toaster"}, "ms": {"a": {"b": "x"}}}',
            "damaged",
        ),
    ],
)
def test_a_file_of_times_that_cannot_be_used_is_left_aside(content: bytes, words: str) -> None:
    kept = LatencyCache({"kind": "toaster"})
    kept.ms["a"] = {"b": 2.0}
    kept.save()
    assert LatencyCache({"kind": "toaster"}).ms == {"a": {"b": 2.0}}
    assert LatencyCache({"kind": "oven"}).ms == {}
    kept.path.write_bytes(content)
    with pytest.warns(UserWarning, match=words):
        assert LatencyCache({"kind": "toaster"}).ms == {}


def test_times_that_cannot_be_kept_are_used_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXFACT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="measured again"):
        kept = LatencyCache({"kind": "toaster"})
    with pytest.warns(UserWarning, match="FXFACT_CACHE"):
        kept.save()
