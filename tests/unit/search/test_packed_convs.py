"""Convolutions packed as compiled networks run them compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxfact.conv import is_conv, write_conv
from fxfact.passes import run_passes
from fxfact.search.packed_convs import pack_chain
from tests.support import SPECS, random_input, random_layer


@pytest.mark.parametrize("name", ["plain", "strided", "dilated", "groups", "3-D", "1-D", "reflect", "transposed"])
def test_packed_convolutions_compute_the_same(name: str) -> None:
    layer = random_layer(SPECS[name])
    bias = None if layer.bias is None else layer.bias.float()
    chain = nn.Sequential(*write_conv(layer.spec, layer.weight.float(), bias), nn.Identity())
    x = random_input(layer.spec).float()
    packed = pack_chain(chain, x)
    torch.testing.assert_close(packed(x), chain(x), rtol=1e-4, atol=1e-4)
    can_pack = name in ("plain", "strided", "dilated", "groups", "3-D") and torch._C._has_mkldnn
    assert is_conv(packed[0]) == (not can_pack)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_packed_matrix_products_compute_the_same(order: int) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1]
    chain: Any = run_passes(
        nn.Sequential(kind(6, 8, 3), kind(8, 4, 1, bias=False), kind(4, 5, 1)), ["pointwise_linear"]
    )
    x = torch.randn(2, 6, *[6] * order)
    packed = pack_chain(chain, x)
    torch.testing.assert_close(packed(x), chain(x), rtol=1e-4, atol=1e-4)
    assert sum(map(is_conv, packed)) == (3 if order == 1 else 0 if torch._C.has_mkl else 2)
