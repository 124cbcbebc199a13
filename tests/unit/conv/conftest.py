"""The fixture of the convolution tests: modules of PyTorch with all kinds of settings."""

from __future__ import annotations

import copy

import pytest
from torch import nn

TORCH_CONVS = [
    nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 6, (2, 4), padding="same", padding_mode="reflect", bias=False),
    nn.Conv2d(4, 6, 3, padding="valid", padding_mode="circular"),
    nn.Conv1d(4, 6, 5, padding=3, padding_mode="replicate", stride=3),
    nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 2)),
    nn.ConvTranspose1d(4, 6, 5, stride=3, padding=1, output_padding=2, dilation=2),
    nn.ConvTranspose2d(4, 6, (3, 4), stride=2, padding=1, output_padding=1, groups=2, bias=False),
    nn.ConvTranspose3d(4, 6, 2, stride=2),
]


@pytest.fixture(params=TORCH_CONVS, ids=repr)
def torch_conv(request: pytest.FixtureRequest) -> nn.Module:
    return copy.deepcopy(request.param)
