"""Subclasses of convolutions that hold modules or tensors of their own, or pad, normalize or scale in their forward."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from fxfact.conv import FactorizedModule, is_conv
from fxfact.errors import ArgumentError, CaptureError
from tests.support import apart, factorized, skip_reasons

CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Own(nn.Module):
    """What all subclasses here share: they are mixed in before the convolution of one order."""

    order: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None
    groups: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad = nn.ConstantPad1d((1, 2), 0.0) if self.order == 1 else self._pad_all()
        self.norm = NORMS[self.order](self.weight.shape[0])
        with torch.no_grad():
            self.norm.running_mean.normal_()  # type: ignore[union-attr, operator]

    def _pad_all(self) -> nn.Module:
        kinds = {2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
        return kinds[self.order]((1, 2) * self.order)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any = 0) -> Tensor:
        return FUNCTIONS[self.order](x, weight, bias, self.stride, padding, self.dilation, self.groups)


class PaddedByAModule(_Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(self.pad(x), self.weight, self.bias)


class PaddedBeforeSuper(_Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))


class PaddedBeforeConvForward(_Own):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.pad(x), self.weight, self.bias)


class ReplacedConvForward(_Own):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(self.pad(input), weight, bias)


class PaddedBySize(_Own):
    """Pads so that the output has the input's size divided by the stride, rounded up, whatever the input's size."""

    def forward(self, x: Tensor) -> Tensor:
        amounts: list[int] = []
        for axis in range(self.order):
            size, kernel = x.shape[2 + axis], self.weight.shape[2 + axis]
            reach = self.dilation[axis] * (kernel - 1) + 1
            total = max((math.ceil(size / self.stride[axis]) - 1) * self.stride[axis] + reach - size, 0)
            amounts = [total // 2, total - total // 2, *amounts]
        return self.convolve(F.pad(x, amounts), self.weight, self.bias)


class Normalizing(_Own):
    """Normalizes and applies an activation in its forward, with a bias of another kind."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        x = self.norm(self.convolve(x, self.weight, None, 1)).relu()
        return x + self.bias.reshape(-1, *[1] * self.order)


class Scaling(_Own):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("gain", torch.rand(self.weight.shape[0], *[1] * self.order) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class PaddingOtherwise(_Own):
    """Pads by reflection itself, with the amount that its attributes have for zeros."""

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1,) * 2 * self.order, mode="reflect")
        return self.convolve(padded, self.weight, self.bias)


