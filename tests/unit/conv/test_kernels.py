"""Convolutions that are computed as matrix products, or by oneDNN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxfact.conv import ONEDNN_TYPES, PLAIN_TYPES, POINTWISE_TYPES, supports_onednn
from fxfact.conv.kernels import onednn_conv3d


def as_other(module: nn.Module, types: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    other = copy.deepcopy(module)
    other.__class__ = types[type(module)]
    return other


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_matrix_products_compute_pointwise_convolutions(order: int, bias: bool) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1]
    plain, x = kind(4, 6, 1, bias=bias), torch.randn(2, 4, *[5] * order)
    product = as_other(plain, POINTWISE_TYPES)
    torch.testing.assert_close(product(x), plain(x))
    torch.testing.assert_close(product(x[0]), plain(x[0]))
    torch.testing.assert_close(fx.symbolic_trace(product)(x), plain(x))


@pytest.mark.parametrize("padding", [0, (1, 0, 2), "same", "valid"])
def test_onednn_computes_3d_convolutions(padding: Any) -> None:
    plain, x = nn.Conv3d(4, 6, (3, 3, 5), padding=padding, groups=2), torch.randn(1, 4, 6, 6, 7)
    other = as_other(plain, ONEDNN_TYPES)
    torch.testing.assert_close(other(x), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other(x[0]), plain(x[0]), rtol=1e-4, atol=1e-5)


def test_onednn_is_left_out_where_it_cannot_compute() -> None:
    plain = nn.Conv3d(2, 3, 3).double()
    x = torch.randn(1, 2, 4, 4, 4, dtype=torch.float64)
    assert not supports_onednn(x)
    assert torch.equal(as_other(plain, ONEDNN_TYPES)(x), plain(x))
    settings: Any = ((1, 1, 1), (0, 0, 0), (1, 1, 1), 1)

    def convolve(x: Tensor) -> Tensor:
        return onednn_conv3d(x, plain.weight.float(), None, *settings)

    batched = torch.randn(3, 1, 2, 4, 4, 4)
    torch.testing.assert_close(torch.func.vmap(convolve)(batched), torch.stack([convolve(x) for x in batched]))


def test_every_type_leads_back_to_the_class_of_torch() -> None:
    for types in (POINTWISE_TYPES, ONEDNN_TYPES):
        assert all(PLAIN_TYPES[other] is plain and issubclass(other, plain) for plain, other in types.items())
