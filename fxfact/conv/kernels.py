"""Convolutions computed in another way than PyTorch would take: the same numbers, often sooner."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode


class _Linear(nn.Module):
    """Beneath a convolution's class: its forward multiplies every place of the map by the weight."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, *size) or (in, *size) to (batch, out, *size) or (out, *size)."""
        weight, bias = cast(Tensor, self.weight), cast("Tensor | None", self.bias)
        channels = 1 - weight.ndim
        return functional.linear(input.movedim(channels, -1), weight.flatten(1), bias).movedim(-1, channels)


class PointwiseConv1d(nn.Conv1d):
    """A 1×1 ``nn.Conv1d`` without stride, padding or groups, computed as a matrix product, channels where they are."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, length) or (in, length) to (batch, out, length) or (out, length)."""
        return pointwise_matmul(input, self.weight.flatten(1), self.bias)


@fx.wrap
def pointwise_matmul(input: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``matrix`` (out, in) times maps (batch, in, length), or one (in, length), plus ``bias`` (out,)."""
    maps = input if input.ndim == 3 else input[None]
    matrices = matrix.expand(maps.shape[0], -1, -1)
    product = torch.bmm(matrices, maps) if bias is None else torch.baddbmm(bias[:, None], matrices, maps)
    return product if input.ndim == 3 else product[0]


class PointwiseConv2d(_Linear, nn.Conv2d):
    """A 1×1 ``nn.Conv2d`` without stride, padding or groups, computed as a matrix product."""


class PointwiseConv3d(_Linear, nn.Conv3d):
    """A 1×1×1 ``nn.Conv3d`` without stride, padding or groups, computed as a matrix product."""


class OneDNNConv3d(nn.Conv3d):
    """An ``nn.Conv3d`` with zeros around it, computed by oneDNN on processors: PyTorch passes that over for single
    samples with small maps, on which its own kernel can take ten times as long (``use_mkldnn`` in
    aten/src/ATen/native/Convolution.cpp).
    """

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, *size) or (in, *size) to (batch, out, *size) or (out, *size)."""
        named = isinstance(self.padding, str)  # 'same' or 'valid', whose numbers PyTorch keeps here
        padding = tuple(self._reversed_padding_repeated_twice[::-2]) if named else self.padding
        return onednn_conv3d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


@fx.wrap
def onednn_conv3d(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    """A 3-D convolution, ``settings`` its stride, padding, dilation and groups; by PyTorch's own choice where oneDNN
    cannot, and for whoever compiles or watches.
    """
    if torch.compiler.is_compiling() or _watched() or not _taken(input, weight):
        return functional.conv3d(input, weight, bias, *settings)
    stride, padding, dilation, groups = settings
    return torch.mkldnn_convolution(input, weight, bias, padding, stride, dilation, groups)


def supports_onednn(tensor: Tensor) -> bool:
    """Whether the tensor is of a kind that oneDNN computes with."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and torch._C._has_mkldnn


def _taken(input: Tensor, weight: Tensor) -> bool:
    known = type(input) is Tensor and input.ndim == 5 and input.numel() > 0 and not torch.is_autocast_enabled("cpu")
    return known and supports_onednn(input) and supports_onednn(weight)


def _watched() -> bool:
    """Whether a mode sees what is called, or differentiates forward or maps, which oneDNN's operator cannot."""
    by_mode = _get_current_dispatch_mode() is not None or torch._C._len_torch_function_stack() > 0
    return by_mode or forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


POINTWISE_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: PointwiseConv1d,
    nn.Conv2d: PointwiseConv2d,
    nn.Conv3d: PointwiseConv3d,
}
ONEDNN_TYPES: dict[type[nn.Module], type[nn.Module]] = {nn.Conv3d: OneDNNConv3d}
PLAIN_TYPES = {other: plain for types in (POINTWISE_TYPES, ONEDNN_TYPES) for plain, other in types.items()}
