"""Every snippet of TensorLy-Torch's page "Factorized Convolutional Layers", in its order, only the import changed.

The code is the documentation of TensorLy-Torch (BSD-3-Clause), quoted so that it is known to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxfact.nn as tltorch

ROOM: dict[str, Any] = {"tltorch": tltorch, "torch": torch}

SETUP = """
device='cpu'
input_channels = 16
output_channels = 32
kernel_size = 3
batch_size = 2
size = 24
order = 2

input_shape = (batch_size, input_channels) + (size, )*order
kernel_shape = (output_channels, input_channels) + (kernel_size, )*order

data = torch.randn(input_shape, dtype=torch.float32, device=device)
conv = torch.nn.Conv2d(input_channels, output_channels, kernel_size=3)
"""

SNIPPETS = [
    "result = torch.nn.Conv2d(input_channels, output_channels, kernel_size)",
    "result = tltorch.TuckerConv(input_channels, output_channels, kernel_size, order=2, rank='same')",
    "result = tltorch.CPConv(input_channels, output_channels, kernel_size=3, order=2, rank='same')",
    "result = tltorch.CPConv(input_channels, output_channels, kernel_size=(3, 3), rank='same')",
    "result = tltorch.CPConv.from_conv(conv, rank=0.5, decompose_weights=True)",
    "result = tltorch.CPConv.from_conv(conv, rank=0.5, implementation='mobilenet')",
    "result = tltorch.TuckerConv.from_conv(conv, rank=0.5, implementation='factorized')",
]


@pytest.fixture
def room() -> dict[str, Any]:
    room = dict(ROOM)
    exec(SETUP, room)
    return room


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.removeprefix("result = ").split("(")[0])
def test_the_snippet_runs(snippet: str, room: dict[str, Any]) -> None:
    exec(snippet, room)
    layer: Callable[[torch.Tensor], torch.Tensor] = room["result"]
    output = layer(room["data"])
    assert output.shape == room["conv"](room["data"]).shape
    assert output.isfinite().all()


def test_a_layer_from_a_convolution_is_nearer_to_it_than_chance(room: dict[str, Any]) -> None:
    conv, data = room["conv"], room["data"]
    expected = conv(data)
    for kind in (tltorch.CPConv, tltorch.TuckerConv, tltorch.TTConv):
        near = kind.from_conv(conv, rank=0.5)(data)
        chance = kind.from_conv(conv, rank=0.5, decompose_weights=False)(data)
        assert (near - expected).norm() < 0.9 * expected.norm() < (chance - expected).norm()
