"""The exact passes for inference: what each changes, what it leaves alone, and that outputs stay the same."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxfact
from fxfact.conv import CHANNELS_LAST, ConvSpec, is_conv, write_conv
from fxfact.errors import PlanError
from fxfact.graph import fusion
from fxfact.passes import (
    INFERENCE_PASSES,
    MODULE_PASSES,
    ChannelsLast,
    FoldBatchNorms,
    InferencePass,
    MergePointwise,
    OneDNN,
    PointwiseLinear,
    can_be_linear,
    can_be_onednn,
    linear_passes,
    run_passes,
)
from tests.support import SPECS, FakeTimer, random_input, random_layer

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def batch_norm(channels: int, order: int, **options: Any) -> nn.Module:
    norm = NORMS[order - 1](channels, **options).double().eval()
    generator = torch.Generator().manual_seed(1)
    for tensor in [*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())]:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    return norm


def run_pass(inference_pass: InferencePass, model: nn.Module) -> Any:
    result = inference_pass(model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model))
    assert result is not None
    return result


def optimized(model: nn.Module, x: Tensor) -> nn.Module:
    return fxfact.for_inference(model, x, timer=FakeTimer())


# The registry


def test_inference_passes_are_registered_by_name_in_the_order_in_which_they_run() -> None:
    assert list(INFERENCE_PASSES) == [
        "fold_batch_norms", "merge_pointwise", "channels_last", "pointwise_linear", "onednn"
    ]  # fmt: skip
    assert all(kind.name == name for name, kind in INFERENCE_PASSES.items())
    assert MODULE_PASSES == ("channels_last", "pointwise_linear", "onednn")


def test_run_passes_refuses_an_unknown_name() -> None:
    with pytest.raises(PlanError, match=r"'fuse' is not an inference pass. There are: fold_batch_norms, .*onednn"):
        run_passes(nn.Conv2d(3, 3, 1), ["fuse"])


def test_run_passes_leaves_out_passes_that_need_a_graph_if_there_is_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
    result = run_passes(model, list(INFERENCE_PASSES))
    assert [type(module).__name__ for module in result] == ["Conv2d", "BatchNorm2d", "PointwiseConv2d"]
    assert result is not model
    assert [type(module).__name__ for module in model] == ["Conv2d", "BatchNorm2d", "Conv2d"]
    traced = run_passes(fx.symbolic_trace(model), list(INFERENCE_PASSES))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in traced.modules())


def test_linear_passes_need_channels_last_only_if_a_convolution_has_two_axes_or_more() -> None:
    one_axis, two_axes = ConvSpec.parse(4, 4, 3, order=1), ConvSpec.parse(4, 4, (3, 3))
    assert linear_passes([one_axis]) == linear_passes([]) == ("pointwise_linear",)
    assert linear_passes([one_axis, two_axes]) == ("channels_last", "pointwise_linear")


def test_can_be_linear_and_can_be_onednn_read_the_spec() -> None:
    assert can_be_linear(ConvSpec.parse(4, 8, (1, 1)))
    assert not any(can_be_linear(ConvSpec.parse(4, 8, (1, 1), **other)) for other in ({"groups": 2}, {"stride": 2}))
    assert can_be_onednn(ConvSpec.parse(4, 8, (3, 3, 3), padding=1))
    assert not can_be_onednn(ConvSpec.parse(4, 8, (3, 3, 3), transposed=True))
    assert not can_be_onednn(ConvSpec.parse(4, 8, (3, 3, 3), padding=1, padding_mode="circular"))
    assert not can_be_onednn(ConvSpec.parse(4, 8, (2, 2, 2), padding="same"))
    assert not can_be_onednn(ConvSpec.parse(4, 8, (3, 3)))


# Batch norms


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.order])
@pytest.mark.parametrize("affine", [True, False])
def test_fold_batch_norms_folds_into_any_convolution(name: str, affine: bool) -> None:
    spec = SPECS[name]
    layer = random_layer(spec)
    stages = write_conv(spec, layer.weight.double(), None if layer.bias is None else layer.bias.double())
    model = nn.Sequential(*stages, batch_norm(spec.out_channels, spec.order, affine=affine), nn.ReLU()).eval()
    traced = fx.symbolic_trace(model)
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    result = run_pass(FoldBatchNorms(), traced)
    assert result.modified
    folded = result.graph_module
    assert not any(isinstance(module, NORMS) for module in folded.modules())
    x = random_input(spec).double()
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())
    again = run_pass(FoldBatchNorms(), folded)
    assert not again.modified
    assert again.graph_module is folded


class UnfoldableNorms(nn.Module):
    """Norms in training mode, without statistics, after a value that is read elsewhere, and called twice."""

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


def test_fold_batch_norms_leaves_norms_that_are_not_only_of_one_convolution() -> None:
    model = UnfoldableNorms().eval()
    model.training_norm.train()
    assert not run_pass(FoldBatchNorms(), model).modified


@pytest.mark.parametrize("how", ["hook", "own forward", "subclass"])
def test_fold_batch_norms_leaves_norms_that_do_more_than_their_class(how: str) -> None:
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
    torch.testing.assert_close(optimized(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [8, 16])
def test_fold_batch_norms_leaves_a_norm_over_the_positions_of_an_unbatched_input(length: int) -> None:
    norm = nn.BatchNorm1d(length).eval()
    norm.running_mean.uniform_()
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), norm).eval()
    x = torch.randn(4, length)
    torch.testing.assert_close(optimized(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


# Merging 1×1 convolutions


@pytest.mark.parametrize("bias", [(True, True), (False, True), (True, False), (False, False)])
def test_merge_pointwise_merges_two_consecutive_convolutions(bias: tuple[bool, bool]) -> None:
    first, second = nn.Conv2d(6, 8, 1, stride=2, bias=bias[0]), nn.Conv2d(8, 5, 1, bias=bias[1])
    model = nn.Sequential(first, second, nn.ReLU(), nn.Conv2d(5, 5, 3), nn.Conv2d(5, 2, 1)).double().eval()
    merged = run_pass(MergePointwise(), model).graph_module
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-12, atol=1e-12)
    assert sum(map(is_conv, merged.modules())) == 3
    assert sum(map(is_conv, model.modules())) == 4


@pytest.mark.parametrize("last", [nn.Conv2d(2, 6, 1, padding=1), nn.Conv2d(2, 6, 1, groups=2), nn.Conv2d(2, 6, 1)])
def test_merge_pointwise_leaves_convolutions_that_would_grow_or_change(last: nn.Module) -> None:
    assert not run_pass(MergePointwise(), nn.Sequential(nn.Conv2d(6, 2, 1), last)).modified


def test_merge_pointwise_leaves_convolutions_of_different_order() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv1d(9, 4, 1)).eval(), torch.randn(3, 9, 9)  # one sample
    torch.testing.assert_close(optimized(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


class TiedNorm(nn.Module):
    """Decodes with the weight of a convolution that a batch norm follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), batch_norm(8, 2).float()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv_transpose2d(self.norm(self.conv(x)), self.conv.weight, padding=1)