class WithNumberedModules(_Own):
    """Has children of its own with the names that stages have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_module("0", nn.Tanh())
        self.add_module("1", nn.Hardtanh())

    def forward(self, x: Tensor) -> Tensor:
        first, second = self._modules["0"], self._modules["1"]
        assert first is not None
        assert second is not None
        return second(super().forward(first(x)))


KINDS = (
    PaddedByAModule,
    PaddedBeforeSuper,
    PaddedBeforeConvForward,
    ReplacedConvForward,
    PaddedBySize,
    Normalizing,
    Scaling,
    PaddingOtherwise,
    WithNumberedModules,
)


def make(kind: type[_Own], order: int, *args: Any, **kwargs: Any) -> Any:
    made = type(kind.__name__, (kind, CONVS[order]), {"order": order, "__module__": __name__})
    return made(*args, **kwargs)


def network(kind: type[_Own], order: int) -> nn.Module:
    torch.manual_seed(0)
    first = make(kind, order, 8, 16, 3, stride=2, padding=1)
    second = make(kind, order, 16, 16, 3, padding=1, groups=2)
    return nn.Sequential(first, nn.ReLU(), second).eval()


def inputs(order: int) -> Tensor:
    return torch.randn(2, 8, *(9, 8, 7)[:order], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_are_factorized_by_their_modules_and_keep_their_own(kind: type[_Own], order: int) -> None:
    model, x = network(kind, order), inputs(order)
    result: Any = fxfact.factorize(model, ["tucker", "channel_svd"], rank=0.8, example_inputs=x, capture="modules")
    assert [decision.path for decision in fxfact.plan_of(result).rewrites] == ["0", "2"]
    assert fxfact.verify(model, result, x).ok
    for old, new in zip(model, result, strict=True):
        if is_conv(old):
            assert isinstance(new, FactorizedModule)
            assert {name: type(m) for name, m in old.named_children()}.items() <= {
                name: type(m) for name, m in new.named_children()
            }.items()
            own = {name for name in old.state_dict() if name not in ("weight", "bias")}
            assert all(new.state_dict()[name].equal(old.state_dict()[name]) for name in own)
    other = x[..., :-2]  # another size than that of the example
    composed = copy.deepcopy(model)
    for old, new in zip(composed, result, strict=True):
        if is_conv(old):
            old.weight = nn.Parameter(new.weight.detach().clone())
    assert apart(composed(other), result(other)) < 1e-5
    result.train()(x).square().sum().backward()
    assert all(p.grad is not None for name, p in result.named_parameters() if "norm" not in name)


@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_are_factorized_in_traced_and_exported_graphs(kind: type[_Own]) -> None:
    model, x = network(kind, 2), inputs(2)
    graphs = {"export": fxfact.factorize(torch.export.export(model, (x,)), "tucker", rank=0.8)}
    if kind is not PaddedBySize:  # torch.fx cannot trace math.ceil
        graphs["trace"] = fxfact.factorize(model, "tucker", rank=0.8, example_inputs=x, capture="trace")
    for found in graphs.values():
        assert len(fxfact.plan_of(found).rewrites) == 2
        assert fxfact.verify(model if isinstance(found, nn.Module) else torch.export.export(model, (x,)), found, x).ok


def test_graphs_and_modules_name_convolutions_that_pad_by_a_module_alike() -> None:
    model, x = network(PaddedByAModule, 2), inputs(2)
    by_graph, by_modules = (factorized(model, x, capture=how) for how in ("trace", "modules"))
    assert [d.path for d in fxfact.plan_of(by_graph)] == [d.path for d in fxfact.plan_of(by_modules)] == ["0", "2"]
    names = {name for name in by_modules.state_dict() if ".norm" not in name}
    assert set(by_graph.state_dict()) == names, "but for the norm, which this forward does not call"
    assert "0.pad" in dict(by_graph.named_modules())
    shown = str(fxfact.inspect(by_graph, example_inputs=x))
    assert shown.count("tucker") == 2
    assert fxfact.inspect(by_graph, example_inputs=x).rows[0].relative_error is not None


@pytest.mark.parametrize("kind", [PaddedByAModule, ReplacedConvForward, Normalizing, WithNumberedModules])
def test_a_factorized_subclass_is_copied_saved_and_planned_again(kind: type[_Own], tmp_path: Path) -> None:
    model, x = network(kind, 2), inputs(2)
    result = factorized(model, x, capture="modules")
    plan = fxfact.plan_of(result)
    assert fxfact.apply(plan, model)(x).equal(result(x)), "without example inputs the plan knows what forward computes"
    assert copy.deepcopy(result)(x).equal(result(x))
    fxfact.save(result, tmp_path / "result.pt")
    assert fxfact.load(tmp_path / "result.pt", network(kind, 2))(x).equal(result(x))
    again = fxfact.factorize(result, "svd", rank=0.5, example_inputs=x, capture="modules", allow_growth=True)
    assert {d.path.count(".") for d in fxfact.plan_of(again).rewrites} == {1}


def test_a_factorized_subclass_is_compiled_and_exported() -> None:
    x, kinds = inputs(2), (PaddedByAModule, ReplacedConvForward, Normalizing)
    convs = [make(kind, 2, 8, 8, 3, padding=1) for kind in kinds]
    result = factorized(nn.Sequential(*convs).eval(), x, capture="modules")
    assert len(fxfact.plan_of(result).rewrites) == 3
    for made in (torch.compile(result, backend="aot_eager"), torch.export.export(result, (x,)).module()):
        assert apart(result(x), made(x)) < 1e-6


class Pickled(nn.Conv2d):
    """Pads by a module."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3)
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(self.pad(input), self.weight, self.bias)


def test_a_factorized_subclass_with_children_is_pickled() -> None:
    result = factorized(nn.Sequential(Pickled()), inputs(2), capture="modules")
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(inputs(2)).equal(result(inputs(2)))


class Resized(nn.ConvTranspose2d):
    """A transposed convolution that crops and smooths by modules of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.crop, self.smooth = nn.ZeroPad2d(-1), nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self.smooth(self.crop(super().forward(x)))


@pytest.mark.parametrize("how", ["trace", "modules"])
def test_a_transposed_convolution_keeps_its_own_modules(how: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Resized(8, 16, 3, stride=2, padding=1, output_padding=1, groups=2)).eval(), inputs(2)
    result: Any = fxfact.factorize(model, "channel_svd", rank=0.9, example_inputs=x, capture=how, verify=True)
    assert [decision.path for decision in fxfact.plan_of(result).rewrites] == ["0"]


class Beside(nn.Conv2d):
    """Adds what a convolution that it holds computes, as adapters do."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.side(input)


@pytest.mark.parametrize("how", ["trace", "modules"])
def test_a_convolution_and_one_that_it_holds_are_both_rewritten(how: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Beside()).eval(), inputs(2)
    result: Any = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=x, capture=how, verify=True)
    assert {decision.path for decision in fxfact.plan_of(result).rewrites} == {"0", "0.side"}
    rows = {row.path: row for row in fxfact.inspect(result, example_inputs=x).rows}
    assert rows.keys() == {"0", "0.side"}
    assert all(len(row.stages) == 3 and row.relative_error is not None for row in rows.values())


class Standardizing(nn.Conv2d):
    """Standardizes its weight, and pads by a module, as BiT does."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3)
        self.pad = nn.ZeroPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, 8, -1), None, None, training=True).reshape_as(self.weight)
        return F.conv2d(self.pad(x), weight, self.bias)


class Binarized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.conv2d(x, self.weight, self.bias.sign())


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.weight, self.bias, 1, 1), self.weight, self.bias, 1, 0)


class Inverting(nn.Conv2d):
    """Replaces ``_conv_forward`` by a convolution with another kernel."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, -weight, bias)


