"""Layers with one more axis: at first they map every frame as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact.nn as fnn
from fxfact.errors import ArgumentError, FxfactError, RefusedError
from tests.support import apart

VARIANTS = [
    ("cp", "factorized"),
    ("cp", "mobilenet"),
    ("cp", "reconstructed"),
    ("cp_mobilenet", "factorized"),
    ("tucker", "factorized"),
    ("tucker", "reconstructed"),
    ("tt", "factorized"),
    ("tt", "reconstructed"),
]
CONVS = {
    "plain": nn.Conv2d(6, 8, 3, padding=1),
    "strided, no bias": nn.Conv2d(6, 8, 3, stride=2, bias=False),
    "groups": nn.Conv2d(6, 8, 3, groups=2),
    "thin": nn.Conv2d(6, 8, (1, 3)),
    "1-D": nn.Conv1d(6, 8, 5),
    "3-D": nn.Conv3d(6, 8, (2, 3, 1)),
    "transposed": nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2),
}
variants = pytest.mark.parametrize(("factorization", "implementation"), VARIANTS)


def layer_of(conv: nn.Module, factorization: str, implementation: str) -> fnn.FactorizedConv:
    options = {"factorization": factorization, "implementation": implementation}
    return fnn.FactorizedConv.from_conv(conv, 0.7, decompose_weights=False, **options).double()


def clip_of(conv: Any, axis: int, frames: int = 4) -> Tensor:
    sizes = [5, 6, 4][: len(conv.kernel_size)]
    shape = (2, 6, *sizes[:axis], frames, *sizes[axis:])
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONVS)
@variants
def test_transducted_layer_maps_every_frame_as_before(factorization: str, implementation: str, name: str) -> None:
    layer = layer_of(CONVS[name], factorization, implementation)
    for axis in range(layer.order + 1):
        clip = clip_of(CONVS[name], axis)
        video = layer.transduct(3, axis)
        expected = torch.stack([layer(frame) for frame in clip.unbind(axis + 2)], dim=axis + 2)
        assert apart(expected, video(clip)) < 1e-10
        assert video.order == layer.order + 1
        assert video.implementation == layer.implementation
    video(clip).sum().backward()
    assert all(p.grad is not None for p in video.parameters())
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({"kernel_size": 1}, [0, 1, 2, 3, 4, 5]),
        ({"kernel_size": 2}, [0, 1, 2, 3, 4, 5]),
        ({"kernel_size": 4, "dilation": 2}, [0, 1, 2, 3, 4, 5]),
        ({"kernel_size": 2, "stride": 2}, [0, 2, 4]),
        ({"kernel_size": 3, "padding": 0}, [1, 2, 3, 4]),
        ({"kernel_size": 3, "stride": 2}, [0, 2, 4]),
        ({"kernel_size": 3, "padding": 0, "dilation": 2}, [2, 3]),
    ],
    ids=str,
)
@variants
def test_transducted_layer_takes_settings(
    factorization: str, implementation: str, options: dict[str, int], frames: list[int]
) -> None:
    layer, clip = layer_of(CONVS["plain"], factorization, implementation), clip_of(CONVS["plain"], 0, 6)
    expected = torch.stack([layer(clip[:, :, frame]) for frame in frames], dim=2)
    video = layer.transduct(**options)
    assert apart(expected, video(clip)) < 1e-10
    assert apart(expected, video.to_conv()(clip)) < 1e-10
    dense = fnn.transduct_conv(layer.to_conv(), **options)
    assert apart(expected, dense(clip)) < 1e-10


@variants
def test_only_the_new_stage_is_trained_on_demand(factorization: str, implementation: str) -> None:
    layer = layer_of(CONVS["plain"], factorization, implementation)
    video = layer.transduct(3, train_all=False)
    (trained,) = [name for name, p in video.named_parameters() if p.requires_grad]
    assert "weight" in trained
    assert video.get_parameter(trained).shape[2] == 3
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda layer: layer.transduct(0), ArgumentError, "kernel_size"),
        (lambda layer: layer.transduct(3, 3), ArgumentError, "axis"),
        (lambda layer: layer.transduct(3, stride=0), ArgumentError, "stride"),
        (lambda layer: layer.transduct(3, padding=-1), ArgumentError, "padding"),
        (
            lambda layer: fnn.FactorizedConv.from_conv(CONVS["plain"], 2, factorization="spatial_svd").transduct(3),
            RefusedError,
            "spatial_svd has no transduction",
        ),
        (
            lambda layer: fnn.CPConv.from_conv(nn.ConvTranspose2d(4, 4, 3), 2).transduct(2),
            ArgumentError,
            "odd",
        ),
    ],
)
def test_invalid_transductions_are_refused(call: Any, error: type[FxfactError], words: str) -> None:
    with pytest.raises(error, match=words):
        call(layer_of(CONVS["plain"], "cp", "factorized"))