class ReturnedWeights(nn.Module):
    """Returns values of the weights of two 1×1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.other(self.one(x)), self.other.weight.square().sum(), self.one.weight.square().sum()


@pytest.mark.parametrize("kind", [TiedNorm, ReturnedWeights])
def test_fusion_leaves_convolutions_whose_weights_are_read_elsewhere(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(optimized(model, x)(x), model(x), rtol=1e-4, atol=1e-4)
    for fusion_pass in (FoldBatchNorms(), MergePointwise()):
        assert not run_pass(fusion_pass, model).modified


def test_verify_finds_a_fusion_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(TiedNorm(), nn.Conv2d(3, 8, 3)).eval(), torch.randn(4, 3, 8, 8)
    small = fxfact.factorize(model, "tucker", rank="same", example_inputs=x, include="1")
    assert fxfact.verify(model, optimized(small, x), x).ok
    as_if_read_once: dict[object, int] = defaultdict(lambda: 1)
    monkeypatch.setattr(fusion, "_count_uses", lambda graph_module: as_if_read_once)
    assert not fxfact.verify(model, optimized(small, x), x).ok


# Memory format and matrix products


def test_channels_last_converts_weights_and_so_the_outputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    x = torch.randn(2, 3, 9, 9)
    out = run_pass(ChannelsLast(), model).graph_module(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
    assert model[0].weight.is_contiguous()


def test_channels_last_keeps_shared_weights_shared() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    model[1].weight = model[0].weight
    result = run_passes(model, ["channels_last"])
    assert result[0].weight is result[1].weight
    assert result[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_linear_changes_only_plain_1x1_convolutions_and_they_stay_convolutions(
    order: int, bias: bool
) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1]
    others = [kind(8, 8, 1, stride=2), kind(8, 8, 1, padding=1), kind(8, 8, 1, groups=2), kind(8, 8, 3, bias=bias)]
    model = nn.Sequential(kind(6, 8, 1, bias=bias), *others, kind(8, 4, 1, bias=bias)).eval()
    linear = run_pass(PointwiseLinear(), model).graph_module
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
    again = fxfact.factorize(linear, "svd", rank=0.9, example_inputs=x, allow_growth=True, verify=True)
    assert "0" in [decision.path for decision in fxfact.plan_of(again).rewrites]


def test_pointwise_linear_is_factorized_in_a_model_that_keeps_its_own_python() -> None:
    class Branches(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.mean() < 100 else x / 2)

    model = run_passes(Branches(nn.Conv2d(6, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval(), ["pointwise_linear"])
    x = torch.randn(2, 6, 5, 5)
    small = fxfact.factorize(model, "svd", rank=0.7, exclude="0", example_inputs=x, verify=True)
    assert fxfact.plan_of(small).capture == "modules"
    assert [type(module).__name__ for module in small.children()] == ["PointwiseConv2d", "ReLU", "FactorizedConv2d"]
    torch.testing.assert_close(copy.deepcopy(small)(x), small(x))
    assert fxfact.verify(model, small, x).ok


def test_pointwise_linear_leaves_hooks_transposed_convolutions_and_parametrizations() -> None:
    hooked = nn.Conv2d(6, 8, 1)
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    kept = [hooked, nn.ConvTranspose2d(8, 8, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))]
    same = run_passes(nn.Sequential(*kept), ["pointwise_linear"])
    x = torch.randn(2, 6, 5, 5)
    assert same(x).equal(nn.Sequential(*kept)(x))


# oneDNN


def test_onednn_computes_plain_3d_convolutions_and_they_stay_convolutions() -> None:
    left = [nn.Conv3d(8, 8, 3, padding=1, padding_mode="circular"), nn.Conv3d(8, 8, 2, padding="same")]
    named = [nn.Conv3d(8, 8, (1, 3, 5), padding="same", dilation=(1, 1, 2)), nn.Conv3d(8, 8, 2, padding="valid")]
    taken = [
        nn.Conv3d(3, 8, 3, padding=1),
        nn.Conv3d(8, 8, (1, 3, 2), stride=2, dilation=(1, 1, 2), groups=2, bias=False),
    ]
    model = nn.Sequential(*taken, *named, *left, nn.ConvTranspose3d(8, 4, 2)).eval()
    quick = run_pass(OneDNN(), model).graph_module
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


def test_onednn_has_the_derivatives_and_batching_of_pytorchs_own_convolution() -> None:
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
def test_onednn_convolutions_are_counted_and_factorized(capture: Any) -> None:
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
