"""Layers as compiled networks with frozen weights run them: on weights packed for oneDNN or MKL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxfact.conv import POINTWISE_TYPES, TRANSPOSED_TYPES, is_conv


class _Packed(nn.Module):
    """A convolution as inductor writes it (torch/_inductor/fx_passes/mkldnn_fusion.py)."""

    def __init__(self, conv: Any, size: torch.Size) -> None:
        super().__init__()
        settings = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *settings, list(size))
        bias = None if conv.bias is None else conv.bias.detach()
        self._arguments: tuple[Any, ...] = (weight, bias, *settings, "none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, *size) to (batch, out, *size)."""
        found: Tensor = torch.ops.mkldnn._convolution_pointwise.default(x, *self._arguments)
        return found


class _PackedLinear(nn.Module):
    """A linear layer or a 1×1 convolution as inductor writes a matrix product for this number of positions."""

    def __init__(self, conv: Any, positions: int, channels: int) -> None:
        super().__init__()
        self._channels = channels  # their axis
        weight = conv.weight.detach().flatten(1)
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, positions)
        bias = None if conv.bias is None else conv.bias.detach()
        self._arguments: tuple[Any, ...] = (packed, weight, bias, positions)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, *size) to (batch, out, *size), or (…, in) to (…, out)."""
        found: Tensor = torch.ops.mkl._mkl_linear(x.movedim(self._channels, -1), *self._arguments)
        return found.movedim(-1, self._channels)


@torch.no_grad()
def pack_chain(chain: nn.Sequential, x: Tensor) -> nn.Sequential:
    """Return the chain for inputs like ``x``. Stages that neither library supports stay as they are."""
    stages: list[nn.Module] = []
    for stage in chain:
        stages.append(_packed(stage, x) if _can_be_packed(stage, x) else stage)
        x = stage(x)
    return nn.Sequential(*stages)


def _packed(stage: nn.Module, x: Tensor) -> nn.Module:
    if isinstance(stage, nn.Linear) or type(stage) in POINTWISE_TYPES.values():
        channels = -1 if isinstance(stage, nn.Linear) else 1
        return _PackedLinear(stage, x.select(channels, 0).numel(), channels) if torch._C.has_mkl else stage
    return _Packed(stage, x.shape)


def _can_be_packed(stage: Any, x: Tensor) -> bool:
    if not is_conv(stage) or isinstance(stage, TRANSPOSED_TYPES) or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if isinstance(stage, nn.Linear):
        return x.numel() > 0
    batched = x.ndim == len(stage.kernel_size) + 2
    plain = stage.padding_mode == "zeros" and not isinstance(stage.padding, str) and batched and x.ndim >= 4
    return bool(plain and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"))
