"""Moments are those of the inputs and gradients that autograd computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.calibration import Window
from fxfact.conv import as_matrix


def sum_of_squares(output: Tensor) -> Tensor:
    return output.square().sum()


@pytest.mark.parametrize("path", ["first", "grouped", "up"])
def test_moments_are_those_of_inputs_and_gradients(model: nn.Module, x: Tensor, path: str) -> None:
    x = x[:, :, :7, :7]  # with fewer positions than are sampled, so that the moments are exact
    found = fxfact.calibrate(model, x.split(5), likelihood=sum_of_squares)
    layer, recorded = model.get_submodule(path), {}
    layer.register_forward_hook(
        lambda module, args, output: recorded.update(x=args[0], y=output) or output.retain_grad()
    )
    sum_of_squares(model(x)).backward()
    inputs, gradients = recorded["x"].detach(), recorded["y"].grad
    window = Window(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    groups, metric = layer.groups, found.moments[path]

    def rows(maps: Tensor, *, patched: bool) -> Tensor:
        maps = window.patches(maps).flatten(4) if patched else maps[..., None]
        n, channels, *_, positions = maps.shape
        flat = maps.reshape(n, groups, channels // groups, -1, positions).permute(1, 0, 3, 2, 4)
        return flat.reshape(groups, -1, channels // groups * positions)

    def second(rows: Tensor) -> Tensor:
        return rows.transpose(1, 2) @ rows

    transposed = isinstance(layer, nn.ConvTranspose2d)
    into, out = rows(inputs, patched=not transposed), rows(gradients, patched=transposed)
    torch.testing.assert_close(
        metric.input.factors[0], into.transpose(1, 2) @ into / into.shape[1], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(metric.output.factors[0], second(out) / len(x), rtol=1e-4, atol=1e-6)


def test_kernel_gradient_is_the_product_of_patches_and_output_gradient() -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, bias=False)
    x = torch.randn(1, 4, 9, 9)
    y = layer(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    patches = Window(layer.kernel_size, layer.stride, layer.padding, layer.dilation).patches(x)
    flat = patches[0].movedim(0, 2).flatten(2).flatten(0, 1)  # positions, channels · kernel
    spec = fxfact.ConvSpec.parse(4, 6, (3, 3), stride=2, padding=1, dilation=2)
    torch.testing.assert_close(gradient[0].flatten(1) @ flat, as_matrix(spec, layer.weight.grad), rtol=1e-4, atol=1e-4)
