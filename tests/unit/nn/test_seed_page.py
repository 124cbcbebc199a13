"""TensorLy-Torch's page "Factorized Convolutional Layers", block by block, only its import line changed.

The code is that of the documentation of TensorLy-Torch (BSD-3-Clause), quoted so that it is known to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxfact.nn as fnn

BLOCKS = [
    """
import fxfact.nn as tltorch
import torch
""",
    """
device='cpu'
input_channels = 16
output_channels = 32
kernel_size = 3
batch_size = 2
size = 24
order = 2

input_shape = (batch_size, input_channels) + (size, )*order
kernel_shape = (output_channels, input_channels) + (kernel_size, )*order
""",
    "data = torch.randn(input_shape, dtype=torch.float32, device=device)",
    "conv = torch.nn.Conv2d(input_channels, output_channels, kernel_size)",
    "conv = tltorch.TuckerConv(input_channels, output_channels, kernel_size, order=2, rank='same')",
    "conv = torch.nn.Conv2d(input_channels, output_channels, kernel_size=3)",
    "fact_conv = tltorch.CPConv(input_channels, output_channels, kernel_size=3, order=2, rank='same')",
    "fact_conv = tltorch.CPConv(input_channels, output_channels, kernel_size=(3, 3), rank='same')",
    "fact_conv = tltorch.CPConv.from_conv(conv, rank=0.5, decompose_weights=True)",
    "fact_conv = tltorch.CPConv.from_conv(conv, rank=0.5, implementation='mobilenet')",
    "fact_conv = tltorch.TuckerConv.from_conv(conv, rank=0.5, implementation='factorized')",
]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_page_runs_up_to_each_block(number: int) -> None:
    namespace: dict[str, Any] = {}
    for block in BLOCKS[: number + 1]:
        exec(block, namespace)
    made = BLOCKS[number].split(" = ")[0]
    if made.endswith("conv"):
        layer: Callable[[torch.Tensor], torch.Tensor] = namespace[made]
        output = layer(namespace["data"])
        assert output.shape == (2, 32, 22, 22)
        assert output.isfinite().all()
        assert 0.1 < float(output.detach().std()) < 10


def test_layer_from_a_convolution_is_closer_to_it_than_a_random_one() -> None:
    conv, data = torch.nn.Conv2d(16, 32, 3), torch.randn(2, 16, 24, 24)
    expected = conv(data)
    for kind in (fnn.CPConv, fnn.TuckerConv, fnn.TTConv):
        decomposed = kind.from_conv(conv, rank=0.5)(data)
        random = kind.from_conv(conv, rank=0.5, decompose_weights=False)(data)
        assert (decomposed - expected).norm() < (random - expected).norm()
        if kind is not fnn.TTConv:  # its rule gives a rank with a fiftieth of the parameters here
            assert (decomposed - expected).norm() < 0.9 * expected.norm()
