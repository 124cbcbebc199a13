"""Convolution modules that PyTorch would compute differently: as matrix products, or by oneDNN. Often faster."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import _get_current_dispatch_mode


class _Linear(nn.Module):
    """Base of a pointwise convolution whose forward is a matrix product with channels last."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the output (batch, out, *size) for an input (batch, in, *size), or both without a batch."""
        weight, bias = cast(Tensor, self.weight), cast("Tensor | None", self.bias)
        channels = 1 - weight.ndim
        return functional.linear(input.movedim(channels, -1), weight.flatten(1), bias).movedim(-1, channels)


class PointwiseConv1d(nn.Conv1d):
    """A 1×1 ``nn.Conv1d`` without stride, padding or groups, computed as a matrix product without moving channels."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the output (batch, out, length) for an input (batch, in, length), or both without a batch."""
        return pointwise_matmul(input, self.weight.flatten(1), self.bias)


@fx.wrap
def pointwise_matmul(input: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``matrix`` (out, in) times ``input`` (batch, in, length) or (in, length), plus ``bias`` (out,)."""
    maps = input if input.ndim == 3 else input[None]
    matrices = matrix.expand(maps.shape[0], -1, -1)
    product = torch.bmm(matrices, maps) if bias is None else torch.baddbmm(bias[:, None], matrices, maps)
    return product if input.ndim == 3 else product[0]


class PointwiseConv2d(_Linear, nn.Conv2d):
    """A 1×1 ``nn.Conv2d`` without stride, padding or groups, computed as a matrix product."""


class PointwiseConv3d(_Linear, nn.Conv3d):
    """A 1×1×1 ``nn.Conv3d`` without stride, padding or groups, computed as a matrix product."""


class OneDNNConv3d(nn.Conv3d):
    """An ``nn.Conv3d`` with zero padding that oneDNN computes on CPUs.

    For single samples with small maps PyTorch chooses its own kernel instead (``use_mkldnn`` in
    aten/src/ATen/native/Convolution.cpp), which can take ten times as long.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the output (batch, out, *size) for an input (batch, in, *size), or both without a batch."""
        is_named = isinstance(self.padding, str)  # 'same' or 'valid': PyTorch keeps the numbers in this attribute
        padding = tuple(self._reversed_padding_repeated_twice[::-2]) if is_named else self.padding
        return onednn_conv3d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


@fx.wrap
def onednn_conv3d(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    """Compute a 3-D convolution by oneDNN. ``settings`` are stride, padding, dilation and groups.

    PyTorch chooses the kernel if oneDNN cannot compute it, under torch.compile, and if a mode intercepts operators.
    """
    if torch.compiler.is_compiling() or _is_intercepted() or not _fits_onednn(input, weight):
        return functional.conv3d(input, weight, bias, *settings)
    stride, padding, dilation, groups = settings
    return torch.mkldnn_convolution(input, weight, bias, padding, stride, dilation, groups)


def supports_onednn(tensor: Tensor) -> bool:
    """Whether oneDNN supports the device and dtype of the tensor."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and torch._C._has_mkldnn


def _fits_onednn(input: Tensor, weight: Tensor) -> bool:
    plain = type(input) is Tensor and input.ndim == 5 and input.numel() > 0 and not torch.is_autocast_enabled("cpu")
    return plain and supports_onednn(input) and supports_onednn(weight)


def _is_intercepted() -> bool:
    """Whether a mode, forward-mode AD or torch.func intercepts operators. oneDNN's operator does not support them."""
    by_mode = _get_current_dispatch_mode() is not None or torch._C._len_torch_function_stack() > 0
    return by_mode or forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


POINTWISE_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: PointwiseConv1d,
    nn.Conv2d: PointwiseConv2d,
    nn.Conv3d: PointwiseConv3d,
}
_LINEAR_TYPES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: NonDynamicallyQuantizableLinear}
ONEDNN_TYPES: dict[type[nn.Module], type[nn.Module]] = {nn.Conv3d: OneDNNConv3d}
_ALL_TYPES = (POINTWISE_TYPES, ONEDNN_TYPES, _LINEAR_TYPES)
PLAIN_TYPES = {other: plain for types in _ALL_TYPES for plain, other in types.items()}
