"""Transposed convolutions that are called with an output size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxfact
from fxfact.errors import ArgumentError, SpecError
from tests.support import apart, skip_reasons

TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
METHODS = ("cp_factorized", "tucker", "tt", "spatial_svd", "channel_svd")


class Decoder(nn.Module):
    """Halves the size, and restores it by ``output_size``, as decoders with skip connections do."""

    def __init__(self, order: int = 2, groups: int = 1, spelling: str = "size") -> None:
        super().__init__()
        self.down = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1](4, 8, 3, stride=2, padding=1)
        self.up = TRANSPOSED[order](8, 8, 3, stride=2, padding=1, groups=groups)
        self.order, self.spelling = order, spelling

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x).relu()
        if self.spelling == "size":
            return self.up(low, output_size=x.size())
        if self.spelling == "spatial":
            return self.up(low, x.shape[2:])
        if self.spelling == "list":
            return self.up(input=low, output_size=[x.shape[axis] for axis in range(2, 2 + self.order)])
        return self.up(low, (10, 7, 6)[: self.order])


def image(order: int, *sizes: int) -> Tensor:
    return torch.randn(2, 4, *sizes[:order], generator=torch.Generator().manual_seed(0))


def dense_twin(model: nn.Module, result: nn.Module) -> Any:
    """Return the model with the composed kernels in it."""
    twin: Any = copy.deepcopy(model)
    for path, kernel in fxfact.analysis.reference.composed_kernels(result, fxfact.plan_of(result)).items():
        twin.get_submodule(path).weight = nn.Parameter(kernel.detach().clone())
    return twin


@pytest.mark.parametrize("how", ["trace", "modules"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_an_output_size_reaches_the_stage_that_decides_each_size(order: int, method: str, how: str) -> None:
    if method == "spatial_svd" and order == 1:
        pytest.skip("there is one axis only")
    torch.manual_seed(0)
    model, x = Decoder(order).eval(), image(order, 10, 7, 6)
    options: dict[str, Any] = {"include": "up", "allow_growth": True, "capture": how}
    result = fxfact.factorize(model, method, rank=0.9, example_inputs=x, verify=True, **options)
    assert [decision.path for decision in fxfact.plan_of(result).rewrites] == ["up"]
    twin = dense_twin(model, result)
    for sizes in ((10, 7, 6), (9, 8, 7), (7, 7, 8)):
        assert apart(twin(image(order, *sizes)), result(image(order, *sizes))) < 1e-5
    assert result(x[:1]).shape[2:] == x.shape[2:]


@pytest.mark.parametrize("spelling", ["size", "spatial", "list", "constant"])
def test_an_output_size_is_read_in_every_spelling(spelling: str) -> None:
    torch.manual_seed(0)
    model, x = Decoder(2, groups=2, spelling=spelling).eval(), image(2, 10, 7)
    for how in ("trace", "modules"):
        result: Any = fxfact.factorize(
            model, "spatial_svd", rank=0.9, example_inputs=x, include="up", allow_growth=True, capture=how, verify=True
        )
        assert [decision.path for decision in fxfact.plan_of(result).rewrites] == ["up"]
    assert apart(torch.export.export(result, (x,)).module()(x), result(x)) < 1e-6
    program = torch.export.export(model, (x,))
    exported = fxfact.factorize(program, "spatial_svd", rank=0.9, include="up", allow_growth=True)
    assert [decision.path for decision in fxfact.plan_of(exported).rewrites] == ["up"]
    assert fxfact.verify(program, exported, x).ok


class Functional(nn.ConvTranspose2d):
    """Computes its output padding itself."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        extra = [(size + 1) % 2 for size in output_size or (1, 1)]
        return nn.functional.conv_transpose2d(
            x, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation
        )


def test_a_subclass_that_computes_its_output_padding_is_followed() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = Functional(8, 8, 3, stride=2, padding=1)

        def forward(self, x: Tensor, even: Tensor) -> Tensor:
            return self.up(x, [2 * x.shape[2] - 1 + int(even), 2 * x.shape[3] - 1])

    torch.manual_seed(0)
    model, x = Chosen().eval(), torch.randn(2, 8, 5, 6)
    options: dict[str, Any] = {"rank": 0.9, "allow_growth": True, "example_inputs": (x, torch.tensor(1))}
    result = fxfact.factorize(model, "tt", capture="modules", verify=True, **options)
    assert [decision.path for decision in fxfact.plan_of(result).rewrites] == ["up"]
    twin = dense_twin(model, result)
    for even in (torch.tensor(0), torch.tensor(1)):
        assert apart(twin(x, even), result(x, even)) < 1e-5


def test_data_and_refit_work_with_output_sizes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Decoder(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    data = torch.randn(12, 4, 8, 8).split(4)
    result = fxfact.factorize(model, "tucker", rank=0.4, calibration=data, verify=True)
    assert {decision.path for decision in fxfact.plan_of(result).rewrites} == {"0.down", "0.up"}
    better, report = fxfact.refit(result, model, data)
    assert report.paths == ("0.down",), "the patches of the last stage of the other are not known"
    assert fxfact.verify(model, better, data[0]).ok


def test_a_layer_of_a_transposed_convolution_takes_an_output_size() -> None:
    torch.manual_seed(0)
    conv, x = nn.ConvTranspose2d(8, 12, 3, stride=(2, 3), padding=1), torch.randn(2, 8, 5, 4)
    for options in ({}, {"implementation": "mobilenet"}, {"implementation": "reconstructed"}):
        layer = fxfact.nn.CPConv.from_conv(conv, 6, **options)  # type: ignore[arg-type]
        dense = layer.to_conv()
        for size in ((10, 12), [2, 12, 9, 11], (9, 10)):
            assert apart(dense(x, size), layer(x, output_size=size)) < 1e-5
        with pytest.raises((SpecError, ValueError)):
            layer(x, output_size=(11, 12))
    plain = fxfact.nn.CPConv.from_conv(nn.Conv2d(8, 12, 3), 6)
    with pytest.raises(ArgumentError, match="only a transposed convolution"):
        plain(x, output_size=(3, 2))
    assert isinstance(fx.symbolic_trace(plain)(x), Tensor)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fxfact.nn.CPConv.from_conv(conv, 6)

        def forward(self, x: Tensor, like: Tensor) -> Tensor:
            return self.layer(x, output_size=like.size())

    around, like = Around(), torch.empty(2, 12, 10, 12)
    assert fx.symbolic_trace(around)(x, like).equal(around(x, like))


def test_other_arguments_than_an_output_size_are_left_alone() -> None:
    class Named(nn.ConvTranspose2d):
        def forward(self, input: Tensor, output_size: list[int] | None = None, scale: float = 1.0) -> Tensor:
            return super().forward(input, output_size) * scale

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = Named(4, 8, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[12, 12], scale=0.5)

    torch.manual_seed(0)
    model, x = Around().eval(), torch.randn(2, 4, 5, 5)
    result = fxfact.factorize(
        model, "tucker", rank=0.9, example_inputs=x, capture="modules", allow_growth=True, verify=True
    )
    assert skip_reasons(result) == {}
    assert result(x).shape == (2, 8, 12, 12)
