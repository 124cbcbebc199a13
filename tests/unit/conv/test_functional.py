"""Convolutions as functions: their calls are read and written."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfact.conv import looks_like_conv, read_call, run_weight, spec_of, write_call
from fxfact.conv.convolve import from_torch
from tests.support import apart, random_input

aten = torch.ops.aten
PLAIN = {"F.conv2d": F.conv2d, "torch.conv2d": torch.conv2d, "aten.conv2d": aten.conv2d.default}


@pytest.mark.parametrize("function", PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.parametrize("by_name", [False, True])
def test_a_call_is_read_as_it_computes(function: Any, by_name: bool) -> None:
    x, weight, bias = torch.randn(2, 4, 9, 9), torch.randn(6, 2, 3, 3), torch.randn(6)
    args = (x, weight, bias) if by_name else (x, weight, bias, (2, 1), (1, 0), (1, 2), 2)
    kwargs = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2} if by_name else {}
    call = read_call(function, args, kwargs)
    assert call is not None
    assert (call.input is x, call.weight is weight, call.bias is bias, call.transposed) == (True, True, True, False)
    spec = call.spec_for(weight.shape, bias=True)
    assert apart(function(*args, **kwargs), run_weight(spec, weight, bias, x)) < 1e-6


@pytest.mark.parametrize("function", [F.conv_transpose1d, aten.conv_transpose1d.default, aten.convolution.default])
def test_a_call_of_a_transposed_convolution_has_its_weight_in_the_layout_of_torch(function: Any) -> None:
    x, weight = torch.randn(2, 4, 9), torch.randn(4, 3, 5)
    general = function is aten.convolution.default
    args = (x, weight, None, (3,), (1,), (1,), True, (2,), 2) if general else (x, weight, None, (3,), (1,), (2,), 2)
    call = read_call(function, args, {})
    assert call is not None
    assert call.transposed
    spec = call.spec_for(weight.shape, bias=False)
    assert (spec.in_channels, spec.out_channels, spec.groups, spec.output_padding) == (4, 6, 2, (2,))
    assert apart(function(*args), run_weight(spec, from_torch(spec, weight), None, x)) < 1e-6


def test_other_functions_are_not_read() -> None:
    assert read_call(torch.relu, (torch.zeros(1),), {}) is None
    assert read_call(F.unfold, (), {}) is None


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3, stride=2),
        nn.Conv3d(4, 6, 2, padding=1),
        nn.ConvTranspose2d(4, 6, 3, output_padding=0),
        nn.Linear(4, 6),
    ],
)
def test_a_module_is_written_as_the_call_that_it_makes(module: nn.Module) -> None:
    function, settings = write_call(module)
    x = random_input(spec_of(module), torch.float32)
    assert torch.equal(function(x, module.weight, module.bias, *settings), module(x))


def test_what_autograd_calls_for_convolutions_is_none() -> None:
    def conv2d_backward_compatible() -> None: ...

    gradients = (torch.ops.aten.convolution_backward, torch.ops.aten.convolution_backward.default)
    assert not any(map(looks_like_conv, gradients))
    assert looks_like_conv(conv2d_backward_compatible)


LINEAR_CALLS: dict[str, Any] = {
    "linear": lambda x, weight, bias: (F.linear, (x, weight, bias), {}, False),
    "linear by name": lambda x, weight, bias: (F.linear, (x,), {"weight": weight, "bias": bias}, False),
    "aten.linear": lambda x, weight, bias: (aten.linear.default, (x, weight, bias), {}, False),
    "addmm": lambda x, weight, bias: (torch.addmm, (bias, x, weight.T), {}, True),
    "addmm by name": lambda x, weight, bias: (torch.addmm, (), {"input": bias, "mat1": x, "mat2": weight.T}, True),
    "aten.addmm": lambda x, weight, bias: (aten.addmm.default, (bias, x, weight.T), {"beta": 1, "alpha": 1}, True),
    "mm": lambda x, weight, bias: (torch.mm, (x, weight.T), {}, True),
    "matmul": lambda x, weight, bias: (Tensor.matmul, (x, weight.T), {}, True),
    "matmul by name": lambda x, weight, bias: (torch.matmul, (x,), {"other": weight.T}, True),
    "@": lambda x, weight, bias: (operator.matmul, (x, weight.T), {}, True),
}


@pytest.mark.parametrize("spelling", LINEAR_CALLS)
def test_a_linear_layer_is_read_in_every_spelling(spelling: str) -> None:
    x, weight, bias = torch.randn(5, 4), torch.randn(6, 4), torch.randn(6)
    function, args, kwargs, transposed = LINEAR_CALLS[spelling](x, weight, bias)
    call = read_call(function, args, kwargs)
    assert call is not None
    assert (call.is_linear, call.is_product, call.transposed) == (True, transposed, transposed)
    assert call.input is x
    spec = call.spec_for(call.weight.shape, bias=call.bias is not None)
    assert (spec.kind, spec.in_channels, spec.out_channels) == ("linear", 4, 6)
    assert apart(function(*args, **kwargs), run_weight(spec, from_torch(spec, call.weight), call.bias, x)) < 1e-6


def test_a_scaled_product_is_no_linear_layer() -> None:
    x = torch.randn(4, 4)
    for function, args, kwargs in (
        (torch.addmm, (x, x, x), {"beta": 0.5}),
        (torch.addmm, (x, x, x), {"alpha": 2}),
        (torch.matmul, (x, x), {"out": x}),
    ):
        assert read_call(function, args, kwargs) is None  # type: ignore[arg-type]