def test_subclasses_that_compute_something_else_are_refused_with_a_reason() -> None:
    torch.manual_seed(0)
    kinds = {"other": Standardizing(), "bias": Binarized(8, 8, 3), "twice": Twice(8, 8, 3), "minus": Inverting(8, 8, 3)}
    model, x = nn.Sequential(), torch.randn(2, 8, 16, 16)
    for name, conv in {**kinds, "plain": nn.Conv2d(8, 8, 3)}.items():
        model.add_module(name, conv)
    result = factorized(model.eval(), x, capture="modules")
    assert [decision.path for decision in fxfact.plan_of(result).rewrites] == ["plain"]
    left = skip_reasons(result)
    assert "also read by aten" in left["other"]
    assert left["bias"] == "its forward computes its bias"
    assert left["twice"] == "its forward convolves with different settings"
    assert "also read by aten.neg" in left["minus"]
    folded = fxfact.factorize(model, rank=0.5, example_inputs=x, capture="trace", fold_weights=True, verify=True)
    assert {"other", "minus", "plain"} <= {d.path.partition(".")[0] for d in fxfact.plan_of(folded).rewrites}


class Changing(nn.Conv2d):
    """Convolves with a stride that depends on the size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=1 if x.shape[-1] < 9 else 2)


def test_settings_that_change_later_raise_an_error_and_not_another_output() -> None:
    result = factorized(nn.Sequential(Changing(8, 8, 3)), inputs(2), capture="modules")
    with pytest.raises(ArgumentError, match=r"as Conv2d\(8→8, 3×3, stride 2\), but it replaces Conv2d\(8→8, 3×3\)"):
        result(torch.randn(2, 8, 9, 9))


def test_quantization_aware_convolutions_say_that_they_come_later() -> None:
    config = torch.ao.quantization.get_default_qat_qconfig()
    conv = torch.ao.nn.qat.Conv2d(8, 8, 3, qconfig=config)
    fused = torch.ao.nn.intrinsic.qat.ConvBn2d(8, 8, 3, qconfig=config)
    model = nn.Sequential(conv, fused, nn.Conv2d(8, 8, 3)).eval()
    plan = fxfact.plan(model, rank=0.5, example_inputs=torch.randn(2, 8, 9, 9))
    assert [decision.path for decision in plan.rewrites] == ["2"]
    assert plan["1"].reason.startswith("torch.ao.nn.intrinsic.qat.modules.conv_fused.ConvBn2d quantizes its weight: ")
    traced = fxfact.plan(nn.Sequential(conv), capture="trace")
    for found in (plan, traced):
        assert found["0"].reason.startswith("torch.ao.nn.qat.modules.conv.Conv2d quantizes its weight: factorize the ")
    exported = fxfact.plan(torch.export.export(nn.Sequential(conv).eval(), (torch.randn(2, 8, 9, 9),)))
    assert "before you prepare it for quantization" in exported.decisions[0].reason


def test_a_model_without_reachable_convolutions_says_so_before_data_are_read() -> None:
    class Unreached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Standardizing(), Standardizing()

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).relu())
            return (x if x.sum() < 1e9 else x + 1).mean((2, 3))

    read = []

    class Data:
        def __iter__(self) -> Iterator[Tensor]:
            for number in range(4):
                read.append(number)
                yield torch.randn(4, 8, 9, 9)

    model, words = (
        Unreached().eval(),
        "none of the 2 layers of Unreached can be rewritten.* a: its weight is also",
    )
    calls: list[Callable[[], object]] = [
        lambda: fxfact.plan(model, rank=0.5, calibration=Data()),
        lambda: fxfact.plan(model, budget=fxfact.Macs(0.5), calibration=Data()),
        lambda: fxfact.plan(model, budget=fxfact.Loss(0.5), calibration=Data()),
        lambda: fxfact.calibrate(model, Data()),
    ]
    for call in calls:
        read.clear()
        with pytest.raises(CaptureError, match=words):
            call()
        assert read == [0], "the sample to capture the model with"
    assert not fxfact.plan(model, example_inputs=torch.randn(4, 8, 9, 9)).rewrites
    with pytest.raises(CaptureError, match="calls no convolution"):
        fxfact.calibrate(nn.Sequential(nn.ReLU()), Data())


def test_data_reach_convolutions_that_hold_modules() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(network(PaddedByAModule, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    data = torch.randn(16, 8, 9, 8).split(4)
    for how in ("trace", "modules"):
        statistics = fxfact.calibrate(body, data, capture=how)  # type: ignore[arg-type]
        assert set(statistics.specs) == {"0.0", "0.2", "3"}
        result = fxfact.factorize(body, "tucker", rank=0.6, calibration=statistics, example_inputs=data[0], capture=how)  # type: ignore[arg-type]
        assert fxfact.verify(body, result, data[0]).ok
